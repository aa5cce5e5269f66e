"""Which accumulator is chosen for a layer, how wide its sketch is, and what layers share."""

import pytest
import torch

from peft_gradinit.errors import ShapeError
from peft_gradinit.linalg import draw_test_matrix
from peft_gradinit.statistics import (
    DenseGradient,
    DenseInputs,
    SketchedGradient,
    SketchedInputs,
    TestMatrixPool,
    gradient_statistic,
    input_statistic,
)
from peft_gradinit.statistics.gradient_sketch import N_RANDOM_COLUMNS

CHOICES = {
    "gradient": (gradient_statistic, DenseGradient, SketchedGradient),
    "inputs": (lambda shape, **options: input_statistic(shape[1], **options), DenseInputs,
               SketchedInputs),
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", CHOICES)


def chosen(kind, shape, **options):
    defaults = {"rank": 8, "estimator": "sketch", "sketch_size": None, "seed": 0}
    return CHOICES[kind][0](shape, **{**defaults, "pool": TestMatrixPool(), **options})


def is_dense(kind, statistic):
    _, dense, sketch = CHOICES[kind]
    assert type(statistic) in {dense, sketch}
    return type(statistic) is dense


def add(kind, statistic, shape, n=2):
    x, dy = torch.randn(n, shape[1]), torch.randn(n, shape[0])
    statistic.add(*((x, dy) if kind == "gradient" else (x,)))


@pytest.mark.parametrize(
    ("kind", "rank", "width"),
    [
        *[("gradient", rank, width) for rank, width in ((1, 52), (4, 64), (16, 112), (64, 208))],
        *[("inputs", rank, 2 * rank + 80) for rank in (2, 8, 64)],
    ],
)
def test_the_default_width_grows_with_the_rank_and_another_can_be_chosen(kind, rank, width):
    assert chosen(kind, (4096, 4096), rank=rank).width == width
    assert chosen(kind, (4096, 4096), rank=rank, sketch_size=106).width == 106


@every_kind
def test_dense_can_be_asked_for_and_needs_no_width(kind):
    assert is_dense(kind, chosen(kind, (4096, 4096), estimator="dense", sketch_size=1))


@pytest.mark.parametrize(
    ("kind", "shape", "dense"),
    [
        # Rank 8: width 80, of which 40 are oriented, is 120 (out + in) floats.
        ("gradient", (240, 240), True),
        ("gradient", (241, 241), False),
        ("gradient", (16, 100_000), True),
        # Width 96, of which 72 are oriented, is 168 in floats.
        ("inputs", (16, 168), True),
        ("inputs", (16, 169), False),
    ],
)
def test_dense_is_chosen_where_it_is_smaller(kind, shape, dense):
    assert is_dense(kind, chosen(kind, shape)) == dense


@every_kind
@pytest.mark.parametrize("shape", [(40, 40), (250, 400), (320, 320), (200, 2000)], ids=str)
def test_what_is_chosen_never_holds_more_than_the_whole_matrix(kind, shape):
    statistic, whole = chosen(kind, shape), chosen(kind, shape, estimator="dense")
    add(kind, whole, shape)
    add(kind, statistic, shape)
    statistic.orient()
    add(kind, statistic, shape)
    assert statistic.n_bytes() <= whole.n_bytes()


LEAST = [("gradient", 4, 48), ("gradient", 16, 48), ("gradient", 64, 72), ("inputs", 8, 32)]
DEFAULTS = {("gradient", 4): 64, ("gradient", 16): 112, ("gradient", 64): 208, ("inputs", 8): 96}


@pytest.mark.parametrize(("kind", "rank", "least"), LEAST)
def test_a_sketch_size_too_small_for_the_rank_raises_with_the_least_and_the_default(
    kind, rank, least
):
    default = DEFAULTS[kind, rank]
    what = {"gradient": "triplets", "inputs": "components"}[kind]
    for size in (8, least - 1):
        message = rf"sketch_size={size} .* {rank} {what}.* {least}, and {default} is"
        with pytest.raises(ShapeError, match=message):
            chosen(kind, (4096, 4096), rank=rank, sketch_size=size)


@pytest.mark.parametrize(("kind", "rank", "least"), LEAST)
def test_the_least_sketch_size_works(kind, rank, least):
    statistic = chosen(kind, (400, 300), rank=rank, sketch_size=least)
    assert not is_dense(kind, statistic)
    for _ in range(2):
        add(kind, statistic, (400, 300), n=200)
        statistic.orient()
    factors = statistic.triplets(rank) if kind == "gradient" else statistic.components(rank)
    assert factors.Vh.shape == (rank, 300)


@pytest.mark.parametrize(("kind", "share"), [("gradient", 10), ("inputs", 20)])
def test_at_width_4096_and_rank_16_a_sketch_holds_a_small_share_of_the_matrix(kind, share):
    shape = (4096, 4096)
    statistic = chosen(kind, shape, rank=16)
    assert not is_dense(kind, statistic)
    for _ in range(2):
        add(kind, statistic, shape)
        assert 0 < statistic.n_bytes() <= 4 * 4096 * 4096 // share
        statistic.orient()
    assert set(statistic.oriented_names) <= statistic.tensors().keys()
    assert statistic.n_bytes() <= 4 * 4096 * 4096 // share
    # No tensor hides more memory behind a view.
    held = sum(t.untyped_storage().nbytes() for t in statistic.tensors().values())
    assert held == statistic.n_bytes()


@every_kind
def test_a_sketch_of_a_wide_layer_is_cheap_even_without_data(kind):
    # Zeros of this shape would be 40 GB.
    statistic = chosen(kind, (100_000, 100_000), rank=1, sketch_size=48)
    factors = statistic.triplets(1) if kind == "gradient" else statistic.components(1)
    assert factors[-2 if kind == "gradient" else -1].item() == 0.0
    assert statistic.n_bytes() == 0


def test_the_oriented_columns_of_gradients_leave_forty_random_ones_and_a_third_at_least():
    for width in (48, 60, 112, 400):
        statistic = chosen("gradient", (4096, 4096), sketch_size=width)
        assert statistic.n_oriented == min(width - 40, 2 * width // 3)
        assert width - statistic.n_oriented >= N_RANDOM_COLUMNS == 40


def test_layers_of_a_pass_share_their_test_matrices():
    pool = TestMatrixPool()
    for shape in [(512, 384), (512, 384), (640, 384)]:
        add("gradient", chosen("gradient", shape, pool=pool), shape)
    # One input width; two output widths.
    assert pool.n_bytes() == 4 * 80 * (384 + 512 + 640)


def test_a_pool_gives_the_same_tensor_for_the_same_request_and_another_for_another():
    pool = TestMatrixPool()
    first = pool.get(50, 16, 3, "cpu")
    assert pool.get(50, 16, 3, torch.device("cpu")) is first
    assert torch.equal(first, draw_test_matrix(50, 16, seed=3))
    for request in [(51, 16, 3), (50, 17, 3), (50, 16, 4)]:
        assert pool.get(*request, "cpu") is not first
