r"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation.

Wang, Yu & Li (2024), NeurIPS, https://arxiv.org/abs/2407.05000.

With `G = dL/dW = U S V^T` of the calibration data and `s` the adapter's scaling, the first SGD step
changes the effective weight by `-lr s^2 (B0 B0^T G + G A0^T A0)`. Its best match to `G` has rank
`2r` and is reached when `A0` spans `r` of the leading `2r` right singular vectors and `B0` the left
singular vectors of the other `r` triplets (Theorem 3.1). The length of both factors is
`c = out^(1/4) / sqrt(gamma)` (Theorem 3.2, forward and backward stability). So that the function
stays what it was, `s B0 A0` is taken out of it.

| in the paper | here |
|---|---|
| choice of index sets, Theorem 3.1 | `_split` |
| scale, Theorem 3.2 and Section 3.3 | `_lengths` |
| `W_init = W - s B0 A0`, Section 3.2 | `tuners.lora.anchored`; `W` is not written |
| gradient of a few batches, Algorithm 1 | `calibration.passes.gradients` |

**Departures from the authors' code.**

1. The base weight is not changed; the adapter computes `s (B A - B0 A0) x`. Without dropout the training
   dynamics are the same, and disabling, saving, resuming, tying and quantised bases are right.
2. Singular vectors get canonical signs. `B0 A0` pairs vectors of different triplets, so without
   them it changes from run to run.
3. Eval mode and token weighting: no dropout in the gradient, and the mean is over the tokens that
   carry loss, not over micro-batches, so the batch size does not matter.
4. The gradient is sketched (`estimator="sketch"`) or accumulated in float32 (`"dense"`), not in the
   weight's dtype.
5. `out` is the layer's number of outputs, also for `Conv1D`, which stores the transpose.
6. `2r > min(out, in)` lowers the layer's rank with a warning.
7. `stable_gamma` is 16, the default of the authors' library; their README's commands use 64.
8. The SVD is exact on the sketched core and seeded; theirs is randomised (`svd_lowrank`, `q = 4 r`,
   4 iterations) and not. Their `norm_clip`, which shortens a start whose largest entry
   exceeds the weight's, is not here.
9. `scale="lora"` and `rank_allocation` are not of the paper; the benchmarks show what they gave.

At initialisation the function is unchanged up to rounding; singular values of `G` are not used, so
the scale of the loss does not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibration import Gradients, triplets_of
from ..errors import ConfigError, ShapeError
from ..linalg import TruncatedSVD, singular_values
from ..numbers import is_finite_number
from ..starts import GradInitConfig, Target
from ..statistics import Readouts

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "gd", "unit", "weight_svd", "lora"]
_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SCALES = ("stable", "gd", "unit", "weight_svd", "lora")
LORA_LENGTHS = (3**-0.5, 0.1)
"""Of rows of `A0` and columns of `B0` with `scale="lora"`: the first as PEFT draws it, uniform in
`+-1 / sqrt(in)`; the second, about what two of Adam's steps give, turns `A` to the gradient at once."""


