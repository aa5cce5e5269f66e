r"""SVFit: parameter-efficient fine-tuning of large pre-trained models using singular values.

Sun, Wei, Wu, Cui, Ye & Zhang (2024), https://arxiv.org/abs/2409.05926.

With `W = W_r + W_e` and `W_r = U_r diag(sigma_r) V_r^T` the leading `r` singular triplets of the
weight, the paper freezes `U_r`, `V_r` and `W_e` and trains `sigma_r` alone, from its value in `W`:
`y = W_e x + U_r (sigma * (V_r^T x))`. That is `r` numbers a layer, and no data are needed.

| in the paper | here |
|---|---|
| decomposition `W = W_r + W_e` | `linalg.decomposed` |
| `y = W_e x + U_r (sigma * (V_r^T x))` | `tuners.svfit.SVFitLinear`, `sigma = sigma_r + delta` |
| the update `U_r diag(sigma - sigma_r) V_r^T` | `svfit_factors`, as LoRA of scaling 1 |

**Departures from the paper** (no code of the authors was found).

1. `W` is kept and `delta`, which starts at 0, is trained in `y = W x + U_r (delta * (V_r^T x))`.
   The gradients are those of `sigma`, and so is the training with any optimiser without decay. The
   output at step 0 is the base model's bit for bit, disabling is exact, and quantised, half-precision
   and tied weights work, since nothing is written to them.
2. Weight decay draws `delta` to 0, the pretrained weight; on `sigma` it would draw `W_r` to 0.
3. The bases are stored in the model and, as LoRA, in the file. They are not recomputed on loading
   unless `save_format="compact"`: vectors of equal singular values are not unique, and signs and
   rounding depend on the library.
4. `r` is 8 by default, as for LoRA. The paper's headline (LoRA with 16 times as many numbers,
   RoBERTa, r = 8) fits `r="full"`, that is `min(out, in)` numbers a layer. The bases then take more
   memory than the weight: `r (out + in)` float32 numbers.
5. `svd="randomized"` is an option for large layers and small `r`; `linalg.decomposed` gives its
   accuracy on MiniLM, which `tests/methods/test_svfit.py` repeats. `U` and `Vh` are orthonormal and
   the start is neutral in any case.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..linalg import SVDS, Decomposition, TruncatedSVD, decomposed, double, fix_signs, qr
from ..numbers import is_integer
from ..starts import SpectralConfig

FLOAT32_RANK = 1e-6
"""Singular values below this share of the largest are rounding: float32's unit is 6e-8."""

TINY = 1e-300
"""Keeps float64 quotients finite; what is divided by it is not used."""

NOT_ORTHONORMAL = 0.05
"""Largest deviation of a Gram matrix from the identity; bfloat16 factors deviate by 0.01."""


