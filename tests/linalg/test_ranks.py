"""Rank budgets: exact, optimal, deterministic."""

import itertools

import pytest
import torch

from peft_gradinit.errors import ShapeError
from peft_gradinit.linalg import allocate_ranks

SCORES = {
    "wide": torch.tensor([0.4, 0.3, 0.2, 0.1]),
    "narrow": torch.tensor([0.9, 0.05, 0.02, 0.01]),
    "flat": torch.tensor([0.25, 0.25, 0.25, 0.25]),
}


def kept(scores, ranks):
    return sum(sum(sorted(map(float, scores[n]), reverse=True)[:r]) for n, r in ranks.items())


def test_the_globally_largest_scores_are_kept():
    assert allocate_ranks(SCORES, 4) == {"wide": 2, "narrow": 1, "flat": 1}


@pytest.mark.parametrize("budget", range(13))
def test_the_budget_is_kept_exactly_and_layers_may_get_nothing(budget):
    assert sum(allocate_ranks(SCORES, budget).values()) == budget


@pytest.mark.parametrize(("least", "most"), [(0, 4), (1, 4), (0, 2), (1, 3)])
def test_no_other_allocation_within_the_limits_keeps_more(least, most):
    generator = torch.Generator().manual_seed(3)
    scores = {name: torch.rand(4, generator=generator) for name in "abc"}
    for budget in range(3 * least, 3 * most + 1):
        ranks = allocate_ranks(scores, budget, min_rank=least, max_rank=most)
        others = (
            dict(zip("abc", r, strict=True))
            for r in itertools.product(range(least, most + 1), repeat=3)
            if sum(r) == budget
        )
        assert all(least <= r <= most for r in ranks.values())
        assert kept(scores, ranks) == pytest.approx(max(kept(scores, r) for r in others))


COSTS = {"wide": 5, "narrow": 2, "flat": 3}


def test_with_costs_the_largest_scores_for_their_cost_are_kept():
    assert allocate_ranks(SCORES, 10, costs=COSTS) == {"wide": 0, "narrow": 2, "flat": 2}
    assert allocate_ranks(SCORES, 14, costs=COSTS) == {"wide": 0, "narrow": 1, "flat": 4}


@pytest.mark.parametrize("budget", range(10, 41))
def test_costs_never_exceed_the_budget_and_leave_less_than_a_rank(budget):
    ranks = allocate_ranks(SCORES, budget, costs=COSTS, min_rank=1)
    left = budget - sum(COSTS[name] * r for name, r in ranks.items())
    assert left >= 0
    assert min(ranks.values()) >= 1
    assert all(left < COSTS[name] for name, r in ranks.items() if r < 4)


def test_equal_costs_are_a_budget_of_ranks():
    same = dict.fromkeys(SCORES, 7)
    for budget in range(13):
        assert allocate_ranks(SCORES, 7 * budget, costs=same) == allocate_ranks(SCORES, budget)


@pytest.mark.parametrize("least", [0, 1])
def test_what_a_layer_costs_once_is_paid_by_those_that_get_ranks(least):
    once = {"wide": 3, "narrow": 9, "flat": 0}
    for budget in range(22, 53):
        ranks = allocate_ranks(SCORES, budget, costs=COSTS, once=once, min_rank=least)
        paid = sum(COSTS[name] * r + (once[name] if r else 0) for name, r in ranks.items())
        assert budget - max(c + once[name] for name, c in COSTS.items()) < paid <= budget
    with pytest.raises(ShapeError, match=rf"53 trained numbers.*between {22 * least} and 52"):
        allocate_ranks(SCORES, 53, costs=COSTS, once=once, min_rank=least)


def test_a_first_rank_that_is_dear_is_compared_with_those_that_follow():
    scores = {"dear": [10, 9.9], "cheap": [5.0] * 11}
    costs, once = {"dear": 10, "cheap": 10}, {"dear": 100, "cheap": 0}
    assert allocate_ranks(scores, 110, costs=costs, once=once) == {"dear": 0, "cheap": 11}
    scores["dear"] = [60.0] * 3  # 1.4 for a number, of all three together; one alone gives 0.55
    ranks = allocate_ranks(scores, 130, costs=costs, once=once)
    assert ranks == {"dear": 3, "cheap": 0}


def test_each_layer_may_have_a_least_rank_of_its_own():
    ranks = allocate_ranks(SCORES, 6, min_rank={"wide": 0, "narrow": 3, "flat": 1})
    assert ranks["narrow"] >= 3
    assert ranks["flat"] >= 1
    with pytest.raises(ShapeError, match=r"between 4 and 12 together \(min_rank=0, 1, 3\)"):
        allocate_ranks(SCORES, 3, min_rank={"wide": 0, "narrow": 3, "flat": 1})


def test_a_budget_that_costs_cannot_keep_is_named():
    with pytest.raises(ShapeError, match=r"9 trained numbers.*between 10 and 40"):
        allocate_ranks(SCORES, 9, costs=COSTS, min_rank=1)


def test_minimum_comes_before_scores():
    scores = {"rich": [9.0, 8.0, 7.0], "poor": [0.1, 0.1, 0.1]}
    assert allocate_ranks(scores, 4, min_rank=1) == {"rich": 3, "poor": 1}
    assert allocate_ranks(scores, 4, min_rank=2) == {"rich": 2, "poor": 2}


def test_ties_do_not_depend_on_the_order_of_the_layers():
    names = ["c", "a", "b"]
    for order in itertools.permutations(names):
        scores = {name: [1.0, 1.0, 1.0] for name in order}
        ranks = allocate_ranks(scores, 4)
        assert ranks == {"a": 2, "b": 1, "c": 1}
        assert list(ranks) == list(order)


def test_scores_need_not_be_sorted_nor_equally_many():
    assert allocate_ranks({"a": [0.1, 0.9], "b": [0.5]}, 2) == {"a": 1, "b": 1}
    assert allocate_ranks({"a": [0.1, 0.9], "b": [0.5]}, 3) == {"a": 2, "b": 1}


def test_equal_shares_give_a_uniform_allocation():
    scores = {name: torch.full((8,), 0.1) for name in "abcd"}
    assert set(allocate_ranks(scores, 16).values()) == {4}


@pytest.mark.parametrize(
    ("budget", "options"),
    [(-1, {}), (13, {}), (7, {"max_rank": 2}), (2, {"min_rank": 1})],
)
def test_impossible_budgets_are_refused_with_the_numbers(budget, options):
    with pytest.raises(ShapeError, match=f"budget of {budget} ranks .* 3 layers .* between"):
        allocate_ranks(SCORES, budget, **options)


@pytest.mark.parametrize("options", [{"min_rank": 5}, {"min_rank": 3, "max_rank": 2}])
def test_a_minimum_above_what_a_layer_can_have_is_refused(options):
    with pytest.raises(ShapeError, match=r"wide can have between 0 and \d ranks"):
        allocate_ranks(SCORES, 6, **options)


def test_nan_scores_are_refused_by_name():
    with pytest.raises(ShapeError, match="broken has a score that is NaN"):
        allocate_ranks({"fine": [1.0], "broken": [float("nan")]}, 1)
