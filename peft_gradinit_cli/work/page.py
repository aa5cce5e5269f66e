"""A listing as one HTML page that needs no other file: facts, maps, spectra, and every layer."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from peft_gradinit import __version__
from peft_gradinit.analysis import places_of
from peft_gradinit.files import whole_file

from ..output import Listing

_MAPPED = ("suggested_rank", "drift", "effective_rank", "captured")
"""Columns that are drawn by depth and kind of layer, the first two that a listing has."""

_WIDTH, _HEIGHT = 200, 96
"""Of a panel, in its own units."""

_DECADES = 6
"""Powers of ten below the norm that are drawn at most."""

_SHALLOW, _DEEP = (0, 114, 178), (230, 159, 0)
"""Colours of the first and the last block, told apart by the colour-blind, on white and on black."""

_OPEN_UP_TO = 60
"""Layers up to which the table of all of them is open."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer in a map: its value, from 0 to 1 of the largest, and how both are told."""

    text: str
    share: float
    name: str


@dataclasses.dataclass(frozen=True)
class Map:
    """One column of a listing, kinds of layers from top to bottom, depths from left to right."""

    title: str
    depths: list[str]
    lines: list[tuple[str, list[Cell | None]]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Spectra of the layers of one kind: points of a line by its layer's name, and its colour."""

    kind: str
    lines: list[tuple[str, str, str]]
    n: int


def write_page(listing: Listing, path: Path, *, title: str, subject: str) -> Path:
    """Write a listing as an HTML page.

    Args:
        listing: rows of layers.
        path: of the file.
        title: what is shown.
        subject: of what.

    Returns:
        The path.
    """
    decades = _decades(listing.rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("page.html").render(
        title=title,
        subject=subject,
        version=__version__,
        facts=listing.told(),
        maps=_maps(listing),
        panels=_panels(listing.rows, decades),
        size=(_WIDTH, _HEIGHT, decades),
        colours=(_css(_SHALLOW), _css(_DEEP)),
        depths=_depths(listing.rows),
        columns=listing.columns,
        rows=[(listing.cells(row), _spark(row, decades)) for row in listing.rows],
        is_open=len(listing.rows) <= _OPEN_UP_TO,
    )
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def _maps(listing: Listing) -> list[Map]:
    columns = {c.key: i for i, c in enumerate(listing.columns)}
    keys = [key for key in _MAPPED if key in columns][:2]
    return [_map(listing, key, columns[key]) for key in keys]


def _map(listing: Listing, key: str, column: int) -> Map:
    values = {row["layer"]: row.get(key) or 0 for row in listing.rows}
    highest = max(values.values(), default=0) or 1
    places = _places(listing.rows)
    depths = sorted({depth for depth, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid: dict[str, list[Cell | None]] = {kind: [None] * len(depths) for kind in kinds}
    for row in listing.rows:
        name = row["layer"]
        cell = Cell(listing.cells(row)[column], values[name] / highest, name)
        depth, kind = places[name]
        grid[kind][depths.index(depth)] = cell
    labels = ["none" if depth < 0 else str(depth) for depth in depths]
    return Map(listing.columns[column].title, labels, list(grid.items()))


def _panels(rows: Sequence[Mapping[str, Any]], decades: int) -> list[Panel]:
    """Singular values over their norm, one panel a kind; none if nothing has singular values."""
    places = _places(rows)
    deepest = max((depth for depth, _ in places.values()), default=0)
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("singular_values"):
            kinds.setdefault(places[row["layer"]][1], []).append(row)
    longest = max((len(row.get("singular_values", ())) for row in rows), default=0)
    panels = []
    for kind, members in kinds.items():
        lines = []
        for row in members:
            share = max(0, places[row["layer"]][0]) / max(1, deepest)
            points = _points(row, (_WIDTH, _HEIGHT), longest, decades)
            lines.append((row["layer"], points, _css(_between(share))))
        panels.append(Panel(kind, lines, longest))
    return panels


def _spark(row: Mapping[str, Any], decades: int) -> str:
    return _points(row, (80, 18), len(row.get("singular_values", ())), decades)


def _points(row: Mapping[str, Any], size: tuple[int, int], n: int, decades: int) -> str:
    """A spectrum as points of an SVG line, on a logarithmic scale."""
    points = []
    for i, down in enumerate(_below_norm(row)):
        x, y = size[0] * i / max(1, n - 1), size[1] * min(down, decades) / decades
        points.append(f"{x:.1f},{y:.1f}")
    return " ".join(points)


def _below_norm(row: Mapping[str, Any]) -> list[float]:
    """How many powers of ten the singular values are below their norm."""
    values, norm = row.get("singular_values", ()), row["norm"] or 1
    return [max(0.0, math.log10(norm / value)) if value > 0 else math.inf for value in values]


def _decades(rows: Sequence[Mapping[str, Any]]) -> int:
    """Powers of ten that the panels show: as many as there are, up to `_DECADES`."""
    finite = [down for row in rows for down in _below_norm(row) if down < math.inf]
    return min(_DECADES, max(1, math.ceil(max(finite, default=1))))


def _depths(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    depths = [depth for depth, _ in _places(rows).values() if depth >= 0]
    return min(depths, default=0), max(depths, default=0)


def _places(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Depth and kind of every layer; -1 for one that is in no block."""
    places = places_of(row["layer"] for row in rows)
    return {name: (-1 if depth is None else depth, kind) for name, (depth, kind) in places.items()}


def _between(share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_SHALLOW, _DEEP, strict=True))
    return red, green, blue


def _css(colour: tuple[int, int, int]) -> str:
    return f"rgb({colour[0]} {colour[1]} {colour[2]})"
