"""`peft-gradinit inspect --html`: one page that needs no other file and says what JSON says."""

import re
from html.parser import HTMLParser

import pytest

from tests.cli.conftest import calibrate_arguments
from tests.saved.adapters import saved_lora

VOID = {"meta"}


class Page(HTMLParser):
    """Texts by element, attributes, and whether every element that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag):
        return [text for t, text in self.texts if t == tag]


def page_of(run, tmp_path, *line):
    done = run("inspect", *line, "--html", tmp_path / "new" / "page.html")
    assert done.code == 0, done.err
    assert f"page: {tmp_path / 'new' / 'page.html'}" in done.out
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.links == []
    assert not re.search(r"https?:|//|url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text
    return page


def test_a_calibration(run, calibration, tmp_path):
    page = page_of(run, tmp_path, calibration)
    content = run("inspect", calibration, "--json").json
    rows = content["rows"]
    assert page.of("h1") == ["Calibration"]
    assert page.of("h2") == ["By depth: suggested r", "By depth: effective rank", "Spectra"]
    assert ("dd", str(len(rows))) in page.texts
    cells = [(a["title"], a["style"]) for tag, a in page.tags if tag == "td" and "title" in a]
    assert [name for name, _ in cells[: len(rows)]] == sorted(
        (row["layer"] for row in rows), key=lambda n: (re.sub(r"\d+", "", n), n)
    )
    ranks = {row["layer"]: row["suggested_rank"] for row in rows}
    colours = {name: float(re.search(r"([\d.]+)\)", s)[1]) for name, s in cells[: len(rows)]}
    highest = max(ranks, key=lambda name: ranks[name])
    assert colours[highest] == max(colours.values()) == 0.6
    for row in rows:
        assert row["layer"] in page.of("td")
        assert f"{row['captured']:.1%}" in page.of("td")
    lines = [a["points"].split() for tag, a in page.tags if tag == "polyline"]
    assert len(lines) == 2 * len(rows)
    assert {len(line) for line in lines} == {len(rows[0]["singular_values"])}
    heights = [float(point.partition(",")[2]) for point in lines[0]]
    assert heights == sorted(heights)
    assert 0 <= heights[0] < heights[-1] <= 96


@pytest.mark.parametrize("base", [True, False])
def test_an_adapter(run, workshop, tmp_path, base):
    line = (workshop / "ga", *(("--base", workshop / "base") if base else ()))
    page = page_of(run, tmp_path, *line)
    assert page.of("h1") == ["Adapter"]
    first = "By depth: |sBA| / |W|" if base else "By depth: effective rank"
    assert page.of("h2")[0] == first
    rows = run("inspect", *line, "--json").json["rows"]
    assert all(row["layer"] in page.of("td") for row in rows)


def test_what_has_no_spectra_has_a_table_alone(run, tmp_path):
    assert run(*calibrate_arguments(tmp_path / "c", "--method", "corda")).code == 0
    page = page_of(run, tmp_path, tmp_path / "c")
    assert page.of("h2") == []
    assert "polyline" not in {tag for tag, _ in page.tags}
    assert sum(text.startswith("model.layers") for text in page.of("td")) == 21


def test_names_are_text(run, tmp_path):
    saved_lora(tmp_path / "<b>mine&amp;</b>")
    page = page_of(run, tmp_path, tmp_path / "<b>mine&amp;</b>")
    assert str(tmp_path / "<b>mine&amp;</b>") in page.of("p")
    assert "b" not in {tag for tag, _ in page.tags}


def test_a_place_that_cannot_be_written_is_told_before_the_work(run, calibration, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run("inspect", calibration, "--html", tmp_path / "file" / "page.html")
    assert done.code == 1
    assert str(tmp_path / "file") in done.err
