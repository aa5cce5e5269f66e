"""Pictures show what they were given."""

import dataclasses
import re

import pytest

from peft_gradinit import calibrate
from peft_gradinit.analysis import compare_adapters
from peft_gradinit.analysis.plots import (
    draw_angles,
    draw_drift,
    draw_losses,
    draw_rank_map,
    draw_spectra,
    places_of,
)
from peft_gradinit.errors import ConfigError
from peft_gradinit.records import read_adapter
from tests.helpers import lora_ga, pico_llama, quiet, token_batches
from tests.saved.adapters import saved_lora

RANKS = {f"model.layers.{i}.{kind}": 4 + i for i in range(3) for kind in ("attn.q", "mlp.up")}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, before they are closed."""
    import matplotlib.figure

    seen = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *args, **kwargs: (seen.append(self), save(self, *args, **kwargs))[1],
    )
    return seen


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_rank_map(tmp_path, figures):
    assert is_png(draw_rank_map({**RANKS, "lm_head": 9}, tmp_path / "map.png"))
    panel = figures[0].axes[0]
    texts = [t.get_text() for t in panel.texts]
    assert sorted(texts) == sorted(map(str, [*RANKS.values(), 9]))
    assert [t.get_text() for t in panel.get_yticklabels()] == ["attn.q", "mlp.up", "lm_head"]
    assert [t.get_text() for t in panel.get_xticklabels()] == ["none", "0", "1", "2"]


def test_encoders_and_decoders_are_told_apart(tmp_path, figures):
    ranks = {f"{part}.block.0.layer.0.q": 1 for part in ("encoder", "decoder")}
    draw_rank_map(ranks, tmp_path / "map.png")
    rows = [t.get_text() for t in figures[0].axes[0].get_yticklabels()]
    assert rows == ["encoder layer.0.q", "decoder layer.0.q"]


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (
            ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"],
            ["encoder fc1", "decoder fc1"],
        ),
        (
            ["vision_model.encoder.layers.0.fc1", "text_model.encoder.layers.0.fc1", "head"],
            ["vision_model fc1", "text_model fc1", "head"],
        ),
        (["visual.blocks.0.fc1", "layers.0.fc1"], ["visual.blocks fc1", "layers fc1"]),
        (["layers.0", "layers.1"], ["layers"]),
        (["model.layers.0.experts.3.up"], ["experts.3.up"]),
    ],
)
def test_stacks_of_blocks_are_told_apart_by_where_they_differ(names, rows):
    assert list(dict.fromkeys(kind for _, kind in places_of(names).values())) == rows


def test_no_angles_are_no_picture(tmp_path):
    pair = [read_adapter(saved_lora(tmp_path / str(s), seed=s, steps=0)) for s in (0, 0)]
    lines = [
        dataclasses.replace(line, input_angles=(), output_angles=())
        for line in compare_adapters(*pair).layers
    ]
    with pytest.raises(ConfigError, match="no angles between first and second"):
        draw_angles(lines, tmp_path / "angles.png")


def test_spectra(tmp_path, figures):
    data = quiet(token_batches(), estimator="dense")
    result = calibrate(pico_llama(), lora_ga(calibration="deferred"), data)
    assert is_png(draw_spectra(result, tmp_path / "spectra.png"))
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    assert len(panels) == 7
    assert all(len(panel.lines) == 2 for panel in panels)
    name = "model.layers.0.mlp.down_proj"
    line = next(p for p in panels if p.get_title() == "mlp.down_proj").lines[0]
    share = result.triplets[name].S / result.energy[name] ** 0.5
    assert line.get_ydata() == pytest.approx(share.tolist())


def test_angles(tmp_path, figures):
    pair = [read_adapter(saved_lora(tmp_path / str(s), seed=s)) for s in (0, 1)]
    lines = compare_adapters(*pair).layers
    assert is_png(draw_angles(lines, tmp_path / "angles.png", names=("a", "b")))
    inputs, outputs = figures[0].axes[:2]
    assert (inputs.get_title(), outputs.get_title()) == ("input spaces", "output spaces")
    assert len(inputs.lines) == len(outputs.lines) == len(lines)


def test_drift_of_one_and_of_several(tmp_path, figures):
    drift = {name: 0.01 * r for name, r in RANKS.items()}
    assert is_png(draw_drift({"run": drift}, tmp_path / "one.png"))
    assert len(figures[0].axes[0].images) == 1
    both = {"step 10": drift, "step 20": {n: 2 * v for n, v in drift.items()}}
    assert is_png(draw_drift(both, tmp_path / "both.png"))
    first, second = figures[1].axes[0].lines
    assert (2 * first.get_ydata()).tolist() == pytest.approx(second.get_ydata().tolist())


def test_losses_and_their_baselines(tmp_path, figures):
    runs = {
        "lora_ga": [(i, 1 / i) for i in range(1, 40)],
        "lora": [(i, 2 / i) for i in range(1, 9)],
    }
    assert is_png(draw_losses(runs, tmp_path / "loss.png"))
    legend = [t.get_text() for t in figures[0].axes[0].get_legend().get_texts()]
    assert legend == ["lora_ga", "lora"]
    assert len(figures[0].axes[0].lines) == 4
    assert "Running means" in figures[0].axes[0].get_title()
    draw_losses({"lora_ga": [(1, 1.0), (2, 0.9), (3, 0.8)]}, tmp_path / "few.png")
    assert figures[1].axes[0].get_title() == ""  # three points have no running mean


def test_without_matplotlib(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ConfigError, match=re.escape("pip install 'peft_gradinit[plots]'")):
        draw_rank_map(RANKS, tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []
