"""A recipe from a file and `key=value` overrides, or all of its faults at once."""

import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..errors import ConfigError
from .schema import Recipe
from .sections import Section, nearest
from .shipped import recipe_path
from .training import UNKNOWN
from .values import read_yaml

_NOTHING = ("", "~", "null", "Null", "NULL")
"""What YAML reads as no value."""
SectionT = TypeVar("SectionT", bound=Section)


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file, or the name of a recipe that ships, such as `small/smollm2_135m_chat`.
        overrides: `section.key=value`, the value as YAML; later ones win.

    Returns:
        The recipe.

    Raises:
        ConfigError: with every fault and, for unknown keys, the nearest known one.
    """
    values = {"title": Path(path).stem, **_read(recipe_path(path))}
    faults = [fault for text in overrides if (fault := _override(values, text))]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        faults += _faults_of(error, values, Recipe)
        recipe = None
    if recipe is None or faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        plural = "s" if len(faults) > 1 else ""
        raise ConfigError(f"{str(path)!r} has {len(faults)} fault{plural}:\n{listed}")
    return recipe


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {str(path)!r}: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{str(path)!r} holds {type(values).__name__} where keys and values are expected; see "
            "configs/README.md."
        )
    return values


def _override(values: dict[str, Any], text: str) -> str | None:
    """Set one value in place; returns the fault if it cannot be."""
    key, equals, value = text.partition("=")
    *sections, last = key.split(".")
    if not equals or not last:
        return f"{text!r} is not of the form section.key=value"
    place = values
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            return f"{text!r}: {section} is a value, not a section"
    field = _fields_at(tuple(sections), Recipe).get(last)
    if field is not None and _is_text(field.annotation) and not _is_marked(value):
        place[last] = value.strip()
        return None
    try:
        place[last] = read_yaml(value)
    except yaml.YAMLError as error:
        return f"{text!r}: the value is not YAML: {error}"
    if place[last] is None and value.strip() not in _NOTHING:
        return f"{text!r}: the value is a comment of YAML; put it into quotes of its own: {key}='\"…\"'"
    return None


def _is_text(annotation: Any) -> bool:
    """Whether a field takes text and nothing else, but for `None`."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _is_text(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = [o for o in typing.get_args(annotation) if o is not types.NoneType]
        return all(map(_is_text, options))
    return annotation is str


def _is_marked(value: str) -> bool:
    """Whether text is in quotes, or stands for nothing."""
    stripped = value.strip()
    return stripped in _NOTHING or (len(stripped) > 1 and stripped[0] == stripped[-1] in "'\"")


def _faults_of(
    error: ValidationError, values: Mapping[str, Any], section: type[BaseModel]
) -> list[str]:
    """Every fault in words; that a value is none of several kinds is one fault."""
    found: dict[tuple[str, str], list[str]] = {}
    for fault in error.errors(include_url=False):
        where, message, ending = _described(dict(fault), values, section)
        found.setdefault((where, ending), []).append(message)
    return [
        (f"{where}: " if where else "") + ", or ".join(dict.fromkeys(messages)) + ending
        for (where, ending), messages in found.items()
    ]


def _described(
    fault: Mapping[str, Any], values: Mapping[str, Any], section: type[BaseModel]
) -> tuple[str, str, str]:
    """Where a fault is, what it is, and what follows that."""
    location = fault["loc"]
    where = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        known = list(_fields_at(location[:-1], section))
        return where, f"no such key{nearest(str(location[-1]), known)}", ""
    if fault["type"] == UNKNOWN:
        return where, fault["msg"], ""
    if fault["type"] == "missing":
        field = _fields_at(location[:-1], section).get(str(location[-1]))
        told = field.description if field else None
        return where, "missing" + (f". {told}" if told else ""), ""
    message = fault["msg"].removeprefix("Value error, ")
    if not where:  # of several sections together
        return where, message, ""
    return ".".join(_keys_of(location, values, section)), message, f" (got {fault['input']!r})"


def _keys_of(location: tuple[Any, ...], values: Any, section: type[BaseModel]) -> Iterator[str]:
    """The keys of a place in the file. What follows them is the name of a kind that its value may have."""
    for i, part in enumerate(location):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            if part not in _fields_at(location[:i], section):
                return
            values = None  # a default
        yield str(part)


def _fields_at(location: tuple[Any, ...], section: type[BaseModel]) -> Mapping[str, FieldInfo]:
    for part in location:
        field = section.model_fields.get(str(part))
        nested = None if field is None else _section_of(field.annotation)
        if nested is None:
            return {}
        section = nested
    return section.model_fields


def _section_of(annotation: Any) -> type[BaseModel] | None:
    options = (annotation,)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = typing.get_args(annotation)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def section_of(section: type[SectionT], **values: Any) -> SectionT:
    """Make one section from arguments, for callers without a file.

    Args:
        section: its class.
        values: of its keys.

    Returns:
        The section.

    Raises:
        ConfigError: with every fault.
    """
    try:
        return section(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_faults_of(error, values, section))) from error
