"""Real text for tests: docstrings of standard-library modules."""

import ast
import importlib.util
import random
from pathlib import Path

MODULES = (
    *("argparse", "ast", "configparser", "csv", "difflib", "email.message", "fractions"),
    *("functools", "http.client", "inspect", "ipaddress", "pathlib", "pdb", "random", "shutil"),
    *("statistics", "tarfile", "threading", "unittest.mock", "urllib.request"),
)
"""20 modules written in Python; their indices are the classes."""


def labelled_docstrings(n: int, seed: int = 0) -> list[tuple[str, int]]:
    """`n` docstrings of at least 60 characters with the index of their module, shuffled."""
    found = [
        (text, label) for label, module in enumerate(MODULES) for text in _docstrings_of(module)
    ]
    random.Random(seed).shuffle(found)
    return found[:n]


def _docstrings_of(module: str) -> list[str]:
    spec = importlib.util.find_spec(module)
    files = [Path(spec.origin)]
    if spec.submodule_search_locations:  # pathlib became a package in Python 3.13
        files = sorted(files[0].parent.glob("*.py"))
    texts = (
        ast.get_docstring(node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    return sorted({text for text in texts if text and len(text) >= 60})
