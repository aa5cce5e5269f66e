"""What every need promises of its statistic, its readouts and its texts; a need is a row."""

import dataclasses

import pytest
import torch

from peft_gradinit.calibration import CalibrationResult, PassFacts
from peft_gradinit.calibration.needs import (
    NEEDS,
    Estimator,
    Gradients,
    Inputs,
    Measured,
    SecondMoments,
    Weights,
)
from peft_gradinit.errors import CalibrationError
from peft_gradinit.statistics import Fingerprint

ROWS = {
    "gradients": Gradients(),
    "gradients-twice": Gradients(per_rank=2),
    "gradients-kept": Gradients(keep_batches=True),
    "inputs": Inputs(),
    "inputs-raw": Inputs(centered=False, use_labels=False),
    "inputs-settling": Inputs(settle=0.99, per_rank=2),
    "moments": SecondMoments(),
    "weights": Weights(),
}
MEASURED = {name: need for name, need in ROWS.items() if isinstance(need, Measured)}
TRIPLETS = {name: need for name, need in MEASURED.items() if need.size(1)}
SHAPES = [(12, 20), (20, 12), (300, 340)]  # (out, in); the last is sketched

every_need = pytest.mark.parametrize("need", ROWS.values(), ids=ROWS)
measured = pytest.mark.parametrize("need", MEASURED.values(), ids=MEASURED)
with_triplets = pytest.mark.parametrize("need", TRIPLETS.values(), ids=TRIPLETS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def filled(need, shape, r=2, n=60, scale=1.0, estimator="sketch"):
    """A statistic of random tokens."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (scale * torch.randn(n, d, generator=generator) for d in (shape[1], shape[0]))
    statistic = need.accumulator(shape, need.size(r), Estimator(estimator))
    statistic.add(*((x, dy) if need.backward else (x,)))
    if need.backward:
        statistic.count(n)
    return statistic


def read(need, shape, r=2, **options):
    """Readouts of random tokens, and their energy."""
    statistic = filled(need, shape, r, **options)
    readouts = need.read(statistic, need.size(r))
    return readouts, need.energy(statistic, readouts)


def test_every_need_has_a_row():
    assert set(NEEDS.values()) == {type(need) for need in ROWS.values()}
    for name, kind in NEEDS.items():
        assert kind.statistic == name
        assert kind.title


# --- sizes ---------------------------------------------------------------------------------------


@measured
@every_shape
@pytest.mark.parametrize("estimator", ["sketch", "dense"])
def test_readouts_are_whole_at_every_rank_up_to_the_limit(need, shape, estimator):
    limit = need.rank_limit(shape)
    assert 1 <= limit <= max(shape)
    assert need.size(limit) <= (min(shape) if need.backward else shape[1])
    for r in {1, 3, min(limit, 20)}:
        readouts, _ = read(need, shape, r, estimator=estimator)
        assert need.is_whole(readouts, shape, need.size(r))
        assert need.shapes(shape, need.size(r)) == {k: (*t.shape,) for k, t in readouts.items()}
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in readouts.values())


@measured
def test_a_limit_leaves_no_room_for_one_rank_more(need):
    shape = SHAPES[0]
    room = min(shape) if need.backward else shape[1]
    assert need.size(need.rank_limit(shape) + 1) > room or need.size(1) == 0


@every_need
def test_what_is_read_of_no_layer_is_whole_only_where_nothing_is_measured(need):
    assert need.is_whole({}, SHAPES[0], need.size(2)) == (not need.reads_data)
    assert need.reads_data == isinstance(need, Measured)


@every_need
@every_shape
def test_readouts_of_another_size_layer_or_name_are_not_whole(need, shape):
    size = need.size(2)
    whole = read(need, shape)[0] if need.reads_data else {}
    for name, tensor in whole.items():
        for dim in range(tensor.ndim):
            if tensor.shape[dim] > 1:
                cut = tensor.narrow(dim, 0, tensor.shape[dim] - 1)
                assert not need.is_whole({**whole, name: cut}, shape, size), (name, dim)
        assert not need.is_whole({**whole, name: tensor[None]}, shape, size)
        assert not need.is_whole({k: t for k, t in whole.items() if k != name}, shape, size)
        assert not need.is_whole(whole, (shape[0], shape[1] + 1), size)
    assert not need.is_whole({**whole, "other": torch.ones(1)}, shape, size)
    if size:
        assert not need.is_whole(whole, shape, size + 1)
    if need.reads_data and need.backward:
        assert not need.is_whole(whole, (shape[0] + 1, shape[1]), size)


def test_more_components_than_a_layer_has_inputs_are_all_of_them():
    need, shape = Inputs(), (12, 5)
    readouts = need.read(filled(need, shape, r=9), 9)
    assert len(readouts["S"]) == 5
    assert need.is_whole(readouts, shape, 9)
    assert need.accumulator(shape, 9, Estimator(sketch_size=30)).width == 5  # enough for five


@measured
@every_shape
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_token_is_what_the_accumulator_takes(need, shape, device):
    statistic = need.accumulator(shape, need.size(2), Estimator())
    assert statistic.can_orient == (shape == SHAPES[-1] and not isinstance(need, SecondMoments))
    token = need.token(shape, torch.device(device))
    statistic.add(*token)
    assert {t.device.type for t in (*token, *statistic.tensors().values())} == {device}
    assert statistic.n_calls == 1


@measured
def test_the_options_of_the_estimator_reach_the_accumulator(need):
    if isinstance(need, SecondMoments):  # no sketch serves
        return
    pool = Estimator().pool
    statistic = need.accumulator((2000, 2000), 4, Estimator(sketch_size=99, seed=5, pool=pool))
    assert statistic.width == 99
    statistic.add(*need.token((2000, 2000), torch.device("cpu")))
    assert pool.n_bytes() > 0
    assert "seed 5" in statistic.describe()
    dense = need.accumulator((2000, 2000), 4, Estimator("dense"))
    assert not dense.can_orient


# --- scores and shares ---------------------------------------------------------------------------


@with_triplets
def test_scores_are_what_each_rank_adds_to_the_energy(need):
    shape, r = SHAPES[0], 5
    readouts, energy = read(need, shape, r)
    for allocation in need.allocations:
        if allocation == "uniform":
            continue
        scores = need.scores(readouts, energy, allocation)
        assert scores.shape == (r,)
        assert (scores.diff() <= 0).all()
        assert (scores > 0).all()
        share = need.captured(readouts, r, energy)
        whole = energy if allocation == "gradient_energy" else 1.0
        assert scores.sum().item() == pytest.approx(share * whole, rel=1e-5)
        captured = [need.captured(readouts, k, energy) * whole for k in range(1, r + 1)]
        torch.testing.assert_close(scores.cumsum(0).tolist(), captured, rtol=1e-5, atol=0)


@with_triplets
def test_an_odd_triplet_makes_no_rank(need):
    readouts, energy = read(need, SHAPES[0], 4)
    cut = {**readouts, "S": readouts["S"][:-1]}
    n = (4 * need.per_rank - 1) // need.per_rank
    scores = need.scores(readouts, energy, "explained_variance")
    assert torch.equal(need.scores(cut, energy, "explained_variance"), scores[:n])


@with_triplets
def test_without_energy_scores_are_finite(need):
    readouts = {"S": torch.zeros(need.size(3))}
    assert torch.equal(need.scores(readouts, 0.0, "explained_variance"), torch.zeros(3).double())


@every_need
def test_needs_that_serve_no_allocation_say_so(need):
    assert need.allocations[0] == "uniform"
    if len(need.allocations) == 1:
        with pytest.raises(NotImplementedError, match="serves no rank_allocation='explained_var"):
            need.scores({}, 1.0, "explained_variance")


@measured
@every_shape
def test_captured_is_a_share_that_grows_with_the_rank(need, shape):
    readouts, energy = read(need, shape, r=6)
    shares = [need.captured(readouts, r, energy) for r in (0, 1, 2, 4, 6, 100)]
    if need.size(1) == 0:
        assert shares == [None] * 6
        return
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 0 < shares[1] < shares[2] < shares[-1] <= 1
    # An energy that is an estimate may be too small.
    assert need.captured(readouts, 6, energy / 1e6) == 1


@measured
def test_the_energy_is_what_all_readouts_sum_to(need):
    shape = (20, 12)
    readouts, energy = read(need, shape, need.rank_limit(shape), estimator="dense")
    total = readouts["S"].square().sum() if "S" in readouts else readouts["C"].trace()
    assert total.item() == pytest.approx(energy, rel=1e-5)


# --- reasons against a layer ---------------------------------------------------------------------


@measured
@every_shape
def test_a_filled_statistic_has_no_failure(need, shape):
    assert need.failure("q", filled(need, shape), "it never ran", 3) is None


FAILURES = {
    "gradients": "its gradient is zero over 3 batches",
    "inputs": "its inputs are constant over 60 tokens",
    "inputs-raw": "its inputs are zero over 60 tokens",
    "moments": "its inputs are zero over 60 tokens",
}


@pytest.mark.parametrize("row", FAILURES)
@every_shape
def test_a_statistic_of_zeros_fails_with_its_reason(row, shape):
    statistic = filled(ROWS[row], shape, scale=0.0)
    assert ROWS[row].failure("q", statistic, "it never ran", 3) == FAILURES[row]


@measured
def test_a_layer_that_never_ran_fails_with_the_reason_given(need):
    statistic = need.accumulator(SHAPES[0], need.size(2), Estimator())
    reason = need.failure("q", statistic, "it never ran", 3)
    assert reason == "it never ran" + (", or the loss does not use it" if need.backward else "")


def test_a_layer_of_which_no_token_counted_says_so():
    for need in (Inputs(), SecondMoments()):
        statistic = filled(need, SHAPES[0], n=0)
        reason = need.failure("q", statistic, "it never ran", 3)
        assert reason == "none of its tokens carries loss in 3 batches"


@measured
@every_shape
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_that_names_the_layer(need, shape, scale):
    what = "gradient of q is" if need.backward else "inputs of q are"
    with pytest.raises(CalibrationError, match=f"the {what} not finite .*bfloat16 or float32"):
        need.failure("q", filled(need, shape, scale=scale), "it never ran", 3)


# --- files ---------------------------------------------------------------------------------------


@measured
def test_a_need_survives_a_file_with_its_readouts(need, tmp_path):
    shape, size = SHAPES[0], need.size(2)
    readouts, energy = read(need, shape)
    result = CalibrationResult(
        readouts={"q": readouts},
        energy={"q": energy},
        failures={"k": "it never ran"},
        fingerprint=Fingerprint(
            need.statistic, {}, {n: [*shape, size] for n in "qk"}, need.options()
        ),
        facts=PassFacts(3, 12, 100, 90.0, None, 2.0, 10, 20, "end of data"),
        need=need,
    )
    loaded = CalibrationResult.load(result.save(tmp_path))
    assert loaded.need == need
    assert type(loaded.need) is type(need)
    assert loaded.need.is_whole(loaded.readouts["q"], shape, size)
    assert all(torch.equal(readouts[k], t) for k, t in loaded.readouts["q"].items())
    assert dataclasses.replace(loaded, readouts={}) == dataclasses.replace(result, readouts={})


@every_need
def test_options_are_what_shapes_the_measurement(need):
    if type(need) is Inputs:
        own = {"centered": need.centered, "use_label_mask": need.use_labels}
    else:
        own = {}
    assert need.options() == own
