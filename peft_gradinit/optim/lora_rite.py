r"""LoRA-RITE: robust invariant transformation equilibration for LoRA optimisation.

Yen et al. (2025), ICLR, https://arxiv.org/abs/2410.20625.

Adam with a matrix in place of the elementwise second moment, in coordinates in which the split of
the product into factors does not show. With `Q_A` an orthonormal basis of the rows of `A`, the
gradient of `B` in it is `g Q_A`, whatever the size and shape of `A`. Both moments live in that basis
and are carried over when it turns. Letters: the second moment `V (r, r)`, the first `M (out, r)`.

| in the paper | here |
|---|---|
| unmagnified gradient `g_B R_A^-1` | `side_step` |
| second moment `V`, preconditioned gradient `g V^(-1/2)`, first moment `M` | `side_step`, `corrected` |
| step `M R_A^-T` | `side_step` |
| change of basis `P = Q_new^T Q_old`, `V <- P V P^T`, `M <- M P^T` | `carried` |

**Departures from the authors' code** (`gkevinyen5418/LoRA-RITE`).

1. The basis is the polar factor `Q_A = A^T (A A^T)^(-1/2)`, not the `Q` of a QR decomposition. The
   method is the same in every orthonormal basis.
2. The moments are carried over at the end of a step, when the old and the new factor are both at
   hand. The authors keep the old basis as state, which is as large as the factors: here the state is
   about half of theirs, and no larger than Adam's.
3. The scaling `alpha / r` belongs to the product: the step is divided by it. The authors' code
   knows no scaling.
4. A large gradient is neither dropped (theirs sets an update with a root mean square above 1 to zero,
   without a word) nor clipped at a norm of 1 over all pairs. Clip as in any training loop.
5. Dampening is relative to the matrix (their `relative_epsilon=True` is a `NameError`;
   the default adds 1e-6 to the root, whatever the gradient's size).
6. No escaped mass `rho`, as in their default (`apply_escape=False`).
7. The state is plain tensors by parameter: it can be saved and loaded.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .base import PairOptimizer, decayed
from .options import Common, check_betas, check_fraction
from .stacks import Layout, Stack
from .whitening import Square, Tall, filled, gram_power, power

if TYPE_CHECKING:
    from typing_extensions import Unpack

LAYOUTS: dict[str, Layout] = {
    "exp_avg_A": "A",
    "exp_avg_B": "B",
    "second_moment_A": "square",
    "second_moment_B": "square",
}


class LoraRite(PairOptimizer):
    """Adam in a basis of the factors' own, with an `(r, r)` second moment.

    Args:
        model: the model with the adapter.
        betas: decay of the first and of the second moment.
        dampening: fraction of the norm added to Gram matrices and second moments.
        **common: see `Common`. Both factors shrink by `1 - lr * weight_decay`.

    Raises:
        ConfigError: if an option has no meaning, or the model no pairs.
    """

    name: ClassVar[str] = "lora_rite"
    title: ClassVar[str] = "LoRA-RITE"
    paper: ClassVar[str] = "2410.20625"

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        dampening: float = 1e-6,
        **common: "Unpack[Common]",
    ) -> None:
        super().__init__(model, {"betas": betas, "dampening": dampening}, **common)

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: D102
        check_betas(self.title, options["betas"])
        check_fraction(self.title, dampening=options["dampening"])

    def layouts(self, options: Mapping[str, Any]) -> dict[str, Layout]:  # noqa: D102
        del options
        return LAYOUTS

    def update(  # noqa: D102
        self, stack: Stack, state: dict[str, Tensor], options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        of_A, of_B = ([corrected(beta, step) for beta in options["betas"]] for step in stack.steps)
        dampening, rate = options["dampening"], options["lr"] / abs(stack.scaling)
        decay = options["lr"] * options["weight_decay"]
        A, B, gA = stack.A.mT, stack.B, stack.gA.mT
        mA, mB = state["exp_avg_A"].mT, state["exp_avg_B"]
        vA, vB = state["second_moment_A"], state["second_moment_B"]
        RA, RB = gram_power(A, -0.5, dampening), gram_power(B, -0.5, dampening)
        new_A, new_B = A, B
        if stack.moves[0]:
            dA, mA, vA = side_step(gA, mA, vA, RB, betas=of_A, dampening=dampening)
            new_A = decayed(A, decay).sub_(dA, alpha=rate)
        if stack.moves[1]:
            dB, mB, vB = side_step(stack.gB, mB, vB, RA, betas=of_B, dampening=dampening)
            new_B = decayed(B, decay).sub_(dB, alpha=rate)
        mA, vA = carried(mA, vA, turn(new_B, B, RB, dampening))
        mB, vB = carried(mB, vB, turn(new_A, A, RA, dampening))
        state |= {"exp_avg_A": mA.mT, "exp_avg_B": mB, "second_moment_A": vA, "second_moment_B": vB}
        return new_A.mT, new_B


def side_step(
    gradient: Tall,
    moment: Tall,
    second: Square,
    root: Square,
    *,
    betas: list[Any],
    dampening: float,
) -> tuple[Tall, Tall, Square]:
    """The step of one factor for a unit rate, and its moments after it.

    Args:
        gradient: of the factor as a tall matrix: of `B`, or of `A^T`.
        moment: `M`.
        second: `V`.
        root: `(X^T X)^(-1/2)` of the other factor, as a tall matrix `X`.
        betas: decay of both moments at this step; numbers, or `(n, 1, 1)`.
        dampening: see `whitening.power`.

    Returns:
        `d = M R`, `M` and `V`; a step goes against `d`.
    """
    unmagnified = gradient @ root
    outer = unmagnified.mT @ unmagnified / gradient.shape[-2]
    second = outer.lerp(second, betas[1])
    whitened = unmagnified @ power(second, -0.5, dampening)
    moment = whitened.lerp(moment, betas[0])
    return moment @ root, moment, second


def turn(new: Tall, old: Tall, root: Square, dampening: float) -> Square:
    """`P = Q_new^T Q_old` of the bases of a factor after and before a step.

    Args:
        new: the factor after the step, tall.
        old: before the step.
        root: `(X^T X)^(-1/2)` of the old one.
        dampening: see `whitening.gram_power`.

    Returns:
        `P`, `(r, r)`.
    """
    return gram_power(new, -0.5, dampening) @ (new.mT @ old) @ root


def carried(moment: Tall, second: Square, P: Square) -> tuple[Tall, Square]:
    """Both moments in the new basis: `M P^T` and `P V P^T`."""
    return moment @ P.mT, P @ second @ P.mT


def corrected(beta: float, step: int | Tensor) -> float | Tensor:
    """A decay that makes a moving average from zero unbiased at every step; 0 at the first.

    Source:
        Shazeer & Stern (2018), section 7.1.
    """
    return beta * filled(beta, step - 1) / filled(beta, step)
