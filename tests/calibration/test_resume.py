"""A killed calibration continues to the result of an uninterrupted one."""

import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import SafetensorError

from peft_gradinit import Calibration, EvaConfig, LoraGAConfig, LoraOneConfig, calibrate
from peft_gradinit.calibration import Checkpoint
from tests.calibration.killed import BATCHES, WIDE, config_of, measured
from tests.helpers import adapted, logits, pico_llama


class Killed(Exception):  # noqa: N818 a death, not an error
    """Stands for a kill: nothing of the pass is cleaned up but what its contexts do."""


def cut_after(n):
    yield from BATCHES[:n]
    raise Killed


def same(one, other):
    assert one.triplets.keys() == other.triplets.keys()
    for name, svd in one.triplets.items():
        for part, want in zip(svd, other.triplets[name], strict=True):
            assert torch.equal(part, want), name
    assert one.energy == other.energy
    for fact in ("n_batches", "n_sequences", "n_tokens", "loss_weight", "loss", "stopped_by"):
        assert getattr(one.facts, fact) == getattr(other.facts, fact), fact


def test_the_model_of_these_tests_is_sketched():
    dense = calibrate(
        pico_llama(**WIDE),
        config_of(LoraGAConfig),
        Calibration(BATCHES, progress=False, estimator="dense"),
    )
    name = "model.layers.0.mlp.up_proj"
    sketched = measured(LoraGAConfig, BATCHES)
    assert not torch.equal(sketched.triplets[name].S, dense.triplets[name].S)


@pytest.mark.parametrize("method", [LoraGAConfig, EvaConfig])
@pytest.mark.parametrize("n_batches", [1, 2, 8, 17])
def test_continuing_gives_the_same_bits(tmp_path, method, n_batches):
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", "data", every_seconds=0)
    want = measured(method, BATCHES)
    with pytest.raises(Killed):
        measured(method, cut_after(n_batches), checkpoint)
    assert checkpoint.path.exists()
    same(measured(method, BATCHES, checkpoint), want)
    assert list(tmp_path.iterdir()) == []


def test_what_is_continued_is_not_read_again(tmp_path):
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=0)
    with pytest.raises(Killed):
        measured(LoraGAConfig, cut_after(10), checkpoint)
    poisoned = [{k: torch.zeros_like(v) for k, v in b.items()} for b in BATCHES[:10]]
    same(
        measured(LoraGAConfig, poisoned + BATCHES[10:], checkpoint), measured(LoraGAConfig, BATCHES)
    )


def test_settling_continues_with_what_it_compares(tmp_path):
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=0)
    options = {"tau": 0.05, "rho": 1}
    want = measured(EvaConfig, BATCHES, **options)
    assert want.facts.stopped_by == "settled"
    with pytest.raises(Killed):
        measured(EvaConfig, cut_after(3), checkpoint, **options)
    same(measured(EvaConfig, BATCHES, checkpoint, **options), want)


def test_a_pass_killed_after_its_last_batch_reads_nothing(tmp_path):
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=0)
    with pytest.raises(Killed):
        measured(LoraGAConfig, cut_after(18), checkpoint)
    same(measured(LoraGAConfig, BATCHES, checkpoint), measured(LoraGAConfig, BATCHES))


@pytest.mark.parametrize("n_batches", [2, 18])
def test_the_step_of_lora_one_is_checked_on_the_same_batches(tmp_path, n_batches):
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=0)
    options = {"target_modules": "all-linear", "r": 2, "task_type": "CAUSAL_LM"}
    dying = Calibration(cut_after(n_batches), progress=False, checkpoint=checkpoint)
    with pytest.raises(Killed):
        adapted(pico_llama(), LoraOneConfig(**options, calibration=dying))
    config = LoraOneConfig(
        **options, calibration=Calibration(BATCHES, progress=False, checkpoint=checkpoint)
    )
    model = adapted(pico_llama(), config)
    uninterrupted = LoraOneConfig(**options, calibration=Calibration(BATCHES, progress=False))
    want = adapted(pico_llama(), uninterrupted)
    torch.testing.assert_close(logits(model), logits(want))
    step, expected = (m.base_model.init_report["default"].step for m in (model, want))
    assert step.loss_before == pytest.approx(expected.loss_before)
    assert step.loss_after == pytest.approx(expected.loss_after)


@pytest.mark.parametrize("change", ["data", "seed", "rank", "model"])
def test_another_calibration_begins_anew(tmp_path, change):
    path = tmp_path / "partial.safetensors"
    with pytest.raises(Killed):
        measured(LoraGAConfig, cut_after(4), Checkpoint(path, "one", 0))
    checkpoint = Checkpoint(path, "other" if change == "data" else "one", 0)
    data = Calibration(
        BATCHES, progress=False, seed=1 if change == "seed" else 0, checkpoint=checkpoint
    )
    model = pico_llama(seed=1 if change == "model" else 0, **WIDE)
    r = 3 if change == "rank" else 2
    config = LoraGAConfig(r=r, target_modules="all-linear", calibration="deferred")
    with pytest.warns(UserWarning, match="is of another calibration"):
        result = calibrate(model, config, data)
    assert result.facts.n_sequences == 90


def test_damage_begins_anew_with_a_warning(tmp_path):
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=0)
    with pytest.raises(Killed):
        measured(LoraGAConfig, cut_after(4), checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be continued"):
        result = measured(LoraGAConfig, BATCHES, checkpoint)
    same(result, measured(LoraGAConfig, BATCHES))


def test_seconds_between_saves_are_kept(tmp_path):
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=3600)
    with pytest.raises(Killed):
        measured(LoraGAConfig, cut_after(10), checkpoint)
    assert not checkpoint.path.exists()


_VICTIM = """
import os, signal, sys
from peft_gradinit import LoraGAConfig
from peft_gradinit.calibration import Checkpoint
from tests.calibration.killed import BATCHES, measured

def dying():
    yield from BATCHES[:11]
    os.kill(os.getpid(), signal.SIGKILL)

measured(LoraGAConfig, dying(), Checkpoint(sys.argv[1], "data", 0))
"""


@pytest.mark.slow
def test_after_kill_9_in_the_middle(tmp_path):
    path = tmp_path / "partial.safetensors"
    code = _VICTIM.replace(
        "Checkpoint(sys.argv[1]", "Checkpoint(__import__('pathlib').Path(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert path.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = measured(LoraGAConfig, BATCHES, Checkpoint(path, "data", 0))
    same(result, measured(LoraGAConfig, BATCHES))


def test_a_pass_whose_sums_cannot_be_saved_warns_once_and_goes_on(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("peft_gradinit.calibration.resume.save_file", full)
    checkpoint = Checkpoint(tmp_path / "partial.safetensors", every_seconds=0)
    with pytest.warns(
        UserWarning, match=r"cannot be saved \(.*No space left.*it goes on"
    ) as caught:
        found = measured(LoraGAConfig, BATCHES, checkpoint)
    assert len(caught) == 1
    same(found, measured(LoraGAConfig, BATCHES))
    assert list(tmp_path.iterdir()) == []
