"""Rows of a dataset: read, chosen, and turned into what a model takes."""

import functools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from ..errors import ConfigError, DataError
from . import embedded
from .encoding import Encoder
from .labels import Labels
from .preparation import prepare
from .rows import Rows, columns_of
from .schema import DataSection
from .sections import Task, nearest

_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
_FAILURES = (OSError, ValueError, KeyError, RuntimeError, ImportError, DatasetGenerationError)


def load_rows(section: DataSection, *, evaluation: bool = False) -> Rows:
    """Read the rows of the training or of the evaluation data, and choose among them.

    Args:
        section: which data.
        evaluation: the rows to evaluate on.

    Returns:
        Rows as they are in the dataset.
    """
    if section.eval_split is None:
        rows = _chosen(_read(section.path, section.name, section.split, section), section)
        return _held_out(rows, section, evaluation)
    if evaluation:
        path = section.eval_path or section.path
        name = section.eval_name or (section.name if section.eval_path is None else None)
        rows = _read(path, name, section.eval_split, section)
        if section.eval_path is None:
            rows = _chosen(rows, section)
        return _first(_renamed(rows, section.eval_rename), section.n_eval)
    rows = _chosen(_read(section.path, section.name, section.split, section), section)
    return _first(rows, section.n_train)


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
    shown: dict[str, Any] = {} if _streams(rows) else {"desc": "reading"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*couldn't be hashed properly.*")
        warnings.filterwarnings("ignore", message=".*longer than the specified maximum.*")
        encoded = rows.map(encoder, remove_columns=columns, **shown).filter(_is_kept)
        if task == "CAUSAL_LM" and not _is_empty(encoded):
            encoded = prepare(encoded, section, encoder.processor, options)
    if isinstance(encoded, datasets.Dataset) and _is_empty(encoded):
        raise DataError(
            f"none of the rows of {section.path!r} is left: all are empty, longer than "
            f"max_length={section.length}, or without a match of completion_keep."
        )
    return encoded


def _read(path: str, name: str | None, split: str, section: DataSection) -> Rows:
    if path.startswith(embedded.PREFIX):
        if path not in embedded.DATA:
            known = list(embedded.DATA)
            raise ConfigError(f"there are no data {path!r}{nearest(path, known)}; known: {known}.")
        return embedded.DATA[path](split)
    try:
        return _read_stored(path, name, split, section)
    except GradInitErrors:
        raise
    except _FAILURES as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise DataError(
            f"cannot read the data {path!r} (split {split!r}): "
            f"{reason[0] if reason else repr(error)} Give a Hub name, a folder, or a file ending "
            f"in {', '.join(_BUILDERS)}."
        ) from error


GradInitErrors = (ConfigError, DataError)


def _read_stored(path: str, name: str | None, split: str, section: DataSection) -> Rows:
    place = Path(path)
    if place.is_file():
        if (builder := _BUILDERS.get(place.suffix.lower())) is None:
            raise DataError(
                f"the data file {path!r} ends in {place.suffix!r}; expected one of "
                f"{', '.join(_BUILDERS)}."
            )
        if place.stat().st_size == 0:
            raise DataError(f"the data file {path!r} is empty.")
        options: dict[str, Any] = {"delimiter": "\t"} if place.suffix == ".tsv" else {}
        part = split if "[" in split else "train"  # a file is one split, whatever its name
        part = re.sub(r"^\w+", "train", part)
        return datasets.load_dataset(builder, data_files=str(place), split=part, **options)
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        stored = datasets.load_from_disk(str(place))
        if isinstance(stored, datasets.DatasetDict):
            if split not in stored:
                raise DataError(f"{path!r} has the splits {sorted(stored)}, got {split!r}.")
            return stored[split]
        return stored
    if not place.exists() and (path.startswith((".", "/")) or place.suffix in _BUILDERS):
        raise DataError(f"there are no data at {path!r}.")
    return datasets.load_dataset(
        path, name, split=split, revision=section.revision, streaming=section.streaming
    )


def _chosen(rows: Rows, section: DataSection) -> Rows:
    known = columns_of(rows)
    for column, pattern in section.where.items():
        if column not in known:
            hint = nearest(column, known)
            raise DataError(f"data.where: there is no column {column!r}{hint}; columns: {known}.")
        search = functools.partial(_matches, column=column, pattern=pattern)
        rows = rows.filter(search)
    return rows if section.shuffle_seed is None else rows.shuffle(seed=section.shuffle_seed)


def _renamed(rows: Rows, names: dict[str, str]) -> Rows:
    """Rename columns.

    Args:
        rows: of the evaluation data.
        names: new names by old ones.

    Returns:
        The rows.

    Raises:
        DataError: if there is no such column.
    """
    known = columns_of(rows)
    for column in names:
        if column not in known:
            raise DataError(
                f"data.eval_rename: there is no column {column!r}{nearest(column, known)}; columns: "
                f"{known}."
            )
    return rows.rename_columns(names) if names else rows


def _matches(row: dict[str, Any], *, column: str, pattern: str) -> bool:
    return re.search(pattern, str(row[column])) is not None


def _held_out(rows: Rows, section: DataSection, evaluation: bool) -> Rows:
    n = section.n_eval or 0
    if evaluation:
        if n == 0:
            raise ConfigError(
                "there is nothing to evaluate on; set data.eval_split or data.n_eval."
            )
        return rows.take(n)
    return _first(rows.skip(n), section.n_train)


def _first(rows: Rows, n: int | None) -> Rows:
    return rows if n is None else rows.take(n)


def _is_kept(row: dict[str, Any]) -> bool:
    return row.get("completion", "") is not None and row.get("input_ids", [0]) != []


def _is_empty(rows: Rows) -> bool:
    return next(iter(rows), None) is None


def _streams(rows: Rows) -> bool:
    return isinstance(rows, datasets.IterableDataset)
