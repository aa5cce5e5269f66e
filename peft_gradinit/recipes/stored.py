"""Data as they are stored: a file, a dataset that was saved, a dataset of the Hub.

What a file has as text stays the text that it is: no column is read as numbers or dates because its
values look like some. Only labels are, since classes and quantities are no text.
"""

import contextlib
import glob
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa

from ..errors import DataError, warn
from .data_section import DataSection, is_written
from .rows import Rows

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
"""What `datasets` calls the kinds of files, by how their names end."""
_CHUNK = 1 << 20
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
"""Endings of files that `datasets` would unpack, and read text in as numbers and dates."""
_ONLY = "train"
"""The split of data without splits, as `datasets` calls it."""
_OPTIONS: dict[str, dict[str, Any]] = {"text": {"encoding": "utf-8-sig"}}
"""Of what reads other files; a mark of the byte order is no part of a text."""
_AS_WRITTEN: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
"""Options of pandas: an empty cell alone is empty, and `NA` or `None` is a word."""


def read_stored(path: str, name: str | None, split: str, section: DataSection) -> Rows:
    """Read rows from where they are.

    Args:
        path: a file, a folder, or a Hub name.
        name: of a configuration of a dataset.
        split: names with or without slices, as `datasets.load_dataset` takes them.
        section: which column holds labels, the revision, and where the training data are.

    Returns:
        The rows.

    Raises:
        DataError: if there are none.
    """
    place = Path(path)
    if place.is_file():
        return _read_files({_ONLY: [place]}, path, _part_of_one(path, split, section), section)
    if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
        stored = datasets.load_from_disk(str(place))
        if isinstance(stored, datasets.DatasetDict):
            return _part(stored, path, split, section)
        return _part({_ONLY: stored}, path, _part_of_one(path, split, section), section)
    if not place.exists() and (path.startswith((".", "/")) or place.suffix in BUILDERS):
        raise DataError(f"there are no data at {path!r}.")
    if place.is_dir() and not section.streaming and (files := _files_of_text(path, name)):
        return _read_files(files, path, split, section)
    revision = section.revision if path == section.path else None
    rows: Any = datasets.load_dataset(
        path, name, split=split, revision=revision, streaming=section.streaming
    )
    known = {str(part): info.num_examples for part, info in (rows.info.splits or {}).items()}
    check_apart(section, path, known)
    return rows


def check_apart(section: DataSection, path: str, lengths: Mapping[str, int]) -> None:
    """Warn if rows are evaluated on that are trained on as well.

    Args:
        section: what is read.
        path: of the data that were read.
        lengths: numbers of rows, by split.
    """
    places = {Path(p).resolve() for p in (path, section.path, section.eval_path or section.path)}
    is_other = len(places) > 1 or section.eval_name not in (None, section.name)
    if section.eval_split is None or is_other:
        return
    specs = section.split, section.eval_split
    try:
        trained, evaluated = (
            datasets.ReadInstruction.from_spec(spec).to_absolute(dict(lengths)) for spec in specs
        )
    except (ValueError, AssertionError):  # of splits that are not here
        return
    pairs = [(a, b) for a in trained for b in evaluated if a.splitname == b.splitname]
    shared = sum(max(0, min(a.to, b.to) - max(a.from_, b.from_)) for a, b in pairs)
    if shared:
        warn(
            f"data.split={specs[0]!r} and data.eval_split={specs[1]!r} of {path!r} have {shared} rows in "
            "common, so the evaluation says little about other rows; give slices without any, such as "
            "split: 'train[:90%]' and eval_split: 'train[90%:]'."
        )


def _files_of_text(folder: str, name: str | None) -> dict[Any, list[Path]]:
    """The files of every split of a folder, as `datasets` sorts them; none if some are not ours to read."""
    found: Any = datasets.load_dataset_builder(folder, name).config.data_files or {}
    files = {str(split): [Path(file) for file in some] for split, some in found.items()}
    every = [file for some in files.values() for file in some]
    for file in every:
        if file.suffix.lower() in _COMPRESSED and Path(file.stem).suffix.lower() in BUILDERS:
            _builder_of(file)  # refuses it
    kinds = {file.suffix.lower() for file in every}
    return files if kinds and kinds <= BUILDERS.keys() - {".parquet"} else {}


