"""The LoRA-One paper's matrix sensing, one seed of `scripts/matrix_sensing.py`.

Bounds are within a factor of two of what was measured: float64 and seeded, so only the rounding of
another BLAS may move it. Risks near 1e-30 are nothing but rounding and get more room.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "matrix_sensing.py"
ROUNDING = 1e-27
"""Far above the squared float64 rounding of 10,000 entries below 1, far below all else."""


@pytest.fixture(scope="module")
def risks():
    spec = importlib.util.spec_from_file_location("matrix_sensing", SCRIPT)
    script = sys.modules["matrix_sensing"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.run(0)


def test_the_spectral_start_finds_the_target_and_lora_is_behind(risks):
    spectral, lora = risks["LoRA-One (spectral)"], risks["LoRA"]
    assert 1.3e-12 < spectral["gradient descent"] < 5e-12  # measured 2.7e-12
    assert 2.5e-7 < lora["gradient descent"] < 1e-6  # 5.1e-7
    assert spectral["floor"] < ROUNDING


@pytest.mark.parametrize("start", ["LoRA", "LoRA-One (spectral)"])
def test_preconditioned_both_find_it_to_rounding(risks, start):
    assert risks[start]["preconditioned"] < ROUNDING


@pytest.mark.parametrize("descent", ["gradient descent", "preconditioned"])
def test_lora_ga_ends_at_the_floor_that_its_subtraction_sets(risks, descent):
    found = risks["LoRA-GA, ArB2r"]
    assert 0.041 < found["floor"] < 0.0435  # 0.0422
    assert 1.03 * found["floor"] < found[descent] < 1.06 * found["floor"]  # 1.044


@pytest.mark.parametrize("descent", ["gradient descent", "preconditioned"])
def test_the_other_direction_has_no_floor_in_this_problem(risks, descent):
    """The gradient has the target's column space, and `B0` is from there."""
    found = risks["LoRA-GA, A2rBr"]
    assert found["floor"] < ROUNDING
    assert found[descent] < ROUNDING


@pytest.mark.parametrize(
    ("descent", "measured"), [("gradient descent", 2.13e-4), ("preconditioned", 2.6e-10)]
)
def test_without_the_subtraction_there_is_no_floor(risks, descent, measured):
    found = risks["LoRA-GA, ArB2r, without subtraction"]
    assert found["floor"] < ROUNDING
    assert measured / 2 < found[descent] < 2 * measured
