"""The LoRA-One paper's matrix sensing, one seed of `scripts/matrix_sensing.py`."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "matrix_sensing.py"


@pytest.fixture(scope="module")
def risks():
    spec = importlib.util.spec_from_file_location("matrix_sensing", SCRIPT)
    script = sys.modules["matrix_sensing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.run(0)


def test_the_spectral_start_finds_the_target_and_lora_is_behind(risks):
    spectral, lora = risks["LoRA-One (spectral)"], risks["LoRA"]
    assert spectral["gradient descent"] < 1e-9
    assert lora["gradient descent"] > 1e3 * spectral["gradient descent"]
    assert spectral["floor"] < 1e-20


def test_the_preconditioned_spectral_start_finds_it_to_rounding(risks):
    assert risks["LoRA-One (spectral)"]["preconditioned"] < 1e-20


@pytest.mark.parametrize("descent", ["gradient descent", "preconditioned"])
def test_lora_ga_ends_at_the_floor_that_its_subtraction_sets(risks, descent):
    found = risks["LoRA-GA"]
    assert found["floor"] > 1e-2
    assert found["floor"] * (1 - 1e-9) <= found[descent] <= 1.1 * found["floor"]


@pytest.mark.parametrize("descent", ["gradient descent", "preconditioned"])
def test_without_the_subtraction_there_is_no_floor(risks, descent):
    found = risks["LoRA-GA without subtraction"]
    assert found["floor"] < 1e-20
    assert found[descent] < risks["LoRA-GA"][descent] / 20
