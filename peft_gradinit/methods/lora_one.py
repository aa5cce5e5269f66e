r"""LoRA-One: one-step full gradient suffices for low-rank fine-tuning.

Zhang, Liu & Chen (2025), ICML, https://arxiv.org/abs/2502.01235.

With `-G = U S V^T` the negative gradient of the calibration data, the adapter starts at
`B0 = U_r (S_r / S_1)^(1/2) / gamma^(1/2)` and `A0 = (S_r / S_1)^(1/2) V_r^T / gamma^(1/2)`. Nothing is taken
out of the function: the model starts with the step `s B0 A0 = -(s / gamma) (G)_r / sigma_1(G)`, the
best rank-`r` approximation of a gradient step, normalised to the spectral norm `s / gamma`. With
rsLoRA, `s = alpha / r^(1/2)`, as the paper reads.

| in the paper | here |
|---|---|
| SVD of the negative gradient, Algorithm 1, lines 2-3 | `calibration.passes.gradients`, `lora_one_factors` |
| normalised spectral initialisation, Algorithm 1, lines 4-6 | `lora_one_factors` |
| preconditioned updates, Algorithm 1, lines 7-9 | not here: an optimiser, which would build on `pairs` |

**Departures from the authors' code.**

1. Eval mode and token weighting, as in LoRA-GA (departures 3 and 4 there).
2. The loss after the built-in step is measured on the calibration batches. A step that raises it is
   halved, with a warning, while that lowers the loss (`check_step`).
3. The negative sign is carried by `B0`; the authors decompose `-G`. The product is the same.
4. `Conv1D`, tied and quantised layers work, since the base weight is neither read nor written.

The scale of the loss does not matter, as the singular values are normalised by the first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibration import Gradients, triplets_of
from ..errors import ConfigError
from ..linalg import TruncatedSVD
from ..numbers import is_finite_number
from ..starts import GradInitConfig, Target
from ..statistics import Readouts


@dataclass
class LoraOneConfig(GradInitConfig):
    """LoRA that starts one normalised low-rank gradient step away from the base model.

    The function changes at step 0, by design. Everything of `peft.LoraConfig` keeps its meaning; the
    paper uses `use_rslora=True`.

    Args:
        stable_gamma: the paper's scale is its inverse; larger starts smaller. 128, as in the
            authors' code: with `alpha=16`, `r=8` and rsLoRA a step of spectral norm 0.044.
        check_step: measure the loss after the step on the calibration batches, and halve a step that
            raises it. On by default: it costs forward passes only.

    Raises:
        ConfigError: if `stable_gamma` is not positive.
    """

    name: ClassVar[str] = "lora_one"
    method: ClassVar[str] = "LoRA-One"
    paper: ClassVar[str] = "2502.01235"
    start: ClassVar[str] = "one normalised low-rank gradient step"
    paper_values: ClassVar[Mapping[str, Any]] = {"r": 8, "lora_alpha": 16, "use_rslora": True}
    preserves_output: ClassVar[bool] = False

    stable_gamma: float = field(default=128.0, metadata={"help": "Inverse scale of the step."})
    check_step: bool = field(
        default=True, metadata={"help": "Halve the built-in step while it raises the loss."}
    )

    def __post_init__(self, calibration: Any) -> None:
        super().__post_init__(calibration)
        gamma = self.stable_gamma
        if not is_finite_number(gamma) or gamma <= 0:
            raise ConfigError(
                f"LoraOneConfig: stable_gamma must be a positive number, got {gamma!r}."
            )

    @property
    def checks_step(self) -> bool:  # noqa: D102
        return self.check_step

    def needs(self) -> Gradients:  # noqa: D102
        return Gradients(keep_batches=self.check_step)

    def factors(  # noqa: D102
        self, readouts: Readouts, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        del scaling, seed
        return lora_one_factors(triplets_of(readouts).truncate(target.r), gamma=self.stable_gamma)


def lora_one_factors(
    triplets: TruncatedSVD, *, gamma: float
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Compute the start from the leading `r` triplets of the gradient.

    Args:
        triplets: of `+G`; `U (out, r)`, `Vh (r, in)`.
        gamma: `|B0 A0|_2 = 1 / gamma`.

    Returns:
        `A0 (r, in)` and `B0 (out, r)`, with `B0 A0 = -(G)_r / (gamma sigma_1)`; zeros for a zero
        gradient.

    Source:
        Algorithm 1, lines 2-6.
    """
    largest = triplets.S[0].clamp_min(torch.finfo(triplets.S.dtype).tiny)
    root = (triplets.S / largest / gamma).sqrt()
    return root[:, None] * triplets.Vh, -triplets.U * root
