"""Rows of a dataset: read, chosen, and turned into what a model takes."""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.exceptions import DatasetGenerationError

from ..errors import ConfigError, DataError, warn
from . import embedded
from .chats import with_template
from .data_section import DataSection
from .encoding import Encoder
from .labels import Labels
from .preparation import prepare
from .rows import Rows, columns_of
from .sections import Task, nearest
from .stored import BUILDERS, check_apart, read_stored

_NEW = "encoded "
_PLACE = "place in the dataset"
_Encode = Callable[[dict[str, Any]], dict[str, Any]]
_FAILURES = (OSError, ValueError, KeyError, RuntimeError, ImportError, DatasetGenerationError)


def load_rows(section: DataSection, *, evaluation: bool = False) -> Rows:
    """Read the rows of the training or of the evaluation data, and choose among them.

    Args:
        section: which data.
        evaluation: the rows to evaluate on.

    Returns:
        Rows as they are in the dataset.
    """
    if evaluation and section.eval_split is not None:
        path = section.eval_path or section.path
        name = section.eval_name or (section.name if section.eval_path is None else None)
        rows = _read(path, name, section.eval_split, section)
        if section.eval_path is None:
            rows = _shuffled(_chosen(rows, section), section)
        return _first(_renamed(rows, section.eval_rename), section.n_eval)
    rows = _chosen(_read(section.path, section.name, section.split, section), section)
    if not _streams(rows):
        return _part_of(_shuffled(rows, section), section, evaluation)
    part = _part_of(rows, section, evaluation)  # every epoch shuffles a stream anew
    return part if evaluation else _shuffled(part, section)


def encode(
    rows: Rows,
    section: DataSection,
    task: Task,
    processor: Any,
    labels: Labels | None = None,
    options: Mapping[str, Any] | None = None,
) -> Rows:
    """Turn rows into `input_ids` and `labels` (images: `pixel_values`), for preferences into texts.

    Streaming data stay streaming: nothing is read before it is asked for.

    Args:
        rows: what `load_rows` gave.
        section: how.
        task: what the model is for.
        processor: its tokenizer or image processor.
        labels: what the label column means to a classifier.
        options: fields of `SFTConfig` for causal models.

    Returns:
        Rows that a collator can pad; `prompt`, `chosen` and `rejected` for preferences.

    Raises:
        ConfigError: if rows are to be packed for a model that is not causal.
        DataError: if no row is left.
    """
    if section.packing and task != "CAUSAL_LM":
        raise ConfigError(f"packing is for causal models, but the task is {task}.")
    columns = columns_of(rows)
    read_label = None if labels is None else labels.reader(rows)
    encoder = Encoder(section, task, processor, columns, read_label)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*couldn't be hashed properly.*")
        warnings.filterwarnings("ignore", message=".*longer than the specified maximum.*")
        every = _mapped(rows, encoder, columns)
        encoded = kept = every.filter(_is_kept)
        if task == "CAUSAL_LM" and not _is_empty(encoded):
            encoded = prepare(encoded, section, encoder.processor, options)
    if isinstance(encoded, datasets.Dataset) and _is_empty(encoded):
        raise DataError(
            f"none of the rows of {section.path!r} is left: all are empty, longer than "
            f"max_length={section.length} (with their prompts alone, unless drop_longer is set), or "
            "without a match of completion_keep."
        )
    if not (section.drop_longer or section.completion_keep):
        _tell_of_left_out(every, kept, "are empty")
    if task == "CAUSAL_LM" and not (section.drop_longer or section.packing):
        why = f"have no token with loss among the first data.max_length={section.length}"
        _tell_of_left_out(kept, encoded, why, "; set it higher, or give shorter prompts")
    return encoded


def kept_rows(
    rows: Rows,
    section: DataSection,
    task: Task,
    processor: Any,
    options: Mapping[str, Any] | None = None,
) -> Rows:
    """The rows that `encode` keeps, as they are in the dataset.

    Args:
        rows: what `load_rows` gave.
        section: how they are encoded; `packing` does not matter.
        task: a language model's.
        processor: its tokenizer.
        options: fields of `SFTConfig` for causal models.

    Returns:
        Rows of the dataset.
    """
    columns = columns_of(rows)
    encoder = functools.partial(_placed, Encoder(section, task, processor, columns))
    encoded = _mapped(rows.map(_place, with_indices=True), encoder, [*columns, _PLACE])
    encoded = encoded.filter(_is_kept)
    if task == "CAUSAL_LM" and not _is_empty(encoded):
        unpacked = section.model_copy(update={"packing": False})
        encoded = prepare(encoded, unpacked, with_template(section, processor), options)
    places = frozenset(cast("dict[str, Any]", row)[_PLACE] for row in encoded)
    return rows.filter(functools.partial(_is_among, places), with_indices=True)


def _place(row: dict[str, Any], place: int) -> dict[str, Any]:
    return {**row, _PLACE: place}


def _placed(encoder: Encoder, row: dict[str, Any]) -> dict[str, Any]:
    return {**encoder(row), _PLACE: row[_PLACE]}


def _is_among(places: frozenset[int], _: Any, place: int) -> bool:
    return place in places


def _tell_of_left_out(every: Rows, kept: Rows, why: str, advice: str = "") -> None:
    before, after = _n_rows(every), _n_rows(kept)
    if before is not None and after is not None and after < before:
        warn(f"{before - after} of {before} rows of the data {why} and were left out{advice}.")


