"""Experts that only one of two processes reaches are measured as by one process."""

import pytest

from tests.distributed.launch import launch
from tests.helpers import relative_error
from tests.moe import two_processes

MODULE = "tests.moe.two_processes"


@pytest.mark.slow
def test_experts_that_one_process_reaches_alone():
    by_sequence = [two_processes.reached(batch) for batch in two_processes.batches()]
    halves = [by_sequence[0] | by_sequence[2], by_sequence[1] | by_sequence[3]]
    assert halves[0] != halves[1], "every process reaches the same experts: nothing is shown"
    reference = two_processes.measured()
    results = launch(MODULE, "measured", 2)
    assert [kind for kind, _ in results] == ["value"] * 2, results
    (_, one), (_, other) = results
    for method, (energy, failures, products) in reference.items():
        assert one[method][1] == other[method][1]
        assert one[method][1].keys() == failures.keys()
        assert one[method][2].keys() == products.keys()
        for name, (product, _) in products.items():
            assert one[method][0][name] == pytest.approx(energy[name], rel=1e-4), name
            assert relative_error(one[method][2][name][0], product) < 1e-3, name
            assert one[method][2][name][1] == other[method][2][name][1], name