def _read_files(
    files: Mapping[Any, list[Path]], path: str, part: str, section: DataSection
) -> datasets.Dataset:
    """Rows of files, by split; labels are numbers if those of all splits are."""
    stored = {
        split: datasets.concatenate_datasets([_rows_of(place) for place in some])
        for split, some in files.items()
    }
    kinds = {place.suffix.lower() for some in files.values() for place in some}
    if any(BUILDERS[kind] == "csv" for kind in kinds):
        stored = _with_labels(stored, section)
    rows = _part(stored, path, part, section)
    return rows.filter(_is_written) if ".txt" in kinds else rows


def _rows_of(place: Path) -> datasets.Dataset:
    """All rows of a file."""
    builder = _builder_of(place)
    if place.stat().st_size == 0:
        raise DataError(f"the data file {str(place)!r} is empty.")
    if builder != "parquet":
        _check_text(place)
    options = _options_of_csv(place) if builder == "csv" else _OPTIONS.get(builder, {})
    files = glob.escape(str(place))  # `datasets` takes it for a pattern
    try:
        rows: Any = datasets.load_dataset(builder, data_files=files, split=_ONLY, **options)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise DataError(f"the data file {str(place)!r} has no row.") from error
    if builder == "json" and (features := _without_dates(rows.features)) != rows.features:
        rows = _of_json(place, features)
    return rows


def _builder_of(place: Path) -> str:
    if (builder := BUILDERS.get(place.suffix.lower())) is None:
        raise DataError(
            f"the data file {str(place)!r} ends in {place.suffix!r}; expected one of "
            f"{', '.join(BUILDERS)}. Unpack it first if it is compressed."
        )
    return builder


def _check_text(place: Path) -> None:
    """Refuse a blank file, and one not in UTF-8: of JSON, `datasets` would make texts that cannot be read."""
    is_blank = True
    try:
        with place.open(encoding="utf-8") as file:
            while part := file.read(_CHUNK):
                is_blank = is_blank and not part.strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"the data file {str(place)!r} is not in UTF-8 ({error.reason}: "
            f"{error.object[error.start]:#x}); save it as UTF-8, which spreadsheets call 'CSV UTF-8'."
        ) from error
    if is_blank:
        raise DataError(f"the data file {str(place)!r} is empty.")


def _is_written(row: Mapping[str, Any]) -> bool:
    """Blank lines of a file of text separate texts."""
    return row["text"].strip() != ""


# Tables of text ---------------------------------------------------------------------------------


def _options_of_csv(place: Path) -> dict[str, Any]:
    """Options by which `datasets` reads all columns as text.

    Raises:
        DataError: if the first row has more cells than the header, of which pandas makes an index.
    """
    options = {"sep": "\t" if place.suffix.lower() == ".tsv" else ",", **_AS_WRITTEN}
    first = pd.read_csv(place, nrows=1, **options)
    if len(first) and not isinstance(first.index, pd.RangeIndex):
        more = first.index.nlevels
        raise DataError(
            f"the first row of {str(place)!r} has {len(first.columns) + more} cells, but its header names "
            f"{len(first.columns)}: {list(first.columns)}; put quotes around a cell that holds a "
            f"{options['sep']!r}, or give the header a name for each."
        )
    names = [str(name) for name in first.columns]
    if len(names) == 1 and (other := next((s for s in ";\t|" if s in names[0]), None)):
        warn(
            f"{str(place)!r} is read as a single column, {names[0]!r}, since its cells are separated by "
            f"{options['sep']!r}; if {other!r} separates them, save it with commas, or with tabs as .tsv."
        )
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {**options, "features": features}


def _with_labels(
    stored: Mapping[Any, datasets.Dataset], section: DataSection
) -> dict[Any, datasets.Dataset]:
    """The rows with labels as numbers, if all of a column are."""
    label = section.label or "label"
    named = {label, *(old for old, new in section.eval_rename.items() if new == label)}
    changed = dict(stored)
    for column in named:
        having = [split for split, rows in stored.items() if column in rows.column_names]
        cells = [c for split in having for c in stored[split].data.column(column).chunks]
        if not cells:
            continue
        text = section.label is None and is_written(section, column)
        kind = datasets.Value("string" if text else _kind_of(pa.chunked_array(cells), section))
        changed |= {split: changed[split].cast_column(column, kind) for split in having}
    return changed


