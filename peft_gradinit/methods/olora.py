r"""OLoRA: orthonormal low-rank adaptation of large language models.

Büyükakyüz (2024), https://arxiv.org/abs/2406.01775.

With `W = Q R` the adapter starts at the first `r` columns of `Q` and the first `r` rows of `R`:
`B0 = Q_r`, orthonormal columns, and `A0 = R_r`. The product `s B0 A0` is taken out of the function.
`B0 A0` is the projection of the weight on the span of its first `r` columns.

| in the paper | here |
|---|---|
| thin QR of the weight | `torch.linalg.qr` in `olora_factors` |
| `B <- Q_r`, `A <- R_r` | `olora_factors` |
| `W <- W - s Q_r R_r` | `tuners.lora.anchored`; `W` is not written |

**Departures from the authors' code** (and from PEFT's `init_lora_weights="olora"`).

1. The base weight is not changed; the adapter computes `s (B A - B0 A0) x`. Without dropout
   training is the same, and disabling, saving, resuming, several adapters, tied and quantised bases
   are right.
2. With `lora_dropout` the part that was taken out is dropped together with what is trained, so that
   the function at step 0 is the base's in train mode, too.
3. The diagonal of `R` is made positive, so that the decomposition does not depend on the library.
   The product does not depend on it.
4. `Conv1D` is decomposed as `(out, in)`. PEFT decomposes what is stored, the transpose, whose
   factors do not fit a layer that is not square.

At initialisation the function is unchanged up to rounding. No data are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibration import Weights
from ..linalg import qr
from ..starts import GradInitConfig, Target
from ..statistics import Readouts


@dataclass
class OLoRAConfig(GradInitConfig):
    """LoRA whose `B` starts at orthonormal columns of the weight's QR decomposition.

    Needs no data and no calibration. Everything of `peft.LoraConfig` keeps its meaning.

    Raises:
        ConfigError: if data are given.
    """

    name: ClassVar[str] = "olora"
    method: ClassVar[str] = "OLoRA"
    paper: ClassVar[str] = "2406.01775"
    start: ClassVar[str] = "leading part of the weight's QR decomposition"
    paper_values: ClassVar[Mapping[str, Any]] = {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05}
    anchored: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True

    def needs(self) -> Weights:  # noqa: D102
        return Weights()

    def factors(  # noqa: D102
        self, readouts: Readouts, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        return olora_factors(target.weight(), r=target.r)


def olora_factors(
    weight: Float[Tensor, "out in"], *, r: int
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Compute the start from a weight.

    Args:
        weight: the weight in the layout of `nn.Linear`, float32.
        r: rank of the start, `1 <= r <= min(out, in)`.

    Returns:
        `A0 (r, in)` and `B0 (out, r)`, orthonormal columns. The first `r` columns of `B0 A0` are
        those of the weight.
    """
    Q, R = qr(weight)
    signs = torch.where(R.diagonal()[:r] < 0, -1.0, 1.0).to(weight)
    return signs[:, None] * R[:r], Q[:, :r] * signs
