"""What else was tried against plain LoRA: rows of the study that are no part of the package.

Each changes one thing about LoRA or LoRA-One and trains as many numbers as LoRA, unless it says otherwise.
`bench_convergence.py run --methods NAME` runs one; its figures stand in `docs/benchmarks/findings.md`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_gradinit import pairs
from peft_gradinit.linalg import Factors, truncate_product, truncated_svd

from .method import Method, plain
from .pretraining import Rows
from .tasks import Task

HELD_OUT = 4
"""A quarter of the calibration batches judges how long a step should be."""
DAMPING = 0.01
"""Of the statistics, relative to their mean eigenvalue."""
LENGTHS = [2.0**k for k in range(-6, 9)]
"""Steps that are tried."""
RANDOM_ROW = 3**-0.5
"""Expected norm of a row of `A` as PEFT draws it."""


@dataclass
class Statistics:
    """What a layer saw: `G (out, in)` its gradient, second moments of inputs and output gradients."""

    G: Tensor
    inputs: Tensor
    outputs: Tensor


USUAL = plain(use_rslora=False)
"""PEFT's LoRA."""


def measured(model: nn.Module, batches: list[Rows]) -> dict[str, Statistics]:
    """Statistics of all adapted layers at the weights of now, adapter included."""
    found: dict[str, Statistics] = {}
    with _watched(model, found):
        for batch in batches:
            model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return found


