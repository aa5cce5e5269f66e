r"""MiLoRA: harnessing minor singular components for parameter-efficient LLM finetuning.

Wang, Li, Wang, Chen & Chen (2024), NAACL 2025, https://arxiv.org/abs/2406.09044.

With `W = U S V^T` the adapter starts at the minor part of the weight, its `r` smallest singular
triplets: `B0 = U_m (S_m / s)^(1/2)`, `A0 = (S_m / s)^(1/2) V_m^T`. This part is taken out of the
function. Training begins in the directions that the pretrained weight uses least, and leaves the
principal ones alone.

| in the paper | here |
|---|---|
| `W = W_p + W_m`, `W_m` of the last `r` triplets | `linalg.truncated_svd` of all of them |
| factors from the minor triplets | `milora_factors` |
| `W_p` frozen | `tuners.lora.anchored`; `W` is not written |

**Departures from the authors' code.**

1. The base weight is not changed; the adapter computes `s (B A - B0 A0) x`. Without dropout
   training is the same, and disabling, saving, resuming, several adapters, tied and quantised bases
   are right.
2. With `lora_dropout` (0.05 in the authors' scripts) the part that was taken out is dropped
   together with what is trained, so that the function at step 0 is the base's in train mode, too.
3. Singular vectors get canonical signs. The product does not depend on them.
4. A weight that is zero has no directions and is refused; `uncalibrated="lora"` gives it a plain
   start.

As in the authors' code, the factors are divided by the root of the scaling, so that `s B0 A0 = W_m`
for every `lora_alpha`. A weight of low rank has minor triplets that are zero to rounding: their
factors are almost zero and hardly move at first.

At initialisation the function is unchanged up to rounding. No data are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from ..calibration import Weights
from ..linalg import TruncatedSVD, truncated_svd
from ..starts import GradInitConfig, Target
from ..statistics import Readouts


@dataclass
class MiLoRAConfig(GradInitConfig):
    """LoRA whose factors start at the minor part of the weight.

    Needs no data and no calibration. Everything of `peft.LoraConfig` keeps its meaning; the paper
    uses `lora_alpha = r`. The whole SVD of every weight is computed, `O(out in min(out, in))`: the
    smallest triplets cannot be had from a sketch.

    Raises:
        ConfigError: if data are given.
    """

    name: ClassVar[str] = "milora"
    method: ClassVar[str] = "MiLoRA"
    paper: ClassVar[str] = "2406.09044"
    start: ClassVar[str] = "smallest singular triplets of the weight"
    paper_values: ClassVar[Mapping[str, Any]] = {"r": 64, "lora_alpha": 64, "lora_dropout": 0.05}
    anchored: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True

    def needs(self) -> Weights:  # noqa: D102
        return Weights()

    def factors(  # noqa: D102
        self, readouts: Readouts, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        weight = target.weight()
        return milora_factors(truncated_svd(weight, min(weight.shape)), r=target.r, scaling=scaling)


def milora_factors(
    triplets: TruncatedSVD, *, r: int, scaling: float
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Compute the start from the last `r` triplets of the weight.

    Args:
        triplets: all `min(out, in)` of them, largest first.
        r: rank of the start.
        scaling: `s` of the adapter, positive.

    Returns:
        `A0 (r, in)` and `B0 (out, r)`, with `W - s B0 A0` the best approximation of `W` of rank
        `min(out, in) - r`.
    """
    root = (triplets.S[-r:] / scaling).sqrt()
    return root[:, None] * triplets.Vh[-r:], triplets.U[:, -r:] * root
