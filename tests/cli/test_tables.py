"""Tables fit 80 columns: a row is a line, no cell is cut, and what is left out is said."""

import re

import pytest

from peft_gradinit_cli import output
from peft_gradinit_cli.output import Column, Listing, _text, human_time

WIDTH = 80


@pytest.fixture
def shown(monkeypatch):
    """The listings that commands print, on a terminal of 80 columns."""
    found, show = [], Listing.show

    def keep(listing, as_json):
        found.append(listing)
        show(listing, as_json)

    monkeypatch.setattr(output.console, "width", WIDTH)
    monkeypatch.setattr(Listing, "show", keep)
    return found


def check(listing, text):
    lines = text.splitlines()
    left_out = " ".join(line for line in lines if "left out; a wider terminal" in line)
    shortened = re.search(r"^\(names without (\S+)\)$", text, flags=re.MULTILINE)
    columns = [c for c in listing.columns if c.title not in left_out]
    assert columns[0] is listing.columns[0]
    assert all(column.rank for column in set(listing.columns) - set(columns))
    assert listing.rows
    for row in listing.rows:
        cells = [_text(row.get(c.key), c.style) for c in columns]
        if shortened:
            assert cells[0].startswith(shortened.group(1))
            cells[0] = cells[0].removeprefix(shortened.group(1))
        line = re.compile(r"^" + r" +".join(re.escape(cell) for cell in cells if cell) + r" *$")
        found = [text for text in lines if line.match(text.strip())]
        assert found, cells
        assert all(len(text) <= WIDTH for text in found)
    rows = len(listing.rows)
    header = [
        line for line in lines if any(line.strip().startswith(w) for w in (columns[0].title,))
    ]
    assert header
    notes = [line for line in lines if line.startswith("(")]
    assert all(len(line) <= WIDTH for line in notes)
    return columns, rows


COMMANDS = {
    "calibration": lambda w, c, t: ("inspect", c),
    "adapter": lambda w, c, t: ("inspect", w / "ga", "--base", w / "base"),
    "plain adapter": lambda w, c, t: ("inspect", w / "lora"),
    "two adapters": lambda w, c, t: ("compare", w / "lora", w / "other"),
    "two calibrations": lambda w, c, t: ("compare", c, c),
    "intruders": lambda w, c, t: ("compare", w / "lora", "--base", w / "base"),
    "export": lambda w, c, t: ("export", w / "ga", t / "e", "--base", w / "base"),
    "convert": lambda w, c, t: (
        *("convert", w / "pissa/trained", t / "p"),
        *("--initial", w / "pissa/initial"),
    ),
    "doctor": lambda w, c, t: ("doctor",),
    "recipes": lambda w, c, t: ("train", "--list"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_table_fits_80_columns(name, run, shown, workshop, calibration, tmp_path):
    shown.clear()
    done = run(*COMMANDS[name](workshop, calibration, tmp_path))
    assert done.code == 0, done.err
    (listing,) = shown
    check(listing, done.out)


EXPERTS = "base.model.layers.{}.block_sparse_moe.experts.gate_up_proj[{}]"
COLUMNS = (
    Column("layer", "layer"),
    Column("shape", "out x in", "shape", 3),
    Column("scaling", "scaling", ".3g", 2),
    Column("norm", "|sBA|", ".3g", 1),
    Column("effective_rank", "effective rank", ".1f"),
    Column("captured", "captured at start", ".1%"),
)


def rows_of(names):
    return [
        {
            "layer": name,
            "shape": [14336, 4096],
            "scaling": 0.123,
            "norm": 1.23e-5,
            "effective_rank": 12.5,
            "captured": 0.998,
        }
        for name in names
    ]


def test_a_long_name_loses_its_beginning_before_a_column_goes(shown, capsys):
    names = [EXPERTS.format(i, j) for i in (0, 1, 31) for j in (0, 127)]
    listing = Listing("", COLUMNS, rows_of(names))
    listing.show(as_json=False)
    text = capsys.readouterr().out
    columns, _ = check(listing, text)
    assert "(names without base.model.layers.)" in text
    assert [c.key for c in columns] == ["layer", "norm", "effective_rank", "captured"]
    assert "(out x in, scaling left out; a wider terminal or --json has them)" in text


def test_names_without_a_common_beginning_keep_their_end(shown, capsys):
    names = ["x" * 90 + ".q_proj", "lm_head"]
    listing = Listing("", COLUMNS, rows_of(names))
    listing.show(as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    (line,) = [line for line in lines if ".q_proj" in line]
    assert line.startswith("…x")
    assert line.endswith("99.8%")
    assert len([line for line in lines if line.startswith("lm_head")]) == 1


def test_a_wide_terminal_has_everything(shown, capsys, monkeypatch):
    monkeypatch.setattr(output.console, "width", 160)
    Listing("", COLUMNS, rows_of([EXPERTS.format(0, 1)])).show(as_json=False)
    text = capsys.readouterr().out
    assert EXPERTS.format(0, 1) in text
    assert "14336 x 4096" in text
    assert "left out" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "less than 0.1 minutes"),
        (90, "1.5 minutes"),
        (2.77e4, "7.7 hours"),
        (3600, "60.0 minutes"),
    ],
)
def test_times_are_minutes(seconds, text):
    assert human_time(seconds) == text


NUMBERS_AS_TEXT = re.compile(r"^[-+]?\d[\d.,]*(e[-+]?\d+)?( ?%| \w{1,5}\b.*| x \d+)?$")
VERSIONS = {"version", "python"}


def texts_of(value, key=""):
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in texts_of(v, k)]
    if isinstance(value, list):
        return [pair for v in value for pair in texts_of(v, key)]
    return [(key, value)] if isinstance(value, str) else []


@pytest.mark.parametrize("name", COMMANDS)
def test_json_has_numbers_for_numbers(name, run, workshop, calibration, tmp_path):
    done = run(*COMMANDS[name](workshop, calibration, tmp_path), "--json")
    assert done.code == 0, done.err
    for key, text in texts_of(done.json):
        assert key in VERSIONS or not NUMBERS_AS_TEXT.match(text), (key, text)
        assert ", " not in text or key in {"system", "for", "title"}, (key, text)
