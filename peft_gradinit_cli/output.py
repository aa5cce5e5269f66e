"""What the commands print: one listing, as a table for people or as JSON for programs."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()
if not console.is_terminal:
    console.width = 160  # as wide as layer names need; a terminal has its own
errors = Console(stderr=True)

_GAP = 2
"""Spaces between two columns."""

_SHOWN = 4
"""Names of a list that people read; programs read all of them."""


def results_alone() -> AbstractContextManager[Any]:
    """While imports and work run: standard output is for results, and DeepSpeed logs to it."""
    return redirect_stdout(sys.stderr)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: in the rows, and in the JSON.
        title: in the table.
        style: format of its values: a format specification, `"list"` for a list's length,
            `"shape"` for `out x in`, `"name"` for the last part of a path, or empty for texts.
        rank: what a narrow terminal has no room for is left out, the highest ranks first; 0: never.
    """

    key: str
    title: str
    style: str = ""
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Said:
    """A fact that people and programs read differently.

    Attributes:
        text: below the table; empty: nothing is said.
        value: in the JSON.
    """

    text: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Listing:
    """Facts and rows, the same in both forms.

    Attributes:
        title: of the table.
        columns: those that the table shows; JSON has all keys of the rows.
        rows: one a layer, a package, …
        facts: single values, shown below the table; `Said` where JSON has another value.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[dict[str, Any]]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def show(self, as_json: bool) -> None:
        """Print to standard output.

        Args:
            as_json: one JSON object instead of a table.
        """
        if as_json:
            print_json(self.content())
            return
        if self.rows:
            for line in self._table():
                console.print(line)
        for name, text in self.told():
            console.print(f"[bold]{name}[/]: ", end="")
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    def told(self) -> list[tuple[str, str]]:
        """The facts as people read them, by name; what has nothing to say is left out."""
        told = []
        for name, value in self.facts.items():
            text = value.text if isinstance(value, Said) else _text(value, "")
            if text or not isinstance(value, Said):
                told.append((name, text))
        return told

    def cells(self, row: dict[str, Any]) -> list[str]:
        """The texts of a row, one a column."""
        return [_text(row.get(column.key), column.style) for column in self.columns]

    def content(self) -> dict[str, Any]:
        """What JSON has of it."""
        facts = {k: v.value if isinstance(v, Said) else v for k, v in self.facts.items()}
        return {**facts, "rows": list(self.rows)} if self.columns else facts

    def _table(self) -> list[Table | str]:
        """The table, and what had to be left out of it."""
        texts = zip(*map(self.cells, self.rows), strict=True)
        cells = {c.key: list(column) for c, column in zip(self.columns, texts, strict=True)}
        first, notes = self.columns[0], []
        shown = list(self.columns)
        if _width(shown, cells) > console.width and (prefix := _common_prefix(cells[first.key])):
            cells[first.key] = [name.removeprefix(prefix) for name in cells[first.key]]
            notes.append(f"names without {prefix}")
        while _width(shown, cells) > console.width and (last := max(shown, key=_rank)).rank:
            shown.remove(last)
        if left_out := [column.title for column in self.columns if column not in shown]:
            notes.append(f"{', '.join(left_out)} left out; a wider terminal or --json has them")
        table = Table(title=self.title, box=None, pad_edge=False, title_justify="left")
        room = console.width - _width(shown[1:], cells) - _GAP
        cells[first.key] = [_with_its_end(name, room) for name in cells[first.key]]
        for column in shown:
            right = "right" if column.style not in {"", "name"} else "left"
            table.add_column(column.title, justify=right, width=_width([column], cells))
        for i in range(len(self.rows)):
            table.add_row(*(cells[column.key][i] for column in shown))
        return [table, *(f"({note})" for note in notes)]


def _rank(column: Column) -> int:
    return column.rank


def _width(columns: Sequence[Column], cells: dict[str, list[str]]) -> int:
    """Characters that the columns need; titles may have several lines."""
    widths = [max(map(len, [*cells[c.key], *c.title.split()])) for c in columns]
    return sum(widths) + _GAP * (len(widths) - 1)


def _common_prefix(names: Sequence[str]) -> str:
    """The parts, each with its dot, that all names begin with."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        common.append(f"{same[0]}.")
    return "".join(common)


def _with_its_end(name: str, room: int) -> str:
    """A name that is too long without its beginning: its end tells what it is."""
    return name if len(name) <= room else f"…{name[len(name) - max(room - 1, 1) :]}"


def layers_told(names: Sequence[str]) -> Said:
    """Names of layers as a fact: people read how many there are and the first of them.

    Args:
        names: all of them; without any, people read nothing.
    """
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    count = f"{len(names)} layer{'s' if len(names) > 1 else ''}"
    return Said(f"{count}: {shown}" if names else "", list(names))


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object to standard output."""
    print(_json(content, indent=1))  # noqa: T201


def _text(value: Any, style: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if style == "list":
        return ", ".join(str(v) for v in value)
    if style == "name":
        return str(value).rpartition("/")[2]
    if style == "shape":
        return " x ".join(str(v) for v in value)
    if style and isinstance(value, int | float):
        return format(value, style)
    if isinstance(value, dict):
        return _json(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(value: Any, indent: int | None = None) -> str:
    from peft_gradinit.files import finite  # late: help and version load no library of models

    return json.dumps(finite(_plain(value)), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """As JSON knows it: words for all that it has no form for."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def human_bytes(n: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def human_time(seconds: float) -> str:
    """A duration as people read it: in minutes, or in hours if it is long."""
    minutes = seconds / 60
    if minutes < 0.1:
        return "less than 0.1 minutes"
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
