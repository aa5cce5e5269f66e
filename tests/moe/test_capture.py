"""The gradient of every expert is what autograd gives for the whole parameter."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from peft_gradinit.calibration import ExpertWeight
from peft_gradinit.calibration.capture import taps
from peft_gradinit.calibration.capture.experts import Product
from peft_gradinit.calibration.capture.following import watched
from peft_gradinit.errors import CalibrationError
from peft_gradinit.statistics import DenseGradient, SketchedGradient, TestMatrixPool
from tests.calibration.passes import collect
from tests.helpers import base_weights, quiet, relative_error, same_weights, token_batches
from tests.moe.models import (
    IMPLEMENTATIONS,
    as_out_in,
    dense_gradients,
    expert_weights,
    gpt_oss,
    llama4,
    mixtral,
    qwen3_moe,
)

FLOAT32 = 1e-5
CASES = [(make, kind) for make in (qwen3_moe, mixtral, gpt_oss) for kind in IMPLEMENTATIONS]
CASES.append((llama4, None))


def shape_of(weight: ExpertWeight) -> tuple[int, int]:
    return tuple(as_out_in(getattr(weight.module, weight.parameter), weight).shape)


def measured(model: nn.Module, batches, weights=None, **options) -> dict[str, Tensor]:
    """Exact mean gradients by a pass."""
    weights = expert_weights(model) if weights is None else weights
    statistics = {n: DenseGradient(*shape_of(w)) for n, w in weights.items()}
    collect(model, weights, statistics, quiet(batches, **options))
    return {n: s.mean() for n, s in statistics.items()}


def oracle(model: nn.Module, batches, weights) -> dict[str, Tensor]:
    """The same from autograd's gradients of whole parameters."""
    whole = dense_gradients(model, batches, sorted({n.rpartition("[")[0] for n in weights}))
    return {n: as_out_in(whole[n.rpartition("[")[0]], w) for n, w in weights.items()}


def worst_error(model: nn.Module, got: dict[str, Tensor], batches) -> float:
    want = oracle(model, batches, expert_weights(model))
    assert got.keys() == want.keys()
    assert all(g.norm() > 0 for g in want.values()), "an expert without tokens proves nothing"
    return max(relative_error(got[n], want[n]) for n in want)


def made(make, kind) -> nn.Module:
    model = make()
    if kind is not None:
        model.set_experts_implementation(kind)
    return model


@pytest.mark.parametrize(("make", "kind"), CASES)
def test_gradient_of_every_expert_is_autograds(make, kind):
    model, batches = made(make, kind), token_batches()
    assert worst_error(model, measured(model, batches), batches) < FLOAT32


@pytest.mark.parametrize(("make", "kind"), CASES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make, kind, use_reentrant):
    model, batches = made(make, kind), token_batches()
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    got = measured(model, batches)
    assert worst_error(made(make, kind), got, batches) < FLOAT32


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_checkpointing_frees_the_rows_of_experts_until_the_backward(kind, monkeypatch):
    model, rows, alive = made(mixtral, kind), [], []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check = taps._check_differentiable

    def noting(x, *rest):
        rows.append(weakref.ref(x))
        check(x, *rest)

    def look(*_):
        gc.collect()
        alive.extend(row() is not None for row in rows)

    monkeypatch.setattr(taps, "_check_differentiable", noting)
    model.model.register_forward_hook(look)
    measured(model, token_batches()[:1])
    assert alive
    assert not any(alive)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_batch_size_does_not_matter(kind):
    model = made(qwen3_moe, kind)
    small, large = (measured(model, token_batches(batch_size=n)) for n in (2, 12))
    assert max(relative_error(small[n], large[n]) for n in large) < FLOAT32


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_bfloat16_experts(kind):
    model, batches = made(mixtral, kind), token_batches()
    want = oracle(model, batches, expert_weights(model))
    got = measured(model.to(torch.bfloat16), batches)
    # Rounding may send a token to another expert, so all experts of a parameter are compared.
    assert relative_error(*(torch.cat([g[n].flatten() for n in want]) for g in (got, want))) < 0.1


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_sketches_find_the_leading_part_of_every_expert(kind):
    model, batches = made(qwen3_moe, kind), token_batches()
    weights, pool = expert_weights(model), TestMatrixPool()
    sketches = {
        n: SketchedGradient(*shape_of(w), width=56, seed=0, pool=pool) for n, w in weights.items()
    }
    collect(model, weights, sketches, quiet(batches))
    for name, G in oracle(model, batches, weights).items():
        S = torch.linalg.svdvals(G)
        best = S[4:].square().sum().sqrt()
        svd = sketches[name].triplets(4)
        assert (G - (svd.U * svd.S) @ svd.Vh).norm() < 1.1 * best + 1e-4 * S[0], name


def test_router_is_a_parameter_of_two_dimensions():
    model, batches = mixtral(), token_batches()
    name = "model.layers.1.mlp.gate.weight"
    router = ExpertWeight(model.model.layers[1].mlp.gate, "weight", None, transposed=False)
    got = measured(model, batches, {name: router})
    want = dense_gradients(model, batches, [name])
    assert relative_error(got[name], want[name]) < FLOAT32