def _mapped(rows: Rows, encoder: _Encode, columns: list[str]) -> Rows:
    """What the encoder makes of the rows, in types of its own.

    `datasets` keeps the type of a column that was there before: it would turn texts into the numbers or
    dates of a column of the same name.
    """
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(encoder, remove_columns=columns)
    renewed = functools.partial(_renewed, encoder)
    mapped = rows.map(renewed, remove_columns=columns, desc="reading")
    return mapped.rename_columns({name: name.removeprefix(_NEW) for name in mapped.column_names})


def _renewed(encoder: _Encode, row: dict[str, Any]) -> dict[str, Any]:
    return {_NEW + name: value for name, value in encoder(row).items()}


def _read(path: str, name: str | None, split: str, section: DataSection) -> Rows:
    if path.startswith(embedded.PREFIX):
        if path not in embedded.DATA:
            known = list(embedded.DATA)
            raise ConfigError(f"there are no data {path!r}{nearest(path, known)}; known: {known}.")
        found = embedded.DATA[path](split)
        check_apart(section, path, {split: len(found)})
        return found
    try:
        rows = read_stored(path, name, split, section)
    except (ConfigError, DataError):
        raise
    except _FAILURES as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise DataError(
            f"cannot read the data {path!r} (split {split!r}): "
            f"{(reason[0] if reason else repr(error)).rstrip('.')}. {_advice(path)}"
        ) from error
    if _n_rows(rows) == 0:
        raise DataError(f"the data {path!r} have no row in the split {split!r}; give another one.")
    return rows


def _advice(path: str) -> str:
    """What to do about data that could not be read: a file of a known kind is at fault itself."""
    place = Path(path).expanduser()
    if place.is_file() and place.suffix.lower() in BUILDERS:
        return "Mend the file, or give another one."
    return f"Give a Hub name, a folder, or a file ending in {', '.join(BUILDERS)}."


def _chosen(rows: Rows, section: DataSection) -> Rows:
    known = columns_of(rows)
    for column, pattern in section.where.items():
        if column not in known:
            hint = nearest(column, known)
            raise DataError(f"data.where: there is no column {column!r}{hint}; columns: {known}.")
        search = functools.partial(_matches, column=column, pattern=pattern)
        rows = rows.filter(search)
    if _n_rows(rows) == 0:
        raise DataError(
            f"none of the rows of {section.path!r} matches data.where={section.where}; each is a "
            "column, and a regular expression that matches somewhere in it."
        )
    return rows


def _shuffled(rows: Rows, section: DataSection) -> Rows:
    return rows if section.shuffle_seed is None else rows.shuffle(seed=section.shuffle_seed)


def _renamed(rows: Rows, names: dict[str, str]) -> Rows:
    """Rename columns.

    Args:
        rows: of the evaluation data.
        names: new names by old ones.

    Returns:
        The rows.

    Raises:
        DataError: if there is no such column, or the new name is another's.
    """
    known = columns_of(rows)
    for column in names:
        if column not in known:
            raise DataError(
                f"data.eval_rename: there is no column {column!r}{nearest(column, known)}; columns: "
                f"{known}."
            )
    for name in names.values():
        if name in known and name not in names:
            raise DataError(
                f"data.eval_rename: there is a column {name!r} already; rename that one, too, or leave "
                f"it as it is. Columns: {known}."
            )
    return rows.rename_columns(names) if names else rows


def _matches(row: dict[str, Any], *, column: str, pattern: str) -> bool:
    return row[column] is not None and re.search(pattern, str(row[column])) is not None


def _part_of(rows: Rows, section: DataSection, evaluation: bool) -> Rows:
    """The first `n_eval` rows, to evaluate on, if there are no others for that; or those to train on.

    Args:
        rows: all of them.
        section: how many there are of each.
        evaluation: the rows to evaluate on.

    Returns:
        Rows.

    Raises:
        ConfigError: if there are none to evaluate on.
        DataError: if there are none to train on.
    """
    if section.eval_split is not None:
        return _first(rows, section.n_train)
    n, n_rows = section.n_eval or 0, _n_rows(rows)
    if n_rows is not None and n >= n_rows:
        raise DataError(
            f"data.n_eval={n} leaves nothing of the {n_rows} rows to train on; give a smaller one, or "
            "other rows to evaluate on, by data.eval_path and data.eval_split."
        )
    if evaluation:
        if n == 0:
            raise ConfigError(
                "there is nothing to evaluate on; set data.eval_split or data.n_eval."
            )
        return rows.take(n)
    return _first(rows.skip(n), section.n_train)


def _first(rows: Rows, n: int | None) -> Rows:
    """At most `n` rows; older versions of `datasets` raise where there are fewer."""
    n_rows = _n_rows(rows)
    return rows if n is None else rows.take(n if n_rows is None else min(n, n_rows))


def _n_rows(rows: Rows) -> int | None:
    """How many there are; `None` for a stream."""
    return None if isinstance(rows, datasets.IterableDataset) else len(rows)


def _is_kept(row: dict[str, Any]) -> bool:
    whole = row.get("completion", "") is not None and row.get("input_ids", [0]) != []
    return whole and row.get("text", ".").strip() != ""


def _is_empty(rows: Rows) -> bool:
    return next(iter(rows), None) is None


def _streams(rows: Rows) -> bool:
    return isinstance(rows, datasets.IterableDataset)
