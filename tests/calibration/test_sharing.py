"""Layers share a statistic exactly as long as everything they were given was the same."""

import torch

from peft_gradinit.calibration.passes.sharing import LayerStatistics
from peft_gradinit.statistics import DenseInputs

IN = 6


def shared(*names):
    empty = DenseInputs(IN)
    return LayerStatistics(dict.fromkeys(names, empty))


def run(statistics, *calls):
    """One forward: `(layer, tensor)` in the order of the calls."""
    for name, x in calls:
        statistics.add(name, x, lambda x: x)
    statistics.forget()


def alone(*parts):
    statistic = DenseInputs(IN)
    for part in parts:
        statistic.add(part)
    return statistic


def same(a, b):
    return a.n_tokens == b.n_tokens and all(
        torch.allclose(a.tensors()[k], b.tensors()[k], atol=1e-5) for k in b.tensors()
    )


def test_layers_with_the_same_tensors_are_computed_once():
    statistics, x, y, z = shared("q", "k", "v", "o"), *torch.randn(3, 5, IN)
    run(statistics, ("q", x), ("k", x), ("v", x), ("o", y))
    run(statistics, ("q", z), ("k", z), ("v", z), ("o", x))

    assert statistics["q"] is statistics["k"] is statistics["v"]
    assert len(statistics.distinct()) == 2
    assert statistics["q"].n_calls == 2
    assert same(statistics["q"], alone(x, z))
    assert same(statistics["o"], alone(y, x))


def test_layers_that_differ_later_part_with_what_they_had_in_common():
    statistics, x, y, z = shared("a", "b"), *torch.randn(3, 5, IN)
    run(statistics, ("a", x), ("b", x))
    run(statistics, ("a", y), ("b", z))
    run(statistics, ("a", x), ("b", x))  # the same again, but they no longer have one history

    assert same(statistics["a"], alone(x, y, x))
    assert same(statistics["b"], alone(x, z, x))


def test_a_layer_that_sits_out_keeps_what_it_had():
    statistics, x, y = shared("a", "b", "idle"), *torch.randn(2, 5, IN)
    run(statistics, ("a", x), ("b", x))
    run(statistics, ("a", y))

    assert same(statistics["a"], alone(x, y))
    assert same(statistics["b"], alone(x))
    assert statistics["idle"].n_calls == 0


def test_a_layer_that_runs_twice_counts_twice_and_harms_no_other():
    statistics, x, y = shared("a", "b", "c"), *torch.randn(2, 5, IN)
    run(statistics, ("a", x), ("a", y), ("b", x), ("c", x), ("c", x))

    assert same(statistics["a"], alone(x, y))
    assert same(statistics["b"], alone(x))
    assert same(statistics["c"], alone(x, x))


def test_equal_values_are_not_the_same_tensor_but_give_the_same_sums():
    statistics, x = shared("a", "b"), torch.randn(5, IN)
    run(statistics, ("a", x), ("b", x.clone()))

    assert statistics["a"] is not statistics["b"]
    assert same(statistics["a"], statistics["b"])


def test_a_tensor_that_was_written_to_is_another():
    statistics, x = shared("a", "b", "c"), torch.randn(5, IN)
    before = x.clone()
    statistics.add("a", x, lambda x: x)
    x.mul_(2)
    run(statistics, ("b", x), ("c", x))

    assert same(statistics["a"], alone(before))
    assert same(statistics["b"], alone(x))
    assert statistics["b"] is statistics["c"]


def test_views_of_one_storage_are_told_apart():
    statistics, x = shared("a", "b", "c"), torch.randn(10, IN)
    run(statistics, ("a", x), ("b", x[:5]), ("c", x[5:]))

    assert [statistics[n].n_tokens for n in "abc"] == [10, 5, 5]


def test_inference_tensors_are_never_taken_for_the_same():
    statistics = shared("a", "b")
    with torch.inference_mode():
        x = torch.randn(5, IN)
    run(statistics, ("a", x), ("b", x))

    assert statistics["a"] is not statistics["b"]
    assert same(statistics["a"], statistics["b"])


def test_tensors_are_released_at_the_end_of_a_forward():
    statistics, x = shared("a", "b"), torch.randn(5, IN)
    statistics.add("a", x, lambda x: x)
    assert any(added.x is x for added in statistics._recent)
    statistics.forget()
    assert not statistics._recent