@dataclass
class SVFitConfig(SpectralConfig):
    """Trains the leading singular values of the weights, `r` numbers a layer.

    Needs no data and no calibration. The adapter is float32 whatever the base's dtype.

    Args:
        r: singular values trained in each layer, or `"full"` for all `min(out, in)` of them, the
            paper's headline setting. 8 by default. A layer that has fewer gets those, with a
            warning.
        target_modules: names, a regular expression or `"all-linear"`; `None` takes what PEFT takes
            for LoRA on this architecture. `nn.Linear`, bitsandbytes 4-bit and 8-bit, `Conv1D`.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: indices of the blocks to adapt; `None` for all.
        layers_pattern: name of the list of blocks, such as `"layers"`, if PEFT does not know it.
        modules_to_save: modules that are trained and saved in full, such as a new head.
        rank_pattern: ranks other than `r` by name or regular expression; integers or `"full"`.
        save_format: `"lora"` (default) saves a plain LoRA adapter, `r (out + in)` numbers a layer,
            that loads without this package. `"compact"` saves `r` numbers a layer and what tells
            the basis; it needs this package and the same base weights, whose singular vectors it
            computes again and checks.
        svd: `"exact"` (default), `O(out in min(out, in))` a layer, or `"randomized"`,
            `O(out in r)`, with the accuracy that `linalg.decomposed` gives.
        seed: of the randomised decomposition.

    Raises:
        ConfigError: if an option has a value that cannot work.
    """

    name: ClassVar[str] = "svfit"
    method: ClassVar[str] = "SVFit"
    paper: ClassVar[str] = "2409.05926"
    start: ClassVar[str] = "singular vectors of the weight; trains r numbers a layer"
    paper_values: ClassVar[Mapping[str, Any]] = {"r": "full"}

    svd: Decomposition = field(default="exact", metadata={"help": f"How W is decomposed: {SVDS}."})
    seed: int = field(default=0, metadata={"help": "Seed of the randomised decomposition."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.svd not in SVDS:
            raise ConfigError(f"SVFitConfig: svd must be one of {SVDS}, got {self.svd!r}.")
        if not is_integer(self.seed) or self.seed < 0:
            raise ConfigError(
                f"SVFitConfig: seed must be a non-negative integer, got {self.seed!r}."
            )

    def basis(self, weight: Tensor, r: int, name: str) -> tuple[Tensor, Tensor]:  # noqa: D102
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.seed)
        return svfit_basis(weight, r, svd=self.svd, generator=generator)

    def factors(self, U: Tensor, delta: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return svfit_factors(U, delta, Vh)

    def recover(  # noqa: D102
        self, A: Tensor, B: Tensor, basis: tuple[Tensor, Tensor], weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return recover_spectrum(A, B, basis, weight)

    def basis_options(self) -> dict[str, Any]:  # noqa: D102
        return {"svd": self.svd, "seed": self.seed}


def svfit_basis(
    weight: Float[Tensor, "out in"],
    r: int,
    *,
    svd: Decomposition = "exact",
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """Compute the leading `r` singular vectors of a weight.

    Args:
        weight: the weight in the layout of `nn.Linear`, any floating dtype.
        r: number of triplets, `1 <= r <= min(out, in)`.
        svd: see `linalg.decomposed`.
        generator: source of the randomised sketch, on the CPU.

    Returns:
        `U` with orthonormal columns and `Vh` with orthonormal rows, canonical signs, float32.
    """
    triplets = decomposed(weight, r, svd=svd, generator=generator)
    return triplets.U.float().contiguous(), triplets.Vh.float().contiguous()


def svfit_factors(
    U: Float[Tensor, "out r"], delta: Float[Tensor, " r"], Vh: Float[Tensor, "r in"]
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Write the update as LoRA of scaling 1.

    Args:
        U: left singular vectors.
        delta: change of the singular values.
        Vh: right singular vectors.

    Returns:
        `A = Vh` and `B = U diag(delta)`.
    """
    return Vh, U * delta


def recover_spectrum(
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    basis: tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]],
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out r"], Float[Tensor, " r"], Float[Tensor, "r in"]]:
    """Undo `svfit_factors`.

    If `A` is the `Vh` at hand, its `U` is the one that was saved, and `delta` is found to the last
    bit. Otherwise the basis was computed elsewhere: it is taken from the factors, and where `delta`
    is zero, so that `B` does not tell `u`, from `W v = sigma u`.

    Args:
        A: the saved `Vh`.
        B: the saved `U diag(delta)`.
        basis: `U` and `Vh` computed from the weight at hand.
        weight: that weight.

    Returns:
        `U`, `delta`, `Vh` with `svfit_factors(U, delta, Vh) = (A, B)`.

    Raises:
        ShapeError: if the factors are not those of an SVFit adapter.
    """
    U, Vh = basis
    if torch.equal(A.to(Vh.dtype), Vh):
        delta = _coordinates(B, U)
        rounding = 4 * max(torch.finfo(B.dtype).eps, torch.finfo(U.dtype).eps)
        if ((U * delta - B).norm(dim=0) <= rounding * delta.abs()).all():
            return U, delta, Vh
    return _foreign_spectrum(A, B, weight)


def _coordinates(B: Tensor, U: Tensor) -> Tensor:
    """The float32 `delta` for which `U diag(delta)` rounds to `B` in the most entries."""
    wide = double(U)
    projection = (wide * double(B)).sum(0) / wide.square().sum(0)
    nearest = projection.float().to(U.device)
    candidates = [nearest] + [
        torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (torch.inf, -torch.inf)
    ]
    matches = torch.stack([(U * delta == B).sum(0) for delta in candidates])
    return torch.stack(candidates).gather(0, matches.argmax(0, keepdim=True))[0]


def _foreign_spectrum(A: Tensor, B: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U`, `delta`, `Vh` of factors whose basis was computed elsewhere; works in float64."""
    V, B = double(A).T, double(B)
    image = double(weight) @ V
    length, sigma = B.norm(dim=0), image.norm(dim=0)
    told_by_B, told_by_W = length > 0, sigma > sigma.max() * FLOAT32_RANK
    U = B / length.clamp_min(TINY)
    _check_orthonormal(V, "rows of A")
    _check_orthonormal(U[:, told_by_B], "columns of B")
    U = _fill(U, told_by_B, told_by_W & ~told_by_B, image / sigma.clamp_min(TINY))
    # Null directions without a delta: the function is the same with any completion.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(U.shape, generator=generator, dtype=torch.float32, device="cpu").to(U)
    U = _fill(U, told_by_B | told_by_W, ~(told_by_B | told_by_W), noise)
    # `W v = sigma u` fixes the sign of delta; where it says nothing, the canonical sign does.
    canonical = fix_signs(TruncatedSVD(U, sigma, V.T)).U
    cosine = torch.where(told_by_W, (U * image).sum(0), (U * canonical).sum(0))
    sign = torch.where(cosine < 0, -1.0, 1.0).to(U)
    return (U * sign).float().to(A.device), (length * sign).float().to(A.device), A


def _fill(U: Tensor, known: Tensor, missing: Tensor, columns: Tensor) -> Tensor:
    """Put those of `columns` into `U` that are missing, made orthogonal to those known."""
    if not missing.any():
        return U
    Q, R = qr(torch.cat([U[:, known], columns[:, missing]], dim=1))
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)  # so that it stays close to `columns`
    filled = U.clone()
    filled[:, missing] = Q[:, int(known.sum()) :]
    return filled


def _check_orthonormal(columns: Tensor, what: str) -> None:
    if columns.shape[1] == 0:
        return
    identity = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    deviation = (columns.T @ columns - identity).abs().max().item()
    if not deviation <= NOT_ORTHONORMAL:
        raise ShapeError(
            f"the factors are not those of an SVFit adapter: the {what} deviate from orthogonal "
            f"directions by {deviation:.2g}, expected at most {NOT_ORTHONORMAL}; load an adapter "
            "that SVFit saved, or load this one with PeftModel.from_pretrained."
        )
