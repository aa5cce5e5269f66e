"""Functions of the standard library and of installed packages: source, and what it does.

Every row is a chat. The user shows a function without its docstring; the answer is the docstring's
first sentence. Rows depend on the source files alone. A module belongs to one split, by a hash of
its name, and rows are ordered by a hash of the function's name. So another patch version of Python
changes the rows of the functions that it changes, and moves no other row.
"""

import ast
import functools
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from .splits import check_split, hash_of, split_of

FUNCTIONS = "embedded:functions"
PACKAGES = ("accelerate", "datasets", "huggingface_hub", "numpy", "peft", "transformers")
"""Packages that recipes need anyway; their functions stand beside those of the standard library."""

QUESTION = "What does this Python function do? Answer in one sentence.\n\n```python\n{source}\n```"

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_LEFT_OUT = frozenset({
    *("site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3"),
    *("pydoc_data", "turtledemo", "encodings", "ensurepip", "__pycache__"),
    *("models", "polynomial"),  # of transformers and numpy: their modules copy one another
})
_SOURCE_LENGTHS = range(40, 321)  # characters
_ANSWER_LENGTHS = range(20, 121)
_FIRST_SENTENCE = re.compile(r"^(.+?\.)(?:\s|$)", re.DOTALL)


def functions(split: str) -> datasets.Dataset:
    """Functions as chats, to be trained on the answer only.

    Args:
        split: `"train"` (8 of 10 modules), `"validation"` or `"test"`.

    Returns:
        Rows with `prompt` and `completion`, each a list of messages, `module`, `name` and `source`.

    Raises:
        ConfigError: for another split.
    """
    check_split(FUNCTIONS, split)
    return datasets.Dataset.from_list([row for row in _rows() if split_of(row["module"]) == split])


@functools.cache
def _rows() -> list[dict[str, Any]]:
    """All rows; a source and an answer are there once, so no split holds a copy of another's."""
    found = sorted(
        _found(), key=lambda row: (hash_of(f"{row['module']}.{row['name']}"), row["source"])
    )
    sources, answers, rows = set(), set(), []
    for row in found:
        answer = row["completion"][0]["content"]
        if row["source"] not in sources and answer.lower() not in answers:
            rows.append(row)
        sources.add(row["source"])
        answers.add(answer.lower())
    return rows


def _found() -> Iterator[dict[str, Any]]:
    for name, root in _roots():
        for path in sorted(root.rglob("*.py")):
            inner = path.relative_to(root)
            if not _LEFT_OUT & set(inner.parts):
                parts = [name, *inner.with_suffix("").parts]
                module = ".".join(p for p in parts if p and p != "__init__")
                yield from functions_of(path.read_text(encoding="utf-8"), module)


def _roots() -> Iterator[tuple[str, Path]]:
    yield "", Path(sysconfig.get_paths()["stdlib"])
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            yield package, Path(spec.origin).parent


def functions_of(text: str, module: str) -> Iterator[dict[str, Any]]:
    """Rows of the public functions and methods of a module.

    Args:
        text: source of the module.
        module: name of it.

    Yields:
        Rows in the order of the source.
    """
    lines = text.splitlines()
    for name, node in _definitions(ast.parse(text), ""):
        answer = _answer(node)
        if answer is not None and len(source := _source(node, lines)) in _SOURCE_LENGTHS:
            yield {
                "prompt": [{"role": "user", "content": QUESTION.format(source=source)}],
                "completion": [{"role": "assistant", "content": answer}],
                "module": module,
                "name": name,
                "source": source,
            }


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    """Functions below a node with their qualified names."""
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        inner = f"{prefix}{name}." if isinstance(name, str) else prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
        yield from _definitions(child, inner)


def _answer(node: _Function) -> str | None:
    """First sentence of the docstring of a public function that has a body of its own."""
    docstring = ast.get_docstring(node)
    if docstring is None or node.name.startswith("_") or len(node.body) < 2:
        return None
    found = _FIRST_SENTENCE.match(docstring.split("\n\n")[0])
    sentence = " ".join(found.group(1).split()) if found else ""
    return sentence if len(sentence) in _ANSWER_LENGTHS else None


def _source(node: _Function, lines: list[str]) -> str:
    """Source of a function without its docstring, from the margin."""
    docstring = node.body[0]
    before = lines[node.lineno - 1 : docstring.lineno - 1]
    after = lines[docstring.end_lineno : node.end_lineno]
    return "\n".join(line[node.col_offset :].rstrip() for line in [*before, *after])
