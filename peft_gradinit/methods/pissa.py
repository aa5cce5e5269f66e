r"""PiSSA: Principal Singular values and Singular vectors Adaptation.

Meng, Wang & Zhang (2024), NeurIPS, https://arxiv.org/abs/2404.02948.

With `W = U S V^T` the adapter starts at the principal part of the weight,
`B0 = U_r (S_r / s)^(1/2)` and `A0 = (S_r / s)^(1/2) V_r^T`, so that `s B0 A0 = U_r S_r V_r^T`. This
part is taken out of the function: what is trained is the weight's own leading directions.

| in the paper, which writes `y = x W` | here |
|---|---|
| factors from the leading `r` triplets, equations 2 and 3 | `pissa_factors` |
| residual of the other triplets, equation 4 | `tuners.lora.anchored`; `W` is not written |
| fast SVD | `svd="randomized"`, `linalg.decomposed` |

**Departures from the authors' code** (and from PEFT's `init_lora_weights="pissa"`).

1. The base weight is not changed; the adapter computes `s (B A - B0 A0) x`. Without dropout
   training is the same, and disabling, saving, resuming, several adapters, tied and quantised bases
   are right. No conversion is needed: what is saved is a LoRA of rank `2r` for the base as it was.
2. With `lora_dropout` the part that was taken out is dropped together with what is trained, so that
   the function at step 0 is the base's in train mode, too. The authors ask for no dropout.
3. The start on a 4-bit base is that of the dequantised weight. The residual is not quantised anew,
   so the quantisation error stays what it is (QPiSSA would lower it).
4. Singular vectors get canonical signs. The product does not depend on them.
5. The randomised SVD has `r + 32` extra columns and 8 power iterations. PEFT's has none and
   `niter`, 16 in the authors' scripts; of weights with flat spectra it takes out something else.
6. A weight that is zero has no directions and is refused; `uncalibrated="lora"` gives it a plain
   start.

At initialisation the function is unchanged up to rounding. No data are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibration import Weights
from ..errors import ConfigError
from ..linalg import SVDS, Decomposition, TruncatedSVD, decomposed
from ..starts import GradInitConfig, Target
from ..statistics import Readouts


@dataclass
class PiSSAConfig(GradInitConfig):
    """LoRA whose factors start at the principal part of the weight.

    Needs no data and no calibration. Everything of `peft.LoraConfig` keeps its meaning; the paper
    uses `lora_alpha = r`.

    Args:
        svd: `"exact"` (default), `O(out in min(out, in))` a layer, or `"randomized"`,
            `O(out in r)`, with the accuracy that `linalg.decomposed` gives.

    Raises:
        ConfigError: if `svd` has a value that is not listed, or if data are given.
    """

    name: ClassVar[str] = "pissa"
    method: ClassVar[str] = "PiSSA"
    paper: ClassVar[str] = "2404.02948"
    start: ClassVar[str] = "leading singular triplets of the weight"
    paper_values: ClassVar[Mapping[str, Any]] = {"r": 128, "lora_alpha": 128, "svd": "randomized"}
    anchored: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True

    svd: Decomposition = field(default="exact", metadata={"help": f"How W is decomposed: {SVDS}."})

    def __post_init__(self, calibration: Any) -> None:
        super().__post_init__(calibration)
        if self.svd not in SVDS:
            raise ConfigError(f"PiSSAConfig: svd must be one of {SVDS}, got {self.svd!r}.")

    def needs(self) -> Weights:  # noqa: D102
        return Weights()

    def factors(  # noqa: D102
        self, readouts: Readouts, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        weight = target.weight()
        generator = torch.Generator().manual_seed(seed)
        triplets = decomposed(weight, target.r, svd=self.svd, generator=generator)
        return pissa_factors(triplets, scaling=scaling)


def pissa_factors(
    triplets: TruncatedSVD, *, scaling: float
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Compute the start from the leading `r` triplets of the weight.

    Args:
        triplets: `U (out, r)`, `S (r,)`, `Vh (r, in)` of `W`.
        scaling: `s` of the adapter, positive.

    Returns:
        `A0 (r, in)` and `B0 (out, r)`, with `s B0 A0` the best rank-`r` approximation of `W`.

    Source:
        Equations 2 and 3.
    """
    root = (triplets.S / scaling).sqrt()
    return root[:, None] * triplets.Vh, triplets.U * root