@contextmanager
def _watched(model: nn.Module, found: dict[str, Statistics]) -> Iterator[None]:
    def watch(pair) -> Callable:
        def forward(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def backward(gradient: Tensor) -> None:
                g = gradient.detach().flatten(0, -2)
                new = Statistics(g.T @ x, x.T @ x, g.T @ g)
                old = found.get(pair.name)
                if old is not None:
                    new = Statistics(
                        old.G + new.G, old.inputs + new.inputs, old.outputs + new.outputs
                    )
                found[pair.name] = new

            output.register_hook(backward)

        return forward

    hooks = [p.layer.register_forward_hook(watch(p)) for p in pairs(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def loss_of(model: nn.Module, batches: list[Rows]) -> float:
    """Mean over the batches."""
    model.eval()
    return sum(model(**batch).loss.item() for batch in batches) / len(batches)


def gradient_steps(found: dict[str, Statistics], r: int) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA-One's step: the leading part of each gradient, of spectral norm one."""
    steps = {}
    for name, of in found.items():
        svd = truncated_svd(of.G, r)
        root = (svd.S / svd.S[0]).sqrt()
        steps[name] = (root[:, None] * svd.Vh, -svd.U * root)
    return steps


def preconditioned_steps(found: dict[str, Statistics], r: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The leading part of `outputs^-1 G inputs^-1`, best in the norm of the statistics; balanced."""
    steps = {}
    for name, of in found.items():
        left, right = _inverse_root(of.outputs), _inverse_root(of.inputs)
        svd = truncated_svd(left @ of.G @ right, r)
        root = (svd.S / svd.S[0]).sqrt()
        B, A = -left @ (svd.U * root), (root[:, None] * svd.Vh) @ right
        balance = (B.norm() / A.norm()).sqrt()
        steps[name] = (A * balance, B / balance)
    return steps


def _inverse_root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0) + DAMPING * values.mean()
    return ((vectors / values.sqrt()) @ vectors.T).to(moment)


def stepped(steps_of: Callable, alike: bool) -> Callable:
    """A start that takes a step, as long as lowers the loss most on batches of its own.

    Args:
        steps_of: makes factors of every layer from statistics and a rank.
        alike: the layers' steps keep their proportions; else each has spectral norm one before.
    """

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        adapted = USUAL(model, task, batches)
        if len(batches) < HELD_OUT:
            batches = [part for batch in batches for part in parts_of(batch)]
        n = max(1, len(batches) // HELD_OUT)
        steps = steps_of(measured(adapted, batches[:-n]), task.settings.adapter["r"])
        if not alike:
            steps = {name: _of_norm_one(A, B) for name, (A, B) in steps.items()}
        losses = {}
        for length in LENGTHS:
            _write(adapted, steps, length / 128)
            losses[length] = loss_of(adapted, batches[-n:])
        _write(adapted, steps, min(losses, key=lambda k: losses[k]) / 128)
        return adapted

    return start


def parts_of(batch: Rows) -> list[Rows]:
    """A batch, cut into `HELD_OUT` parts."""
    columns = [column.chunk(HELD_OUT) for column in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*columns, strict=True)]


def _of_norm_one(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    norm = Factors(A, B).svd().S[0]
    return A / norm.sqrt(), B / norm.sqrt()


@torch.no_grad()
def _write(model: nn.Module, steps: dict[str, tuple[Tensor, Tensor]], length: float) -> None:
    for pair in pairs(model):
        A, B = steps[pair.name]
        pair.A.copy_(A * length**0.5)
        pair.B.copy_(B * length**0.5)


def short_where_strong(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """Rows of `A` along the gradient, as long as a random row that moves the loss as much; `B = 0`."""
    adapted = USUAL(model, task, batches)
    found = measured(adapted, batches)
    with torch.no_grad():
        for pair in pairs(adapted):
            G = found[pair.name].G
            svd = truncated_svd(G, pair.r)
            lengths = RANDOM_ROW * G.norm() / (G.shape[1] ** 0.5 * svd.S)
            pair.A.copy_(lengths.clamp_max(RANDOM_ROW)[:, None] * svd.Vh)
    return adapted


def doubled(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """Twice the rank, for `halve` to cut."""
    adapter = task.settings.adapter
    ranks = {name: 2 * adapter[name] for name in ("r", "lora_alpha")}
    return plain(use_rslora=False, **ranks)(model, task, batches)


def halve(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, _: list[Rows]) -> None:
    """Cut all ranks to those of the task; the optimiser forgets what it knew of the factors."""
    for pair in pairs(model):
        cut = truncate_product(pair.B.detach(), pair.A.detach(), task.settings.adapter["r"])
        _renew(pair, optimizer, cut.A, cut.B)


def recalibrate(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, batches: list[Rows]
) -> None:
    """Turn the factors towards the gradient of now, at about the length that they have.

    They become the leading part of their product and of LoRA-One's step, a tenth as long.
    """
    r = task.settings.adapter["r"]
    steps = gradient_steps(measured(model, batches), r)
    model.train()
    for pair in pairs(model):
        A, B = steps[pair.name]
        norm = Factors(pair.A.detach(), pair.B.detach()).svd().S[0]
        both_B = torch.cat([pair.B.detach(), 0.1 * norm * B], 1)
        cut = truncate_product(both_B, torch.cat([pair.A.detach(), A]), r)
        _renew(pair, optimizer, cut.A, cut.B)


def _renew(pair, optimizer: torch.optim.Optimizer, A: Tensor, B: Tensor) -> None:
    for parameter, value in ((pair.A, A), (pair.B, B)):
        parameter.grad = None
        parameter.data = value.contiguous()
        optimizer.state.pop(parameter, None)


def square_core(of_gradient: bool) -> Callable:
    """`U C Vh` beside every layer, with singular vectors of the gradient or of the weight, fixed.

    `C` is square, and has about as many numbers as the rank of the task would train.
    """

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        adapted = USUAL(model, task, batches)
        found = measured(adapted, batches) if of_gradient else {}
        r = task.settings.adapter["r"]
        for pair in list(pairs(adapted)):
            base = pair.layer.get_base_layer()
            matrix = found[pair.name].G if of_gradient else base.weight.detach()
            size = min(*matrix.shape, int((r * sum(matrix.shape)) ** 0.5))
            svd = truncated_svd(matrix, size)
            pair.layer.core = nn.Parameter(torch.zeros(size, size))
            pair.A.requires_grad_(False)
            pair.B.requires_grad_(False)
            pair.layer.register_forward_hook(_with_core(svd.U, svd.Vh))
        return adapted

    return start


def _with_core(U: Tensor, Vh: Tensor) -> Callable:
    def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + inputs[0] @ Vh.T @ layer.core.T @ U.T

    return hook


LEVERS: dict[str, Method] = {
    "step_grown": Method(
        "LoRA-One's step, of the best length",
        stepped(gradient_steps, alike=True),
        3.2e-3,
        reads_data=True,
    ),
    "step_preconditioned": Method(
        "a step preconditioned by inputs and outputs",
        stepped(preconditioned_steps, alike=True),
        3.2e-3,
        reads_data=True,
    ),
    "step_preconditioned_even": Method(
        "the same, of one spectral norm in all layers",
        stepped(preconditioned_steps, alike=False),
        3.2e-3,
        reads_data=True,
    ),
    "short_where_strong": Method(
        "`A` along the gradient, short where it is strong",
        short_where_strong,
        3.2e-3,
        reads_data=True,
    ),
    "annealed": Method("twice the rank for a quarter of the steps", doubled, 3.2e-3, change=halve),
    "recalibrated": Method(
        "LoRA, turned to the gradient after a quarter of the steps",
        USUAL,
        3.2e-3,
        reads_data=True,
        change=recalibrate,
    ),
    "core_of_gradient": Method(
        "square core between singular vectors of the gradient",
        square_core(of_gradient=True),
        3.2e-3,
        reads_data=True,
    ),
    "core_of_weight": Method(
        "square core between singular vectors of the weight",
        square_core(of_gradient=False),
        3.2e-3,
    ),
}
