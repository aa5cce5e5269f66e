"""Tables of reports, drawn by rich."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 120


def table_of(
    columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]], title: str | None = None
) -> "Table":
    """A rich table without lines; a column is a heading and whether its values are numbers."""
    from rich.table import Table  # slow to import, and needed for printing only

    table = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for heading, is_number in columns:
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def as_text(table: "Table") -> str:
    """The table as plain text, 120 characters wide at most."""
    from rich.console import Console

    console = Console(width=_WIDTH, no_color=True)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
