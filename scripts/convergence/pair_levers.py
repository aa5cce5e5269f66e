"""What else was tried with LoRA-Muon: rows of the study that are no part of the package.

Each changes one thing about the step of `peft_gradinit.optim.LoraMuon`, or about the run around it.
`bench_convergence.py run --methods NAME` runs one; the figures stand in `docs/optimisers.md`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_gradinit import LoraOneConfig, init_report, pairs
from peft_gradinit.linalg import truncate_product
from peft_gradinit.optim import LoraMuon
from peft_gradinit.optim.lora_muon import LAYOUTS, moving_average
from peft_gradinit.optim.stacks import Layout, Stack
from peft_gradinit.optim.whitening import gram_power

from .levers import doubled
from .method import (
    EQUAL_NUMBERS,
    Method,
    Steps,
    adamw,
    calibrated,
    plain,
    with_output,
)
from .pretraining import Rows
from .tasks import Task

FIRST_RATE = 3.2e-2


Shape = Callable[[int, int], float]
"""Of the sizes of a layer's output and input."""


def natural(out: int, size: int) -> float:
    """From root mean square to root mean square, as `LoraMuon` has it."""
    return math.sqrt(out / size)


def capped(out: int, size: int) -> float:
    """The same, where the output is not the larger one; else 1."""
    return min(1.0, natural(out, size))


def flat(out: int, size: int) -> float:
    """1, as in the paper."""
    del out, size
    return 1.0