def _kind_of(cells: pa.ChunkedArray, section: DataSection) -> str:
    """What labels are read as: text, too, if a number would lose zeros or letters that one begins with."""
    changed = any(re.match(r"[+-]?0[\dxX]", cell or "") for cell in cells.unique().to_pylist())
    if changed and section.label_kind != "number":
        return "string"
    for kind in ("int64", "float64"):
        with contextlib.suppress(pa.ArrowInvalid):
            cells.cast(kind)
            return kind
    return "string"


# JSON -------------------------------------------------------------------------------------------


def _without_dates(features: datasets.Features) -> datasets.Features:
    """The same columns with text where `datasets` has made dates of it, which JSON does not have."""
    kinds = {name: _of_text(kind) for name, kind in _arrow_types(features)}
    if kinds == dict(_arrow_types(features)):
        return features
    return datasets.Features.from_arrow_schema(pa.schema(list(kinds.items())))


def _arrow_types(features: datasets.Features) -> Iterator[tuple[str, pa.DataType]]:
    return ((field.name, field.type) for field in features.arrow_schema)


def _of_text(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _of_text(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_of_text(kind.value_type))
    return kind


def _of_json(place: Path, features: datasets.Features) -> datasets.Dataset:
    # By these arguments `datasets` knows what it has read before. It would take a list for shards.
    changed = place.stat().st_mtime_ns
    names = {"path": str(place), "columns": tuple(features), "changed": changed}
    rows: Any = datasets.Dataset.from_generator(_entries, features, gen_kwargs=names)
    return rows


def _entries(path: str, columns: tuple[str, ...], changed: int) -> Iterator[dict[str, Any]]:
    """Objects of a file: those of a list, or one after the other."""
    text, decoder = Path(path).read_text(encoding="utf-8-sig"), json.JSONDecoder()
    at = _after_space(text, 0)
    while at < len(text):
        value, end = decoder.raw_decode(text, at)
        for entry in value if isinstance(value, list) else [value]:
            yield {name: entry.get(name) for name in columns}
        at = _after_space(text, end)


def _after_space(text: str, at: int) -> int:
    return re.compile(r"\s*").match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]


# Splits -----------------------------------------------------------------------------------------


def _part_of_one(path: str, split: str, section: DataSection) -> str:
    """What is read of a file, or of a saved dataset, whose only split is `train`.

    A file of evaluation data alone may go by any name. A name that is none of the training data's is
    refused: it would give the rows that are trained on.

    Args:
        path: the file or folder.
        split: a name, with or without slices.
        section: where the training data are.

    Returns:
        The same slices of `train`.

    Raises:
        DataError: if another split is asked for.
    """
    parts = [part.strip().partition("[") for part in split.split("+")]  # "train[:9]+train[20:]"
    is_trained_on = Path(path).resolve() == Path(section.path).resolve()
    if is_trained_on and any(name != _ONLY for name, *_ in parts):
        raise DataError(
            f"the data {path!r} have one split, {_ONLY!r}, got {split!r}. Leave the name out, or "
            f"give slices, such as '{_ONLY}[90%:]'; to evaluate, give data.n_eval, data.eval_path, "
            "or slices of both."
        )
    return "+".join("".join((_ONLY, *slices)) for _, *slices in parts)


def _part(
    stored: Mapping[Any, datasets.Dataset], path: str, split: str, section: DataSection
) -> datasets.Dataset:
    """Rows of a dataset that is here as a whole.

    Args:
        stored: its splits.
        path: its folder, for the error.
        split: names with or without slices, as `datasets.load_dataset` takes them.
        section: what is trained and evaluated on.

    Returns:
        The rows.

    Raises:
        DataError: if there is no such split.
    """
    lengths = {name: len(rows) for name, rows in stored.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{path!r} has the splits {sorted(stored)}, got {split!r}; give one of them, or slices such as "
            "'train[:90%]'."
        ) from error
    check_apart(section, path, lengths)
    return datasets.concatenate_datasets([
        stored[part.splitname].select(range(part.from_, part.to)) for part in parts
    ])
