"""Layers that are cut over processes measure what whole layers do, alone and in several replicas."""

import pytest

from tests.distributed.launch import launch
from tests.helpers import relative_error

MODULE = "tests.distributed.parallel"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("function", "size"), [("over_two", 2), ("over_two_by_two", 4)])
def test_factors_are_those_of_the_whole_model(function, size):
    ((_, whole),) = launch(MODULE, "whole", 1)
    results = launch(MODULE, function, size, timeout=400)
    assert [kind for kind, _ in results] == ["value"] * size, results
    for _, found in results:
        for name, want in whole.items():
            for module, (product, _) in want.items():
                assert relative_error(found[name][module][0], product) <= 1e-5, (name, module)
                assert found[name][module][1] == results[0][1][name][module][1]


def test_models_that_fsdp_loads_on_the_first_process_are_calibrated_alike():
    ((_, whole),) = launch(MODULE, "whole", 1)
    results = launch(MODULE, "loaded_by_the_first_alone")
    assert [kind for kind, _ in results] == ["value"] * 2, results
    for _, found in results:
        for module, (product, _) in whole["LoraGAConfig"].items():
            assert relative_error(found[module][0], product) <= 1e-5, module


def test_a_model_without_values_on_one_process_ends_both_with_an_error():
    (kind, said), (kind_1, said_1) = launch(MODULE, "on_meta_on_one")
    assert (kind, kind_1) == ("error", "error")
    assert "meta device" in said_1
    assert "process" in said
