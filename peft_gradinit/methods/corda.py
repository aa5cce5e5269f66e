r"""CorDA: context-oriented decomposition adaptation of large language models.

Yang, Li, Zhou, Song, Wu, Nie & Ghanem (2024), NeurIPS, https://arxiv.org/abs/2406.05223.

With `C` the second moment of the layer's inputs on some data, `W C = U S V^T` orders the weight's
directions by what those data need of them, and `W = U S V^T C^-1`. The adapter starts at `r` of
these components, `s B0 A0 = U_r S_r V_r^T C^-1`, which is `U_r U_r^T W`. Their part of the weight
is taken out of the function. `mode="ipm"` takes the leading ones, of data like those to be trained
on; `mode="kpm"` the last ones, of data whose knowledge is to be kept.

| in the paper | here |
|---|---|
| `C = X X^T` | need `SecondMoments`; called covariance there, not centred |
| damping until `C` can be inverted | `_damped` |
| `W C = U S V^T`, `W = U S V^T C^-1` | `corda_factors` |
| adapters from the first `r` (IPA, IPM) or the last (KPA, KPM) | `corda_factors`, `mode` |
| `W' = W - B A` | `tuners.lora.anchored`; `W` is not written |

**Departures from the authors' code** (and from PEFT's `init_lora_weights="corda"`).

1. The base weight is not changed; the adapter computes `s (B A - B0 A0) x`. Without dropout
   training is the same, and disabling, saving, resuming, several adapters, tied and quantised bases
   are right.
2. With `lora_dropout` the part that was taken out is dropped together with what is trained, so that
   the function at step 0 is the base's in train mode, too.
3. `C` is a mean over all tokens that are not padding, within the calibration's budget, in float32.
   The authors and PEFT first divide each sample by its largest entry (not its largest magnitude),
   so that samples count differently. They read 256 samples of up to 2048 tokens.
4. A component's row of `A0` is as long as its column of `B0`, as in PiSSA. The authors take
   `B0 = U (S / s)^(1/2)` and `A0 = (S / s)^(1/2) V^T C^-1`, whose lengths depend on the units and the
   number of the activations. Adam then learns the two at different speeds: with a `C` of mean
   diagonal 1 CorDA ended a quarter higher on sentences and on images, each at its best rate
   (`scripts/bench_convergence.py`, `docstrings` and `digits`). The product is the same.
5. Layers that are given the same inputs share one `C`.
6. Singular vectors get canonical signs. The product does not depend on them.
7. A weight that is zero has no directions and is refused; `uncalibrated="lora"` gives it a plain
   start.
8. `S V^T C^-1` is computed as `U^T W`, which it equals because `U^T W C = S V^T`. The inverse of
   an ill-conditioned `C` would magnify the rounding of its entries. With `mode="kpm"` the accuracy
   is that of the last singular vectors in float32.

At initialisation the function is unchanged up to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibration import SecondMoments
from ..errors import ConfigError
from ..linalg import exact_products, inverse, truncated_svd
from ..starts import GradInitConfig, Target
from ..statistics import Readouts

Mode = Literal["ipm", "kpm"]
_MODES = ("ipm", "kpm")

DAMPING, LARGEST_ERROR = 0.01, 0.05
"""Share of the mean diagonal that is added to `C`, and what `|C C^-1 - I|_F` has to stay below. The
share is doubled until it does. Both are those of the authors' code."""


@dataclass
class CorDAConfig(GradInitConfig):
    """LoRA whose factors start at parts of the weight that some data need most, or least.

    Everything of `peft.LoraConfig` keeps its meaning; the authors use a scaling of 1. Layers must
    be so narrow that `(in, in)` float32 fits: every distinct input takes `4 in^2` bytes on the
    device and in a saved calibration.

    Args:
        mode: `"ipm"` (default), instruction-previewed: the leading components, calibrated on data
            of the new task. `"kpm"`, knowledge-preserved: the last ones, calibrated on data that
            hold what the model is to keep, such as questions.

    Raises:
        ConfigError: if `mode` has a value that is not listed.
    """

    name: ClassVar[str] = "corda"
    method: ClassVar[str] = "CorDA"
    paper: ClassVar[str] = "2406.05223"
    start: ClassVar[str] = "parts of the weight, ordered by what the inputs need"
    paper_values: ClassVar[Mapping[str, Any]] = {"r": 128, "lora_alpha": 128}
    anchored: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True

    mode: Mode = field(default="ipm", metadata={"help": f"Leading or last components: {_MODES}."})

    def __post_init__(self, calibration: Any) -> None:
        super().__post_init__(calibration)
        if self.mode not in _MODES:
            raise ConfigError(f"CorDAConfig: mode must be one of {_MODES}, got {self.mode!r}.")

    def needs(self) -> SecondMoments:  # noqa: D102
        return SecondMoments()

    def factors(  # noqa: D102
        self, readouts: Readouts, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        weight = target.weight()
        moment = readouts["C"].to(weight.device)
        return corda_factors(weight, moment, r=target.r, mode=self.mode, scaling=scaling)


def corda_factors(
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"],
    *,
    r: int,
    mode: Mode = "ipm",
    scaling: float,
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Compute the start from a weight and the second moment of its inputs.

    Args:
        weight: the weight in the layout of `nn.Linear`, float32.
        moment: `C`, symmetric, positive semi-definite, not zero.
        r: rank of the start.
        mode: see `CorDAConfig`.
        scaling: `s` of the adapter, positive.

    Returns:
        `A0 (r, in)` and `B0 (out, r)`. With `mode="kpm"` no matrix of rank `min(out, in) - r` is
        nearer to `W` than `W - s B0 A0`, measured as `|(W - W') C|_F` with the damped `C`.
    """
    with exact_products(weight.device):
        C = _damped(moment)
        U = truncated_svd(weight @ C, min(weight.shape)).U
        U = U[:, :r] if mode == "ipm" else U[:, -r:]
        rows = U.T @ weight
        rounding = torch.finfo(rows.dtype)
        largest = rows.abs().max() + rounding.tiny  # squares of large weights would overflow
        length = largest * torch.linalg.vector_norm(rows / largest, dim=1)
        # Where a row is rounding, the floor keeps it short.
        divisor = (scaling * length.clamp_min(rounding.eps * length.max() + rounding.tiny)).sqrt()
        return rows / divisor[:, None], U * (length / scaling).sqrt()


def _damped(moment: Tensor) -> Tensor:
    """`C` of mean diagonal 1, with as much of the identity added as makes its inverse accurate."""
    moment = moment / moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    damping = DAMPING
    while True:
        C = moment + damping * identity
        if torch.dist(C @ inverse(C), identity) < LARGEST_ERROR or damping > 1:
            return C
        damping *= 2
