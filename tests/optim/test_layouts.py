"""Two processes take the steps of one; layouts in which they cannot are refused by name."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from peft_gradinit.errors import ConfigError
from peft_gradinit.optim import LoraMuon, groups
from tests.distributed.launch import launch
from tests.optim.rows import ROWS, toy

MODULE = "tests.optim.two_processes"


def values(function):
    results = launch(MODULE, function, timeout=200)
    assert [kind for kind, _ in results] == ["value"] * 2, results
    one, other = (value for _, value in results)
    assert one == other
    return one


@pytest.fixture(scope="module")
def several():
    return values("several")


def test_ddp_is_one_process_bit_for_bit(several):
    assert several["ddp"] == dict.fromkeys(ROWS, 0.0)


def test_fsdp2_is_one_process(several):
    """With empty parts and uneven ones."""
    assert several["fsdp2_made_after"].keys() == ROWS.keys()
    assert max(several["fsdp2_made_after"].values()) <= 1e-6


def test_an_optimizer_that_lost_its_parameters_says_so(several):
    assert "sharded after the optimiser was made" in several["fsdp2_stale"]


def test_other_layouts_are_refused_by_name(several):
    messages = several["refused"]
    assert "cut by rows, got placements (Shard(dim=1),)" in messages["columns"]
    assert "does not work under FSDP1" in messages["FSDP1 after"]
    assert "Nor does it under FSDP1" in messages["FSDP1 before"]


@pytest.mark.slow
def test_tensor_parallelism_is_refused_by_name():
    assert "under tensor parallelism" in values("tensor_parallel")


@pytest.mark.slow
def test_fsdp2_in_other_forms():
    """Anchored, experts, copies of parts, bfloat16; resumed; made before the sharding."""
    found = values("more")
    for name in ("fsdp2_anchored", "fsdp2_experts", "fsdp2_hybrid"):
        difference, moved = found[name]
        assert difference <= 1e-6 < 1e-3 < moved, name
    with_state = {name for name, row in ROWS.items() if row.state}
    assert found["fsdp2_resumed"] == dict.fromkeys(with_state, 0.0)
    for name in ("fsdp2_bfloat16", "fsdp2_made_before"):
        assert found[name].keys() == ROWS.keys()
        assert max(found[name].values()) <= 1e-6, name


def test_deepspeed_is_refused_by_what_accelerate_says(monkeypatch):
    state = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    monkeypatch.setattr(groups, "is_initialized", lambda: True)
    monkeypatch.setattr(groups, "AcceleratorState", lambda: state)
    with pytest.raises(ConfigError, match=r"does not work under DeepSpeed, .* train with DDP"):
        LoraMuon(toy(), lr=0.1)


def test_models_that_zero_3_has_partitioned_are_refused():
    model = toy()
    next(model.parameters()).ds_id = 0
    with pytest.raises(ConfigError, match="does not work under DeepSpeed"):
        LoraMuon(model, lr=0.1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is missing")
def test_zero_is_refused_by_the_optimizer_that_it_was_given():
    results = launch(MODULE, "zero_2", timeout=200)
    assert all("DeepSpeed, whose ZeRO" in str(value) for _, value in results), results


def test_the_factors_of_a_tensor_without_a_mesh_are_whole():
    """Nothing is sent in one process."""
    model = toy()
    LoraMuon(model, lr=0.1)
    assert not torch.distributed.is_initialized()