def test_a_layout_that_the_module_does_not_follow_gives_the_transpose():
    model, batches = qwen3_moe(), token_batches()
    weights = expert_weights(model)
    turned = {
        n: ExpertWeight(w.module, w.parameter, w.index, transposed=True) for n, w in weights.items()
    }
    got, want = measured(model, batches, turned), oracle(model, batches, weights)
    assert max(relative_error(got[n].T, want[n]) for n in want) < FLOAT32


def test_model_is_left_as_it_was_found():
    model = qwen3_moe()
    model.model.layers[0].mlp.experts.gate_up_proj.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = base_weights(model)
    measured(model, token_batches())
    assert same_weights(before, base_weights(model))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failures_leave_neither_wrapper_nor_mode_behind(error):
    model = qwen3_moe()
    experts = model.model.layers[1].mlp.experts

    def own_forward(*args, **kwargs):
        raise error("in the middle of the experts")

    experts.forward = own_forward  # as offloading does
    with pytest.raises(error, match="in the middle"):
        measured(model, token_batches())
    assert vars(experts)["forward"] is own_forward
    assert "forward" not in vars(model.model.layers[0].mlp.experts)
    assert torch.overrides._get_current_function_mode() is None


class Experts(nn.Module):
    """Three matrices `(4, 5)` of which `how` makes a product with tokens `(6, 5)`."""

    def __init__(self, how) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.W)


IDS = torch.tensor([2, 0, 0, 2, 2, 0])
HOWS = {
    "linear": lambda x, W: nn.functional.linear(x, W[1]),
    "linear by name": lambda x, W: nn.functional.linear(input=x, weight=W[-2]),
    "T": lambda x, W: x @ W[1].T,
    "mT and copies": lambda x, W: x.matmul(W.to(torch.float64).mT[1].float().contiguous()),
    "transpose": lambda x, W: torch.mm(x, W.transpose(1, 2)[torch.tensor(1)]),
    "from the left": lambda x, W: (W[1] @ x.T).T,
    "vector": lambda x, W: torch.stack([W.select(0, 1) @ row for row in x]),
    "unbind": lambda x, W: x @ W.unbind()[1].t(),
    "index_select": lambda x, W: torch.bmm(W.index_select(0, IDS), x[..., None])[..., 0],
    "gathered": lambda x, W: torch.bmm(x[:, None], W[IDS].mT)[:, 0],
    "all": lambda x, W: (x @ W.swapaxes(-1, -2)).sum(0),
    "type_as": lambda x, W: x.type_as(W) @ W[1].type_as(x).T,
}


@pytest.mark.parametrize("how", HOWS)
def test_products_are_found_however_they_are_written(how):
    module, x = Experts(HOWS[how]), torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    dy = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    weights = {f"W[{i}]": ExpertWeight(module, "W", i, transposed=False) for i in range(3)}
    got = {n: torch.zeros(4, 5) for n in weights}

    def see(product: Product, out: Tensor) -> Tensor:
        def add(gradient: Tensor) -> None:
            for name, (rows, dys) in product.parts(product.x, gradient):
                got[name] += dys.T @ rows

        out.register_hook(add)
        return out

    with watched(weights, see):
        module(x).backward(dy)
    assert relative_error(torch.stack(list(got.values())), module.W.grad) < 1e-6


@pytest.mark.parametrize(
    "use",
    [
        lambda x, W: torch.einsum("ti,eoi->to", x, W),
        lambda x, W: x @ W[:2].sum(0).T,
        lambda x, W: x @ (2 * W[0]).T,
        lambda x, W: x @ W.chunk(3)[0][0].T,
        lambda x, W: nn.functional.linear(x, torch.cat([W[0], W[1]])),
        lambda x, W: torch.matmul(W[IDS.tolist()], x[..., None])[..., 0],
    ],
)
def test_a_use_that_cannot_be_followed_is_an_error(use):
    module = Experts(use)
    weights = {f"up.W[{i}]": ExpertWeight(module, "W", i, transposed=False) for i in range(3)}
    with (
        pytest.raises(CalibrationError, match=r"Experts passes up\.W to .*set_experts_implem"),
        watched(weights, lambda _, out: out),
    ):
        module(torch.randn(6, 5))
    assert "forward" not in vars(module)


def test_asking_for_a_shape_or_dtype_is_no_use():
    def how(x, W):
        assert (W.shape, W.dim(), W.device) == ((3, 4, 5), 3, x.device)
        return (x.to(W.dtype).to(W) + torch.zeros_like(W).sum()) @ W[0].T

    module = Experts(how)
    seen = []
    weights = {f"W[{i}]": ExpertWeight(module, "W", i, transposed=False) for i in range(3)}
    with watched(weights, lambda product, out: seen.append(product.experts) or out):
        module(torch.randn(6, 5))
    assert seen == [0]


def test_experts_under_no_grad_are_named():
    model = qwen3_moe()
    experts = model.model.layers[0].mlp.experts
    forward = experts.forward
    experts.forward = lambda *args, **kwargs: torch.no_grad()(forward)(*args, **kwargs)
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.experts\.down_proj, model\.lay"):
        measured(model, token_batches())
