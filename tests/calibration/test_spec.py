"""Options of a `Calibration`, and results kept in files."""

import copy
import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

from peft_gradinit import Calibration, CalibrationResult
from peft_gradinit.errors import ConfigError, FingerprintError
from tests.calibration.passes import measure
from tests.helpers import pico_llama, token_batches

DATA = [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, r"Calibration\(data=None\) has nothing to read; pass a DataLoader"),
        ({"estimator": "sketsh"}, "estimator must be 'sketch' or 'dense', got 'sketsh'"),
        ({"max_tokens": -1}, "max_tokens must be a positive integer, got -1"),
        ({"max_tokens": 0}, "max_tokens must be a positive integer, got 0"),
        ({"max_tokens": 1e4}, "max_tokens must be a positive integer, got 10000.0"),
        ({"max_batches": -3}, "max_batches must be a positive integer, got -3"),
        ({"max_batches": True}, "max_batches must be a positive integer, got True"),
        ({"sketch_size": 0}, "sketch_size must be a positive integer, got 0"),
        ({"batch_size": None}, "batch_size must be a positive integer, got None"),
        ({"batch_size": "8"}, "batch_size must be a positive integer, got '8'"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"loss_fn": "loss"}, "loss_fn must be a function, got 'loss'"),
        ({"collate_fn": 1}, "collate_fn must be a function, got 1"),
        ({"data": DataLoader([1]), "collate_fn": list}, "a DataLoader gives batches"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Calibration(**{"data": DATA, **options})


def test_options_are_keywords_and_frozen():
    with pytest.raises(TypeError):
        Calibration(DATA, 100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Calibration(DATA).seed = 1


def test_of_wraps_data_and_keeps_a_calibration():
    calibration = Calibration(DATA)
    assert Calibration.of(calibration) is calibration
    assert Calibration.of(DATA).data is DATA


def test_copies_share_the_data():
    calibration = Calibration(token_batches())
    assert copy.deepcopy({"a": calibration})["a"] is calibration


def test_only_options_that_were_set_are_demanded_of_a_saved_result():
    assert Calibration(DATA).demanded_options() == {}
    assert Calibration(DATA, seed=3, batch_size=2).demanded_options() == {"seed": 3}
    options = Calibration(DATA, max_batches=2, estimator="dense").demanded_options()
    assert options == {"max_tokens": None, "max_batches": 2, "estimator": "dense"}


@pytest.fixture(scope="module")
def result():
    return measure(pico_llama(), token_batches(), max_batches=2)


@pytest.mark.parametrize("name", ["folder", "folder/mine.safetensors"])
def test_result_comes_back_from_its_file(name, result, tmp_path):
    written = result.save(tmp_path / name)
    assert written.is_file()
    loaded = CalibrationResult.load(tmp_path / name)
    assert loaded.facts == result.facts
    assert loaded.energy == result.energy
    assert loaded.failures == result.failures
    loaded.fingerprint.check(result.fingerprint)
    assert loaded.triplets.keys() == result.triplets.keys()
    for name, svd in result.triplets.items():
        assert all(torch.equal(a, b) for a, b in zip(loaded.triplets[name], svd, strict=True))


def test_failures_come_back_from_the_file(result, tmp_path):
    failed = dataclasses.replace(result, failures={"x": "it never ran"})
    assert CalibrationResult.load(failed.save(tmp_path)).failures == {"x": "it never ran"}


def test_data_may_be_a_result_or_its_path(result, tmp_path):
    assert Calibration(result).saved_result() is result
    path = result.save(tmp_path)
    for value in (path, str(path), tmp_path):
        assert Calibration(value).saved_result().facts == result.facts
    assert Calibration(DATA).saved_result() is None


def test_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(FingerprintError, match=r"cannot read a calibration from .*nowhere"):
        Calibration(str(tmp_path / "nowhere")).saved_result()
    with pytest.raises(FingerprintError, match=r"calibration\.safetensors"):
        CalibrationResult.load(tmp_path)
