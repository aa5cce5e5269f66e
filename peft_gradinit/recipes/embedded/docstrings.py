"""Docstrings of the standard library, with the module that they are from.

They are read from the source files, not from imported modules, so what else is imported does not
matter.
"""

import ast
import functools
import importlib.util
import random
from pathlib import Path

import datasets

from ...errors import ConfigError

DOCSTRINGS = "embedded:docstrings"

MODULES = (
    *("argparse", "ast", "configparser", "csv", "difflib", "email.message", "fractions"),
    *("functools", "http.client", "inspect", "ipaddress", "pathlib", "pdb", "random", "shutil"),
    *("statistics", "tarfile", "threading", "unittest.mock", "urllib.request"),
)
"""20 modules written in Python: the classes."""

_MIN_LENGTH = 60  # characters
_N_TEST = 160


def docstrings(split: str) -> datasets.Dataset:
    """Docstrings with the module that they are from.

    Args:
        split: `"train"` or `"test"`.

    Returns:
        Rows with `text`, `label` (of 20 modules), `module`, `question`, which asks for it, and
        `other`, a module that it is not from.

    Raises:
        ConfigError: for another split.
    """
    rows = docstring_rows()
    parts = {"train": rows[_N_TEST:], "test": rows[:_N_TEST]}
    if split not in parts:
        raise ConfigError(f"{DOCSTRINGS!r} has the splits {sorted(parts)}, got {split!r}.")
    text = datasets.Value("string")
    features = {"text": text, "label": datasets.ClassLabel(names=list(MODULES))}
    features |= {"module": text, "question": text, "other": text}
    return datasets.Dataset.from_list(parts[split], features=datasets.Features(features))


@functools.cache
def docstring_rows() -> list[dict[str, str | int]]:
    """Rows of both splits, in a fixed order that looks random."""
    rows = [
        {
            "text": text,
            "label": label,
            "module": module,
            "question": f"Which module is this docstring from?\n{text}",
            "other": MODULES[(label + 1 + len(text) % (len(MODULES) - 1)) % len(MODULES)],
        }
        for label, module in enumerate(MODULES)
        for text in docstrings_of(module)
    ]
    random.Random(0).shuffle(rows)
    return rows


def docstrings_of(module: str) -> list[str]:
    """Docstrings in the source of a module: its own, and those of its classes and functions.

    Args:
        module: one that is written in Python.

    Returns:
        Those of at least 60 characters, each once, sorted; none for other modules.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    files = [Path(spec.origin)]
    if spec.submodule_search_locations:  # pathlib became a package in Python 3.13
        files = sorted(files[0].parent.glob("*.py"))
    texts = (
        ast.get_docstring(node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    return sorted({text for text in texts if text and len(text) >= _MIN_LENGTH})
