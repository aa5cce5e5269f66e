"""The benchmark of a new head's rate: its plan, its runs, and what the pages say of it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_heads  # noqa: E402
from bench_heads import OF_ADAPTER, PLANS, SUGGESTED, Result, head_rate_of, table  # noqa: E402


def test_the_table_is_that_of_the_results():
    assert (bench_heads.MEASURED / "heads.md").read_text() == table(bench_heads.published()) + "\n"


def test_the_pages_have_the_figures_of_the_table():
    page = (ROOT / "docs" / "choosing.md").read_text()
    results = bench_heads.published()
    for name in ("docstrings", "two_classes", "digits", "smollm2", "bytes"):
        for what in (OF_ADAPTER, SUGGESTED):
            losses = [result.loss for result in results[name][what]]
            assert f"{sum(losses) / len(losses):.3f}" in page, (name, what)


def test_multiples_are_of_the_rate_that_was_found():
    found = Result(loss=1.0, head_rate=2e-2, rate=1e-3)
    assert head_rate_of(OF_ADAPTER, found) is None
    assert head_rate_of(SUGGESTED, None) == SUGGESTED
    assert head_rate_of("0.5", found) == pytest.approx(1e-2)


def test_a_run_of_equal_rates_is_made_once(tmp_path, monkeypatch):
    runs = []

    def run(name, head_rate, seed):
        runs.append((head_rate, seed))
        return Result(loss=1.0, head_rate=2e-3, rate=2e-3 if seed == 1 else 1e-3)

    monkeypatch.setattr(bench_heads, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_heads, "run", run)
    monkeypatch.setitem(PLANS, "digits", replace(PLANS["digits"], seeds=range(1, 3)))
    bench_heads.carry_out(["digits"])
    assert runs == [(SUGGESTED, 1), (SUGGESTED, 2), (None, 2)]
    bench_heads.carry_out(["digits"])  # nothing is missing
    assert len(runs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "two_classes", "bytes"])
def test_a_run_trains_the_head_at_its_own_rate(name, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_heads, "RESULTS", tmp_path)
    monkeypatch.setitem(PLANS, name, replace(PLANS[name], steps=2))
    found = bench_heads.run(name, SUGGESTED, 1)
    assert found.head_rate > found.rate > 0
    assert bench_heads.run(name, 1e-5, 1).head_rate == 1e-5
    usual = bench_heads.run(name, None, 1)
    assert usual.head_rate == usual.rate == found.rate
