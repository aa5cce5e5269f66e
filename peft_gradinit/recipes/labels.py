"""What the label column of a classifier's data means: classes for the head's outputs, or numbers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import datasets

from ..errors import ConfigError, DataError
from .data_section import DataSection
from .rows import Rows, columns_of
from .sections import nearest

_N_SHOWN = 10
_TRAINED = "of the training data"
_WORDS = "in data.label_words"
_MODEL = (
    "of the model (the classes of a stream are not counted; set model.n_labels or data.label_words)"
)


class Labels(Protocol):
    """What the labels of some data are to a head."""

    def head(self) -> dict[str, Any]:
        """Attributes of the model's config."""
        ...

    def reader(self, rows: Rows) -> Callable[[Any], int | float]:
        """A function from a value of the label column to what the loss takes."""
        ...


@dataclasses.dataclass(frozen=True)
class Classes:
    """One output of the head for each class.

    Attributes:
        column: that holds the labels.
        names: of the classes, by output.
        outputs: by what the data call a class.
        source: where the classes are from, for errors.
    """

    column: str
    names: tuple[str, ...]
    outputs: Mapping[str, int]
    source: str = _TRAINED

    @classmethod
    def of(cls, column: str, names: list[str], source: str = _TRAINED) -> "Classes":
        """Classes that the data call by their names."""
        return cls(column, tuple(names), {name: i for i, name in enumerate(names)}, source)

    def head(self) -> dict[str, Any]:
        """Attributes of the model's config: the number and the names of the classes."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
            "problem_type": "single_label_classification",
        }

    def reader(self, rows: Rows) -> Callable[[Any], int]:
        """A function from a value of the label column to the number of its output."""
        feature = (rows.features or {}).get(self.column)

        def read(value: Any) -> int:
            called = _called(value, feature, self.column)
            if called not in self.outputs:
                raise DataError(
                    f"the label {called!r} in column {self.column!r} is none of the "
                    f"{len(self.names)} classes {self.source}: {_shown(self.names)}. Filter such "
                    "rows out, or train on rows that have it."
                )
            return self.outputs[called]

        return read


@dataclasses.dataclass(frozen=True)
class Numbers:
    """One output, which is to give the number in the label column (regression).

    Attributes:
        column: that holds the numbers.
    """

    column: str

    def head(self) -> dict[str, Any]:
        """Attributes of the model's config: one output, squared error."""
        names = {"id2label": {0: self.column}, "label2id": {self.column: 0}}
        return {"num_labels": 1, **names, "problem_type": "regression"}

    def reader(self, rows: Rows) -> Callable[[Any], float]:
        """A function from a value of the label column to a float."""

        def read(value: Any) -> float:
            _check_filled(value, self.column)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DataError(
                    f"the label {value!r} in column {self.column!r} is no number, as label_kind="
                    "'number' (or one output) wants; leave it out to learn classes."
                )
            if not math.isfinite(value):
                raise DataError(
                    f"the label {value!r} in column {self.column!r} is not finite, so no loss would be; "
                    "filter such rows out first."
                )
            return float(value)

        return read


def labels_of(rows: Rows, section: DataSection, config: Any, n_labels: int | None) -> Labels:
    """Find out what the label column of the training rows means.

    Classes are sorted, unless the model's config names the same ones: then its order is kept, so
    that a trained head stays right. `ClassLabel` and `label_words` have an order of their own.

    Args:
        rows: to train on.
        section: which column, and what it holds.
        config: of the model.
        n_labels: outputs that were asked for.

    Returns:
        The labels.

    Raises:
        ConfigError: if another number of outputs was asked for.
        DataError: if there is one class only.
    """
    column = section.label or "label"
    _check_column(rows, column)
    if section.label_kind == "number" or (section.label_kind is None and n_labels == 1):
        if n_labels not in (None, 1):
            raise ConfigError(
                f"data.label_kind='number' takes one output, got model.n_labels={n_labels}; leave one "
                "of them out."
            )
        return Numbers(column)
    classes = _classes(rows, column, section, config, n_labels)
    if n_labels is not None and len(classes.names) != n_labels:
        raise ConfigError(
            f"model.n_labels={n_labels}, but there are {len(classes.names)} classes "
            f"{classes.source}, in column {column!r}: {_shown(classes.names)}. Leave it out, or "
            "number the classes from 0."
        )
    if len(classes.names) < 2:
        raise DataError(
            f"the column {column!r} holds one class only ({_shown(classes.names)}), which teaches "
            "nothing; give rows of several classes."
        )
    return classes


