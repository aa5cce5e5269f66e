r"""LoRA-Pro: are low-rank adapters properly optimized?

Wang, Liang, He, Wang & Tan (2025), ICLR, https://arxiv.org/abs/2407.18242.

A step `(a, b)` of the factors moves the weight along `s B a + s b A`. LoRA-Pro takes the step for which
this is closest to the gradient `g` of the weight: `g - (I - P_B) g (I - P_A)`, with the projections on
the factors' spaces. All that is needed of `g` is in the factors' gradients.

| in the paper | here |
|---|---|
| `a`, `b`, Theorem 2.1 | `adjusted` |
| `X` from the Sylvester equation, Theorem 2.3 | `sylvester` |
| AdamW on the equivalent gradient, Algorithm 2 (`mode="full"`) | `LoraPro.update`, `equivalent` |
| AdamW on `a` and `b`, the authors' earlier release (`mode="efficient"`) | `LoraPro.update` |

**Departures from the authors' code** (`mrflogs/LoRA-Pro`, inside a patched DeepSpeed).

1. `s` is the layer's own scaling; theirs is 16 / 8 for every layer, also with rsLoRA.
2. The first step counts as the first for Adam's bias; theirs counts it as the second.
3. `B = 0` needs no branch: the inverse of its Gram matrix is zero, and `b = g_B (A A^T)^-1 / s^2`.
4. Dampening is relative to the Gram matrix; their 1e-8 on a Gram matrix of 1e-6 lets rounding
   decide the rank.
5. The Sylvester equation is solved with two symmetric decompositions in real numbers; theirs are
   general, in complex ones. `P_B` is applied through the factors, never formed as `(out, out)`.
6. Moments are float32 and part of the state; theirs are bfloat16 attributes that are not saved.
7. A pair with one frozen factor gets the best step of the other one, not one half of the pair's.

`mode="full"` keeps both moments of the whole weight, `2 * out * in` numbers a pair, as full fine-tuning
does; under FSDP2 every process keeps them. `"efficient"` has Adam's state, and not the guarantee: Adam
divides every entry of a factor by its own size afterwards.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .adam import ADAM, adam_directions, check_adam, stepped
from .base import PairOptimizer
from .options import Common
from .stacks import Layout, Stack
from .whitening import Square, adam_direction, gram_power

if TYPE_CHECKING:
    from typing_extensions import Unpack

Mode = Literal["full", "efficient"]
Step = tuple[Float[Tensor, "n r in"], Float[Tensor, "n out r"]]

WHOLE: dict[str, Layout] = {"exp_avg_B": "weight", "exp_avg_sq_B": "weight"}
"""Moments of the weight, kept with `B`."""


class LoraPro(PairOptimizer):
    """AdamW on the gradient of the weight, as far as the pair can follow it.

    Args:
        model: the model with the adapter.
        mode: `"full"`, the paper's, with the state of full fine-tuning, or `"efficient"`, with that of
            LoRA.
        betas: decay of Adam's moments.
        eps: added to the root of Adam's second moment.
        dampening: fraction of the norm added to the Gram matrices.
        **common: see `Common`. Both factors shrink by `1 - lr * weight_decay`.

    Raises:
        ConfigError: if an option has no meaning, or the model no pairs.
    """

    name: ClassVar[str] = "lora_pro"
    title: ClassVar[str] = "LoRA-Pro"
    paper: ClassVar[str] = "2407.18242"

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Mode = "full",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        dampening: float = 1e-6,
        **common: "Unpack[Common]",
    ) -> None:
        given = {"mode": mode, "betas": betas, "eps": eps, "dampening": dampening}
        super().__init__(model, given, **common)

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: D102
        check_adam(self.title, Mode, options)

    def layouts(self, options: Mapping[str, Any]) -> dict[str, Layout]:  # noqa: D102
        return ADAM if options["mode"] == "efficient" else WHOLE

    def update(  # noqa: D102
        self, stack: Stack, state: dict[str, Tensor], options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        step = adjusted(stack, options["dampening"])
        if options["mode"] == "efficient":
            step = adam_directions(stack, step, state, options)
        else:
            adam = stack.steps[1], options["betas"], options["eps"]
            moments = state["exp_avg_B"], state["exp_avg_sq_B"]
            u = adam_direction(equivalent(stack, step), moments, *adam)
            step = adjusted(in_factors(stack, u), options["dampening"])
        return stepped(stack, step, options)


def adjusted(stack: Stack, dampening: float) -> Step:
    """The step `(a, b)` whose `s B a + s b A` is closest to the gradient of the weight.

    Of all such steps, the one closest to `(g_A, g_B)`. For a pair with one frozen factor, the best
    step of the other.

    Args:
        stack: pairs with the gradients `g_A = s B^T g` and `g_B = s g A^T`.
        dampening: see `whitening.gram_power`.

    Returns:
        `a` and `b`; a step goes against them.

    Source:
        Theorems 2.1 and 2.3.
    """
    A, B, gB = stack.A, stack.B, stack.gB
    inverse_A = gram_power(A.mT, -1.0, dampening)
    inverse_B = gram_power(B, -1.0, dampening)
    a = inverse_B @ stack.gA / stack.scaling**2
    b = gB @ inverse_A / stack.scaling**2
    if not all(stack.moves):
        return a, b
    b = b - B @ (inverse_B @ (B.mT @ b))
    X = sylvester(B.mT @ B, A @ A.mT, -(a @ A.mT))
    return a + X @ A, b - B @ X


def sylvester(left: Square, right: Square, target: Square) -> Square:
    """Solve `left X + X right = target` for symmetric `left` and `right` without negative eigenvalues.

    `X` has no part where both have an eigenvalue of zero. The decompositions are the CPU's: CUDA makes
    them one after the other.
    """
    device = target.device
    left, right, target = (torch.nan_to_num(t, 0.0, 0.0, 0.0).cpu() for t in (left, right, target))
    (first, U), (second, V) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    sums = first.clamp_min(0)[..., :, None] + second.clamp_min(0)[..., None, :]
    largest = sums.amax(dim=(-2, -1), keepdim=True)
    floor = torch.finfo(left.dtype).eps * largest
    rotated = U.mT @ target @ V
    solved = torch.where(sums > floor, rotated / sums.clamp_min(torch.finfo(left.dtype).tiny), 0.0)
    return (U @ solved @ V.mT).to(device)


def equivalent(stack: Stack, step: Step) -> Float[Tensor, "n out in"]:
    """`s B a + s b A`: what a step of the factors is for the weight."""
    a, b = step
    return (stack.B @ a + b @ stack.A) * stack.scaling


def in_factors(stack: Stack, weight_gradient: Float[Tensor, "n out in"]) -> Stack:
    """The pairs with the gradients `s B^T u` and `s u A^T` of a gradient `u` of the weight."""
    gA = stack.B.mT @ weight_gradient * stack.scaling
    gB = weight_gradient @ stack.A.mT * stack.scaling
    return stack._replace(gA=gA, gB=gB)
