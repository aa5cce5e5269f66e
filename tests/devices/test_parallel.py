"""Several processes on accelerators: one answer, whatever is where, and never a hang."""

import pytest

from tests.devices import parallel
from tests.devices.collectives import BACKEND
from tests.devices.models import worst
from tests.distributed.launch import launch
from tests.methods.rows import with_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def every() -> list[dict]:
    results = launch("tests.devices.parallel", "everything", parallel.N_PROCESSES, backend=BACKEND)
    assert [kind for kind, _ in results] == ["value"] * parallel.N_PROCESSES, results
    return [value for _, value in results]


@pytest.fixture(scope="module")
def alone() -> dict:
    return parallel.everything()


@with_data
@pytest.mark.parametrize("case", ["few_targets", "over_devices", "branches", "starts"])
def test_all_processes_have_the_answer_of_one(case, method, every, alone):
    found = [values[case][method] for values in every]
    assert all(worst(of, found[0]) == 0.0 for of in found)
    if case != "starts":  # factors turn where singular values are near each other
        assert worst(found[0], alone[case][method]) < 2e-3
