"""What the commands print: one listing, as a table for people or as JSON for programs."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()
if not console.is_terminal:
    console.width = 160  # as wide as layer names need; a terminal has its own
errors = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: in the rows, and in the JSON.
        title: in the table.
        style: format of its values: a format specification, `"list"` for a list's length, or empty
            for texts.
    """

    key: str
    title: str
    style: str = ""


@dataclasses.dataclass(frozen=True)
class Listing:
    """Facts and rows, the same in both forms.

    Attributes:
        title: of the table.
        columns: those that the table shows; JSON has all keys of the rows.
        rows: one a layer, a package, …
        facts: single values, shown below the table.
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
            console.print(self._table())
        for name, value in self.facts.items():
            console.print(f"[bold]{name}[/]: ", end="")
            console.print(_text(value, ""), markup=False, highlight=False, soft_wrap=True)

    def content(self) -> dict[str, Any]:
        """What JSON has of it."""
        return {**self.facts, "rows": list(self.rows)}

    def _table(self) -> Table:
        table = Table(title=self.title, box=None, pad_edge=False, title_justify="left")
        for column in self.columns:
            right = "right" if column.style else "left"
            table.add_column(column.title, justify=right, overflow="fold")
        for row in self.rows:
            table.add_row(*(_text(row.get(c.key), c.style) for c in self.columns))
        return table


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object to standard output."""
    print(json.dumps(_plain(content), indent=1, allow_nan=False))  # noqa: T201


def _text(value: Any, style: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if style == "list":
        return ", ".join(str(v) for v in value)
    if style and isinstance(value, int | float):
        return format(value, style)
    if isinstance(value, dict):
        return json.dumps(_plain(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """As JSON knows it: no infinities, no tuples."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def human_bytes(n: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
