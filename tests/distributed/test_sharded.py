"""Sharded models start and train as whole ones do: the same losses, step by step."""

import importlib.util

import pytest

from tests.distributed import sharded
from tests.distributed.launch import launch
from tests.helpers import relative_error

MODULE = "tests.distributed.sharded"
pytestmark = pytest.mark.slow


def values(function, size=2):
    results = launch(MODULE, function, size, timeout=400)
    assert [kind for kind, _ in results] == ["value"] * size, results
    return [value for _, value in results]


@pytest.fixture(scope="module")
def whole():
    return values("run_whole", 1)[0]


@pytest.mark.parametrize("function", ["run_fsdp2", "run_fsdp1", "run_native", "run_zero3"])
def test_losses_are_those_of_the_whole_model(function, whole):
    if function == "run_zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; scripts/test -m slow installs it")
    one, other = values(function)
    assert one == other
    assert {name for _, name in one} == {c.__name__ for c in sharded.CONFIGS}
    for (layout, name), losses in one.items():
        reference = "deferred_whole" if layout.startswith("deferred") else "whole"
        assert losses == pytest.approx(whole[reference, name], abs=2e-6), (layout, name)


def test_what_fsdp_saves_is_the_adapter_of_the_whole_model():
    ((losses, want),) = values("saved_whole", 1)
    (losses_of_parts, entries), _ = values("saved_by_fsdp2")
    assert losses_of_parts == pytest.approx(losses, abs=2e-6)
    assert entries.keys() == want.keys()
    for name, tensor in want.items():
        assert relative_error(entries[name], tensor) <= 1e-3, name
