"""Two processes give the answer of one, whatever the loader; a failure on one fails on all."""

import pytest
import torch

from tests.distributed import plain
from tests.distributed.launch import launch
from tests.helpers import relative_error

MODULE = "tests.distributed.plain"


def values(function, size=2):
    results = launch(MODULE, function, size)
    assert [kind for kind, _ in results] == ["value"] * size, results
    return [value for _, value in results]


def check_same(one, other, reference, tolerance):
    """Both processes have the reference's products, and the same bytes."""
    assert one.keys() == reference.keys()
    for name, (product, _) in reference.items():
        assert relative_error(one[name][0], product) <= tolerance, name
        assert one[name][1] == other[name][1], name


@pytest.mark.slow
def test_every_kind_of_loader_gives_the_factors_of_one_process():
    (reference,) = values("reference", 1)
    one, other = values("all_loaders")
    tokens = sum(len(row) for row in plain.rows())
    assert one.keys() == plain.LOADERS.keys()
    for kind in one:
        assert one[kind][1:] == other[kind][1:] == (tokens, plain.N), kind
        check_same(one[kind][0], other[kind][0], reference, 1e-5)


@pytest.mark.slow
def test_sketches_are_oriented_by_the_same_sequences():
    (reference,) = values("sketched_reference", 1)
    one, other = values("sketched")
    for config_cls in plain.CONFIGS:
        name = config_cls.__name__
        # Rounding over the gap at the last singular value that is kept.
        check_same(one[name], other[name], reference[name], 2e-4)
        for module, energy in reference[name, "energy"].items():
            assert one[name, "energy"][module] == pytest.approx(energy, rel=1e-4)


@pytest.mark.slow
def test_the_adapter_starts_and_trains_under_ddp_as_in_one_process():
    (reference,) = values("trained", 1)
    one, other = values("trained")
    for name, want in reference.items():
        assert one[name]["losses"] == pytest.approx(want["losses"], rel=1e-5), name
        assert one[name]["facts"] == want["facts"]
        for parameter in want["adapter"]:
            assert torch.equal(one[name]["adapter"][parameter], other[name]["adapter"][parameter])
    assert one["LoraOneConfig"]["step"] == pytest.approx(
        reference["LoraOneConfig"]["step"], rel=1e-5
    )
    assert one["LoraOneConfig"]["step"] == other["LoraOneConfig"]["step"]


@pytest.mark.slow
def test_a_failure_on_one_process_ends_both():
    one, other = values("failures")
    assert "failed on process 1 of 2: ValueError: no such luck" in one["one_raises_in_the_loss"]
    assert other["one_raises_in_the_loss"] == "ValueError: no such luck"
    assert "failed on process 1 of 2: OSError: disk gone" in one["one_raises_in_the_data"]
    assert other["one_raises_in_the_data"] == "OSError: disk gone"
    for said in (one, other):
        assert "gave no batch on process 1 of 2" in said["one_has_no_data"]


@pytest.mark.slow
def test_a_killed_process_ends_the_other():
    (kind, said), killed = launch(MODULE, "one_is_killed")
    assert killed == ("killed", -9)
    assert kind == "error"
    assert "process 0 of 2 lost another one during the calibration" in said


@pytest.mark.slow
def test_a_process_that_does_not_come_is_not_waited_for_without_end():
    (kind, said), (kind_1, _) = launch(MODULE, "one_does_not_come")
    assert (kind, kind_1) == ("error", "value")
    assert "process 0 of 2 waited 0:00:05 for the others to begin" in said


@pytest.mark.slow
def test_a_harmful_step_is_scaled_alike_on_all_processes():
    one, other = values("a_harmful_step_is_scaled_alike")
    assert one == other
    assert one.scale < 1
    assert one.loss_after <= one.loss_before


@pytest.mark.slow
def test_processes_find_the_same_rate_for_a_head():
    (reference,) = values("suggested_head_rate", 1)
    one, other = values("suggested_head_rate")
    assert one == other
    assert max(one) > 1e-2  # that of the adapter
    assert one == pytest.approx(reference, rel=0.1)  # from half as many rows


def test_the_callback_gives_the_start_and_the_losses_of_one_process():
    (reference,) = values("by_callback", 1)
    one, other = values("by_callback")
    for name, (start, losses, n_sequences) in reference.items():
        assert one[name][2] == other[name][2] == n_sequences == 36
        assert one[name][1] == pytest.approx(losses, rel=1e-4), name
        for parameter, want in start.items():
            assert torch.equal(one[name][0][parameter], other[name][0][parameter])
            assert relative_error(one[name][0][parameter], want) <= 1e-3, parameter


@pytest.mark.slow
def test_ranks_and_targets_from_data_come_before_fsdp2_shards():
    (reference,) = values("by_callback", 1)
    start, losses, n_sequences = reference["auto"]
    for found in values("by_callback_under_fsdp2"):
        got, losses_there, n_there = found["auto"]
        assert n_there == n_sequences
        assert got.keys() == start.keys()
        for parameter, want in start.items():
            assert got[parameter].shape == want.shape, parameter
            assert relative_error(got[parameter], want) <= 1e-3, parameter
        assert losses_there == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_a_model_that_only_one_process_has_loaded_is_refused_before_fsdp2_shards_it():
    for kind, text in launch(plain.__name__, "loaded_on_the_first_alone"):
        assert kind == "error"
        assert "processes have other weights (" in text
        assert "calibrate first" in text