@dataclass
class LoraGAConfig(GradInitConfig):
    """LoRA whose factors start at the leading singular vectors of the gradient.

    Not `peft.LoraGAConfig`, which is a sub-config of `peft.LoraConfig` for PEFT's own variant.
    Everything of `peft.LoraConfig` keeps its meaning; the paper uses `use_rslora=True`.

    Args:
        direction: which of the leading `2r` triplets go where, 1-based. `"ArB2r"` (the authors'
            default): `A0` from `v_1..v_r`, `B0` from `u_{r+1}..u_{2r}`; `"A2rBr"`: the reverse;
            `"ArBr"`: `A0` from even, `B0` from odd ones; `"random"`: disjoint random halves.
        scale: length of the columns. `"stable"` (default): both factors times
            `out^(1/4) / sqrt(stable_gamma)`; `"gd"`: both divided by the adapter's scaling;
            `"unit"`: 1; `"weight_svd"`: both times the mean of `sqrt(sigma_i(W) / s)`, `i <= r`;
            `"lora"`, not of the paper: as long as plain LoRA's, rows of `A0` `1 / sqrt(3)` and columns
            of `B0` 0.1, so that plain LoRA's learning rate fits.
        stable_gamma: the paper's gamma; larger starts smaller. 16, as in the authors' library.

    Raises:
        ConfigError: if an option has a value that is not listed.
    """

    name: ClassVar[str] = "lora_ga"
    method: ClassVar[str] = "LoRA-GA"
    paper: ClassVar[str] = "2407.05000"
    start: ClassVar[str] = "leading singular vectors of the gradient"
    paper_values: ClassVar[Mapping[str, Any]] = {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "stable_gamma": 64.0,
    }
    anchored: ClassVar[bool] = True

    direction: Direction = field(
        default="ArB2r", metadata={"help": f"Which singular vectors go where: {_DIRECTIONS}."}
    )
    scale: Scale = field(default="stable", metadata={"help": f"Length of the factors: {_SCALES}."})
    stable_gamma: float = field(default=16.0, metadata={"help": "The paper's gamma."})

    def __post_init__(self, calibration: object) -> None:
        super().__post_init__(calibration)
        for name, value, allowed in (
            ("direction", self.direction, _DIRECTIONS),
            ("scale", self.scale, _SCALES),
        ):
            if value not in allowed:
                raise ConfigError(f"LoraGAConfig: {name} must be one of {allowed}, got {value!r}.")
        gamma = self.stable_gamma
        if not is_finite_number(gamma) or gamma <= 0:
            raise ConfigError(
                f"LoraGAConfig: stable_gamma must be a positive number, got {gamma!r}."
            )

    def needs(self) -> Gradients:  # noqa: D102
        return Gradients(per_rank=2)

    def factors(  # noqa: D102
        self, readouts: Readouts, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        triplets, sigma = triplets_of(readouts), None
        if self.scale == "weight_svd":
            sigma = singular_values(target.weight())
        return lora_ga_factors(
            triplets.truncate(2 * target.r),
            direction=self.direction,
            lengths=_lengths(
                self.scale,
                r=target.r,
                out_features=triplets.U.shape[0],
                gamma=self.stable_gamma,
                scaling=scaling,
                weight_singular_values=sigma,
            ),
            generator=torch.Generator().manual_seed(seed),
        )


def lora_ga_factors(
    triplets: TruncatedSVD,
    *,
    direction: Direction = "ArB2r",
    lengths: tuple[float, float],
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Compute the start from the leading `2r` triplets of the gradient.

    Args:
        triplets: `2r` of them, `U (out, 2r)`, `Vh (2r, in)`.
        direction: see `LoraGAConfig`.
        lengths: norm of each row of `A0`, and of each column of `B0`.
        generator: draws the halves for `direction="random"`; on the CPU.

    Returns:
        `A0 (r, in)` and `B0 (out, r)`.

    Raises:
        ShapeError: if the number of triplets is odd or zero.

    Source:
        Theorem 3.1 of the paper.
    """
    n = triplets.S.shape[0]
    if n % 2 or n == 0:
        raise ShapeError(f"LoRA-GA splits 2r triplets into two halves, but got {n} of them.")
    for_A, for_B = _split(n // 2, direction, generator)
    device = triplets.U.device
    of_A, of_B = lengths
    return of_A * triplets.Vh[for_A.to(device)], of_B * triplets.U[:, for_B.to(device)]


def _split(
    r: int, direction: Direction, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Indices of the triplets that go to `A0` and to `B0`."""
    if direction == "random":
        shuffled = torch.randperm(2 * r, generator=generator, device="cpu")
        return shuffled[:r], shuffled[r:]
    order = torch.arange(2 * r, device="cpu")
    if direction == "ArBr":
        return order[1::2], order[0::2]
    first, second = order[:r], order[r:]
    return (first, second) if direction == "ArB2r" else (second, first)


def _lengths(
    scale: Scale,
    *,
    r: int,
    out_features: int,
    gamma: float,
    scaling: float,
    weight_singular_values: Tensor | None = None,
) -> tuple[float, float]:
    """Lengths of the singular vectors in `A0` and in `B0`."""
    if scale == "lora":
        return LORA_LENGTHS
    length = 1.0
    if scale == "stable":
        length = out_features**0.25 / gamma**0.5
    elif scale == "gd":
        length = 1 / scaling
    elif weight_singular_values is not None:
        length = (weight_singular_values[:r] / scaling).sqrt().mean().item()
    return length, length