def _classes(
    rows: Rows, column: str, section: DataSection, config: Any, n_labels: int | None
) -> Classes:
    feature = (rows.features or {}).get(column)
    if section.label_words:
        return _of_words(column, section.label_words, feature)
    if isinstance(feature, datasets.ClassLabel):
        return _in_order_of(config, Classes.of(column, list(feature.names)))
    if isinstance(rows, datasets.IterableDataset):
        return _of_model(column, config, n_labels)
    values = _values(rows, column, feature, section.label_kind)
    if n_labels is not None and all(_is_below(value, n_labels) for value in values):
        values = list(range(n_labels))
    return _in_order_of(config, Classes.of(column, [_called(v, feature, column) for v in values]))


def _of_words(column: str, words: Mapping[int, str], feature: Any) -> Classes:
    """Classes in the order of their numbers; the data may hold the numbers or the words."""
    numbers = sorted(words)
    names = [words[number] for number in numbers]
    outputs = {name: i for i, name in enumerate(names)}
    outputs |= {_called(number, feature, column): i for i, number in enumerate(numbers)}
    return Classes(column, tuple(names), outputs, _WORDS)


def _of_model(column: str, config: Any, n_labels: int | None) -> Classes:
    n = n_labels or config.num_labels
    names = [config.id2label.get(i, str(i)) for i in range(n)]
    outputs = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(n)}
    return Classes(column, tuple(names), outputs, _MODEL)


def _in_order_of(config: Any, classes: Classes) -> Classes:
    """The classes of the model, if they have the same names, but for upper case."""
    own = {str(name).casefold(): i for i, name in sorted(config.id2label.items())}
    found = {name: own.get(name.casefold()) for name in classes.names}
    outputs = {name: i for name, i in found.items() if i is not None}
    if set(outputs.values()) != set(range(len(classes.names))) or len(own) != len(classes.names):
        return classes
    names = tuple(str(config.id2label[i]) for i in range(len(own)))
    return dataclasses.replace(classes, names=names, outputs=outputs)


def _values(rows: datasets.Dataset, column: str, feature: Any, kind: str | None) -> list[Any]:
    """What the column holds, each once, sorted.

    Args:
        rows: to train on.
        column: of the labels.
        feature: its type.
        kind: what was said about it.

    Returns:
        Strings, integers, booleans, or floats.

    Raises:
        DataError: if it holds something else, empty rows, or floats of which nothing was said.
    """
    if not isinstance(feature, datasets.Value):
        raise DataError(
            f"the column {column!r} holds {type(feature).__name__}; expected one label a row: a "
            "string, an integer, a boolean, or a ClassLabel."
        )
    values = rows.unique(column)
    if any(_is_empty(value) for value in values):
        number = next(i for i, value in enumerate(rows[column]) if _is_empty(value))
        raise DataError(
            f"the column {column!r} is empty in row {number} (counted from 0); filter such rows "
            "out first."
        )
    values.sort()
    if kind is None and feature.dtype.startswith(("float", "decimal")):
        raise DataError(
            f"the column {column!r} holds floating-point numbers ({_shown(values)}), which may be "
            "classes or quantities; say label_kind='class' for one output a value, or "
            "label_kind='number' for regression."
        )
    return values


def _called(value: Any, feature: Any, column: str) -> str:
    """The name of a class; whole numbers have the same one in every type.

    Args:
        value: as it is in a row.
        feature: type of the column.
        column: for the error.

    Returns:
        The name.
    """
    _check_filled(value, column)
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        return feature.names[value] if 0 <= value < len(feature.names) else str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _check_column(rows: Rows, column: str) -> None:
    columns = columns_of(rows)
    if column not in columns:
        raise DataError(
            f"there is no column {column!r} of labels{nearest(column, columns)}; the columns are "
            f"{columns}. Name it as label."
        )


def _is_below(value: Any, n: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < n


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_filled(value: Any, column: str) -> None:
    if _is_empty(value):
        raise DataError(f"the column {column!r} is empty in a row; filter such rows out first.")


def _shown(values: Any) -> str:
    listed = [str(value) for value in list(values)[:_N_SHOWN]]
    return ", ".join([*listed, "…"] if len(values) > _N_SHOWN else listed)
