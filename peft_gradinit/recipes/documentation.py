"""`configs/README.md`, made from the schema."""

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .schema import Recipe

_HEAD = """# Recipes

One file is one run: `peft-gradinit train FILE [section.key=value …]`. Those here come with the package and are run
by name: `peft-gradinit train offline/pico_llama_docstrings`. `--list` lists them. Several processes: `accelerate launch -m
peft_gradinit_cli train FILE`.
An unknown key is an error, and all errors are shown at once. This page is made from the schema:
`python -m peft_gradinit.recipes.documentation > configs/README.md`. `shapes/` holds the configs of large models
without weights, for `peft-gradinit calibrate configs/shapes/NAME --dry-run`.
"""


def documentation() -> str:
    """Markdown with every key of a recipe."""
    parts = [_HEAD, _section("", Recipe)]
    parts += [
        _section(name, section)
        for name, field in Recipe.model_fields.items()
        if (section := _nested(field)) is not None
    ]
    return "\n".join(parts)


def _section(name: str, section: type[BaseModel]) -> str:
    title = f"## `{name}`" if name else "## Top level"
    lines = [title, "", (section.__doc__ or "").strip().replace("\n    ", "\n"), ""]
    lines += ["| key | values | default | |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        kind = "a section" if _nested(field) else _kind(field.annotation)
        lines.append(f"| `{key}` | {kind} | {_default(field)} | {field.description} |")
    return "\n".join([*lines, ""])


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    for option in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_kind(a) for a in arguments if a is not type(None))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (list, tuple):
        kinds = dict.fromkeys(_kind(a) for a in arguments)
        return f"list of {', '.join(kinds)}"
    if origin is dict:
        return f"{_kind(arguments[0])} to {_kind(arguments[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Any: "anything"}
    return names.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or isinstance(field.default, BaseModel):
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(documentation(), end="")  # noqa: T201
