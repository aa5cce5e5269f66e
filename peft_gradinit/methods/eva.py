r"""EVA: Explained Variance Adaptation.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth & Hochreiter (2025), NeurIPS,
https://arxiv.org/abs/2410.07170.

`A0` gets the `r` leading principal components of the layer's inputs, `B0 = 0`. Among all `A` with
orthonormal rows this one maximises `Tr(A Sigma A^T)`, the variance of the inputs that the adapter
sees, and with it the expected squared norm of the gradient of `B` at the start. With `rho > 1` each
layer offers `r rho` components and the layers' ranks go to those that explain the largest share of
their layer's variance.

| in the paper | here |
|---|---|
| incremental SVD of the inputs, Algorithm 1 | `calibration.passes.inputs`: one sum, one Nystrom |
| `A0 = V_r^T`, `B0 = 0` | `eva_factors` |
| explained variance of a component, redistribution of ranks with budget `sum r` | `starts.allocation` |
| convergence, cosine `tau` | `tau`, a share of the explained variance |

**Departures from the authors' code** (and from PEFT's `EvaConfig`).

1. No SVD per batch: a sketch of the second moment is summed over the tokens and factored once. The
   result does not depend on the batch size or the order of the data within an orientation.
2. The data are read once and within a budget; the authors and PEFT cycle through the loader until
   every component of every layer has converged, for ever where one cannot. `tau` compares the
   variance that subspaces explain, since components of almost equal variance never stop turning.
3. Batches of fewer tokens than components add what they have; layers that never run are named.
4. With labels for each token, tokens that *carry loss* count: in a causal model the token before a
   kept label. PEFT takes the tokens whose own label is kept, one position off.
5. Layers share a statistic while they are given the very same tensors, not for ever because the
   first batch was equal.
6. `whiten` divides copies, once: in PEFT's code query, key and value divide each other's rows. The
   singular values are per token (root mean squares), so the start does not depend on how many
   tokens were read.
7. Signs are canonical, seeds explicit, and what is measured stays in float32.
8. A layer whose rank goes from `r` to `r'` keeps its scaling, as in PEFT: its `lora_alpha` is
   multiplied by `r' / r`. The authors keep `lora_alpha`, so theirs becomes `alpha / r'`.

At initialisation the function is unchanged: `B0 = 0`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibration import Inputs, triplets_of
from ..errors import ConfigError
from ..linalg import TruncatedSVD
from ..numbers import is_finite_number
from ..starts import GradInitConfig, Target
from ..statistics import Readouts


@dataclass
class EvaConfig(GradInitConfig):
    """LoRA whose `A` starts at the principal components of the layer's inputs.

    Not `peft.EvaConfig`, which is a sub-config of `peft.LoraConfig` for PEFT's own variant.
    Everything of `peft.LoraConfig` keeps its meaning; the authors use `lora_alpha=1`.

    Args:
        rank_allocation: `"explained_variance"` (default), as in the paper: every layer offers
            `r * rho` components, and ranks go to those that explain the largest share of their
            layer's variance. A layer may lose its adapter (`min_rank=0`). `"uniform"`, or `rho=1`:
            all ranks stay `r`.
        tau: stop reading when, in every layer, the components found by one orientation of the
            sketches explain this share of what those of the next explain, found from three times
            the data. Default: read the whole budget. Stricter than the paper's cosine between
            consecutive batches: at 0.99, 1,024 docstrings do not settle MiniLM.
        whiten: divide each row of `A0` by the root of its singular value.
        centered: components of `x - mean`, as in the authors' code (default); else of `x`, as in
            the paper's theorem.
        adjust_scaling_factors: when a rank becomes `r'`, multiply `lora_alpha` by `r' / r`, as PEFT does.
            The scaling stays; with rsLoRA it grows as the root of the rank, so layers that got ranks
            take longer steps. That ends as low as keeping it (`scripts/bench_convergence.py`), and is
            what PEFT's own EVA means by this option.
        use_label_mask: take only tokens that carry loss, where batches have labels for each token.

    Raises:
        ConfigError: if `tau` is out of range.
    """

    name: ClassVar[str] = "eva"
    method: ClassVar[str] = "EVA"
    paper: ClassVar[str] = "2410.07170"
    start: ClassVar[str] = "principal components of the layer's inputs"

    usual: ClassVar[Mapping[str, Any]] = {
        **GradInitConfig.usual,
        "rank_allocation": "explained_variance",
        "min_rank": 0,
    }
    paper_values: ClassVar[Mapping[str, Any]] = {"r": 16, "lora_alpha": 1}

    tau: float | None = field(
        default=None, metadata={"help": "Share of variance at which to stop reading."}
    )
    whiten: bool = field(default=False, metadata={"help": "Divide rows by sqrt(sigma)."})
    centered: bool = field(default=True, metadata={"help": "Components of x - mean, or of x."})
    adjust_scaling_factors: bool = field(
        default=True, metadata={"help": "Multiply lora_alpha by r'/r where ranks change."}
    )
    use_label_mask: bool = field(
        default=True, metadata={"help": "Take only tokens that carry loss."}
    )

    def __post_init__(self, calibration: Any) -> None:
        super().__post_init__(calibration)
        if self.tau is not None and not (is_finite_number(self.tau) and 0 < self.tau <= 1):
            raise ConfigError(f"EvaConfig: tau must be in (0, 1] or None, got {self.tau!r}.")

    def allocated_alpha(self, times: float) -> float:  # noqa: D102
        return times if self.adjust_scaling_factors else 1.0

    def needs(self) -> Inputs:  # noqa: D102
        use_labels, settle = self.use_label_mask, self.tau
        return Inputs(centered=self.centered, use_labels=use_labels, settle=settle)

    def factors(  # noqa: D102
        self, readouts: Readouts, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        out_features = 0 if target.shape is None else target.shape[0]
        return eva_factors(
            triplets_of(readouts), r=target.r, out_features=out_features, whiten=self.whiten
        )


def eva_factors(
    triplets: TruncatedSVD, *, r: int, out_features: int, whiten: bool = False
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Compute the start from the leading components of the inputs.

    Args:
        triplets: at least `r` of them: `S` the root mean square of the inputs along each row of
            `Vh (n, in)`; `U` is not used.
        r: rank of the start.
        out_features: rows of `B0`.
        whiten: divide each row by the root of its `S`; rows along which the inputs do not vary
            keep their length.

    Returns:
        `A0 (r, in)`, orthonormal rows if not whitened, and `B0 (out, r)`, zeros.
    """
    A0 = triplets.Vh[:r].clone()
    if whiten:
        S = triplets.S[:r]
        varies = torch.finfo(S.dtype).eps ** 0.5 * S[:1] < S
        A0 = A0 / torch.where(varies, S, torch.ones_like(S)).sqrt()[:, None]
    return A0, A0.new_zeros(out_features, r)