class VariedMuon(LoraMuon):
    """LoRA-Muon with one thing changed.

    Args:
        model: the model with the adapter.
        share: of the step that `A` takes; the paper's is a half.
        floor: added to the squared singular values before the matrix sign, as a fraction of their norm:
            directions below it are not stretched to full length.
        shape: how far a layer steps for a unit rate, given its sizes.
        by_signal: shorten a pair's step by the norm of its moment over the root mean square of its
            gradients, which is small where gradients are noise.
        **options: those of `LoraMuon`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        share: float = 0.5,
        floor: float = 0.0,
        shape: Shape = natural,
        by_signal: bool = False,
        **options: Any,
    ) -> None:
        self.share, self.floor, self.shape, self.by_signal = share, floor, shape, by_signal
        super().__init__(model, **options)

    def layouts(self, options: Mapping[str, Any]) -> dict[str, Layout]:
        """Beside the moments, two averages, one in each `(r, r)` entry."""
        del options
        squares: dict[str, Layout] = {"square_A": "square", "square_B": "square"}
        return LAYOUTS | squares if self.by_signal else LAYOUTS

    def update(
        self, stack: Stack, state: dict[str, Tensor], options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """One step, without decay."""
        whole = self.shape(stack.B.shape[-2], stack.A.shape[-1]) / abs(stack.scaling)
        A, B = stack.A.mT, stack.B
        sides = (("A", stack.gA.mT, B, self.share), ("B", stack.gB, A, 1 - self.share))
        steps = {}
        for factor, gradient, other, share in sides:
            moment = state[f"momentum_{factor}"]
            moment = moment.mT if factor == "A" else moment
            ahead = moving_average(
                moment, gradient, options["momentum"], nesterov=options["nesterov"]
            )
            root = gram_power(other, -0.5, options["dampening"])
            whitened = ahead @ root
            direction = whitened @ (gram_power(whitened, -0.5, self.floor) @ root)
            if self.by_signal:
                direction = direction * self._signal(
                    state[f"square_{factor}"], whitened, gradient @ root, options["momentum"]
                )
            steps[factor] = direction * (options["lr"] * share * whole)
        return (A - steps["A"]).mT, B - steps["B"]

    @staticmethod
    def _signal(square: Tensor, moment: Tensor, gradient: Tensor, beta: float) -> Tensor:
        entries = (-2, -1)
        square.lerp_(gradient.square().sum(entries, keepdim=True).expand_as(square), 1 - beta)
        ratio = moment.norm(dim=entries, keepdim=True) / square[..., :1, :1].sqrt().clamp_min(1e-30)
        return ratio.clamp_max(1.0)


def varied(**options: Any) -> Steps:
    """A `VariedMuon`, with a momentum of 0.9 unless told otherwise."""
    options = {"momentum": 0.9} | options

    def make(model: nn.Module, lr: float, head_lr: float) -> torch.optim.Optimizer:
        return VariedMuon(model, lr=lr, head_lr=head_lr, **options)

    return make


def halve_and_keep(squares: tuple[str, ...], moments: tuple[str, ...]) -> Callable:
    """Cut all ranks to those of the task; the state of the optimiser is projected as the factors are.

    Args:
        squares: entries of the state that are squares of gradients.
        moments: entries that are linear in gradients.
    """

    def change(
        model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, _: list[Rows]
    ) -> None:
        for pair in pairs(model):
            A, B = pair.A.detach(), pair.B.detach()
            cut = truncate_product(B, A, task.settings.adapter["r"])
            of_A, of_B = cut.A @ torch.linalg.pinv(A), torch.linalg.pinv(B) @ cut.B
            for factor, value, turn in ((pair.A, cut.A, of_B.mT), (pair.B, cut.B, of_A)):
                for name, entry in list(optimizer.state[factor].items()):
                    if name in (*moments, *squares):
                        turned = turn.square() if name in squares else turn
                        new = turned @ entry if factor is pair.A else entry @ turned.mT
                        optimizer.state[factor][name] = new.contiguous()
                factor.grad = None
                factor.data = value.contiguous()

    return change


LORA = plain(use_rslora=False)


def ranks_alone(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """Plain LoRA of random factors, with the ranks that our start gives."""
    start = calibrated(LoraOneConfig, **EQUAL_NUMBERS)
    ranks = init_report(start(task.load_model(), task, batches)).ranks()
    adapter = task.settings.adapter
    alphas = {name: adapter["lora_alpha"] / adapter["r"] * r for name, r in ranks.items()}
    random = plain(use_rslora=False, rank_pattern=ranks, alpha_pattern=alphas)
    return random(model, task, batches)


PAIR_LEVERS: dict[str, Method] = {
    "muon_ranks": Method(
        "ranks by gradient, factors random",
        ranks_alone,
        FIRST_RATE,
        varied(),
        reads_data=True,
    ),
    "muon_soft_0.1": Method(
        "singular values below a floor kept small (0.1)", LORA, FIRST_RATE, varied(floor=0.1)
    ),
    "muon_more_B": Method("a quarter of the step for `A`", LORA, FIRST_RATE, varied(share=0.25)),
    "muon_more_A": Method(
        "three quarters of the step for `A`", LORA, FIRST_RATE, varied(share=0.75)
    ),
    "muon_by_signal": Method(
        "steps of a pair shorter where gradients are noise",
        LORA,
        FIRST_RATE,
        varied(by_signal=True),
    ),
    "muon_capped": Method(
        "no longer steps where the output is larger", LORA, FIRST_RATE, varied(shape=capped)
    ),
    "muon_flat": Method("steps of one length in all layers", LORA, FIRST_RATE, varied(shape=flat)),
    "muon_capped_output": Method(
        "with output layer: no longer steps where the output is larger",
        with_output,
        FIRST_RATE,
        varied(shape=capped),
        has_output=True,
    ),
    "muon_output_0.8": Method(
        "the same, with a momentum of 0.8",
        with_output,
        FIRST_RATE,
        varied(shape=capped, momentum=0.8),
        has_output=True,
    ),
    "muon_linear": Method("linear decay", LORA, FIRST_RATE, varied(), schedule="linear"),
    "muon_annealed": Method(
        "twice the rank for a quarter of the steps, state projected",
        doubled,
        FIRST_RATE,
        varied(),
        change=halve_and_keep((), ("momentum",)),
    ),
    "annealed_kept": Method(
        "AdamW: twice the rank for a quarter of the steps, state projected",
        doubled,
        3.2e-3,
        adamw,
        change=halve_and_keep(("exp_avg_sq",), ("exp_avg",)),
    ),
}
