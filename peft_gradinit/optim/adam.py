"""Adam on the two factors of a pair: what the methods share that feed it with gradients of their own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import decayed
from .options import check_betas, check_choice, check_fraction
from .stacks import Layout, Stack
from .whitening import adam_direction

ADAM: dict[str, Layout] = {
    "exp_avg_A": "A",
    "exp_avg_sq_A": "A",
    "exp_avg_B": "B",
    "exp_avg_sq_B": "B",
}
"""Adam's two moments of each factor."""

Sides = tuple[Tensor, Tensor]
"""`(n, r, in)` for `A` and `(n, out, r)` for `B`."""


def check_adam(optimizer: str, modes: Any, options: Mapping[str, Any]) -> None:
    """Check the options `mode`, `betas`, `eps` and `dampening`.

    Args:
        optimizer: its name, for errors.
        modes: the `Literal` of the modes.
        options: the four.

    Raises:
        ConfigError: if one has no meaning.
    """
    check_choice(optimizer, "mode", options["mode"], modes)
    check_betas(optimizer, options["betas"])
    check_fraction(optimizer, eps=options["eps"], dampening=options["dampening"])


def adam_directions(
    stack: Stack, gradients: Sides, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> Sides:
    """Adam's directions for both factors; the moments, named as in `ADAM`, are updated in place.

    A factor that does not move keeps its moments, and its direction is of no use.
    """
    directions = list(gradients)
    for i, side in enumerate(("A", "B")):
        if stack.moves[i]:
            moments = state[f"exp_avg_{side}"], state[f"exp_avg_sq_{side}"]
            adam = stack.steps[i], options["betas"], options["eps"]
            directions[i] = adam_direction(gradients[i], moments, *adam)
    return directions[0], directions[1]


def stepped(stack: Stack, directions: Sides, options: Mapping[str, Any]) -> Sides:
    """Both factors shrunk by the decay, less the rate times their directions."""
    lr, decay = options["lr"], options["lr"] * options["weight_decay"]
    dA, dB = directions
    return decayed(stack.A, decay).sub_(dA, alpha=lr), decayed(stack.B, decay).sub_(dB, alpha=lr)
