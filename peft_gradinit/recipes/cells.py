"""What a row holds: in a column, or in a template that its columns fill; texts and images."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from ..errors import DataError
from .sections import nearest


class _OfColumns(Formatter):
    """A field is the name of a column, also with dots and brackets in it."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name


def value_of(row: Mapping[str, Any], source: str, columns: list[str]) -> Any:
    """What a row holds in a column, or a template filled with its columns.

    Args:
        row: of the dataset.
        source: the column's name, or the template.
        columns: all of the dataset, for errors.

    Returns:
        The value.

    Raises:
        DataError: if there is no such column, it is empty, or the template cannot be filled.
    """
    if source in row:
        _check_filled(row, [source])
        return row[source]
    try:
        fields = sorted(fields_of(source))
    except ValueError as error:
        raise DataError(_unfilled(source, error)) from error
    missing = [field for field in fields if field not in row]
    if missing:
        hint = nearest(missing[0], columns)
        raise DataError(
            f"the template {source!r} asks for the column {missing[0]!r}{hint}; the columns "
            f"are {columns}. Braces that are to stay are written twice: {{{{ and }}}}."
        )
    if not fields:
        raise DataError(
            f"there is no column {source!r}{nearest(source, columns)}; the columns are {columns}."
        )
    _check_filled(row, fields)
    for field in fields:
        as_text(row[field], field)
    try:
        return _OfColumns().vformat(source, (), row)
    except KeyError as error:  # of an empty field, or of one in a format
        raise DataError(_unfilled(source, f"there is no column {error}")) from error
    except (ValueError, TypeError) as error:
        raise DataError(_unfilled(source, error)) from error


def fields_of(template: str) -> set[str]:
    """The columns that a template names; `ValueError` if it is none."""
    return {field for _, field, _, _ in Formatter().parse(template) if field}


def as_text(value: Any, source: str) -> str:
    """A value as text.

    Args:
        value: what `value_of` gave.
        source: where it is from, for the error.

    Returns:
        The text.

    Raises:
        DataError: if it is a list, or something else with parts.
    """
    if isinstance(value, Mapping | list | tuple | bytes):
        raise DataError(
            f"{source!r} is read as text, but holds {type(value).__name__}: {str(value)[:60]!r}; name "
            "another column, or make it a text first. Chats are read by data.messages, or as prompt and "
            "completion."
        )
    return str(value)


def _check_filled(row: Mapping[str, Any], columns: list[str]) -> None:
    for column in columns:
        if row[column] is None:
            raise DataError(
                f"the column {column!r} is empty in a row; filter such rows out first (data.where: "
                f"{{{column}: .}} in a recipe does so for data.path, not for data.eval_path)."
            )


def _unfilled(source: str, error: Exception | str) -> str:
    return (
        f"the template {source!r} cannot be filled: {error}. A column stands in braces, as {{text}}; "
        "braces that are to stay are written twice: {{ and }}."
    )


def in_colours(image: Any, column: str) -> Any:
    """An image in RGB with 8 bits.

    Raises:
        DataError: if it is none, or its values have no known range.
    """
    mode = getattr(image, "mode", None)
    if mode is None or not hasattr(image, "convert"):
        raise DataError(
            f"the column {column!r} holds {type(image).__name__}, not images; load a folder of images, "
            f"or cast it first: dataset.cast_column({column!r}, datasets.Image())."
        )
    if mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif mode in ("I", "F"):
        raise DataError(
            f"the images in column {column!r} have values of mode {mode!r}, whose range is not known; "
            "convert them to 8 bits first."
        )
    return image.convert("RGB")
