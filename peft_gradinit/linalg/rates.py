"""Learning rates for Adam from the lengths of the factors: where to begin, not the best rate.

**Plain LoRA.** Adam moves every entry by about the learning rate `lr`. At a good rate a run learns
both factors anew: their entries end at some `T lr`, and an output coordinate moves by
`s r in (T lr)^2` times the size of an input. So the rate goes as `1 / sqrt(in s r)`. The constant,
1/4, is from `scripts/bench_convergence.py`: tasks of widths 64 to 384 and 100 to 150 steps (on
docstrings, with a slower head than the task has now; the present head needs half of the constant).
The published rule for language models of width 4096 (Schulman et al. 2025, "LoRA Without Regret",
alpha 32) gives 0.4 of it, and their short runs 0.6.

**Other starts.** Adam's first step of rate 1 moves an entry of `s B A` by the root mean square

    s sqrt(|A|_F^2 / in + |B|_F^2 / out),

which for plain LoRA (rows of `A` of length `1 / sqrt(3)`, `B = 0`) is `s sqrt(r / (3 in))`. A start
that moves the weight `m` times as fast gets a rate that is lower by `m^2`. The first power would
make the first step as long as plain LoRA's, and was 1.4 to 2.4 times too high for LoRA-GA on all
three tasks. A start with shorter factors moves the weight more slowly at first, but keeps plain
LoRA's rate: after a few steps its factors are as long as Adam makes them. Ranks can differ, and the
middle one counts, since one long rank need not slow the others. (A start whose longest rank had 70 %
of the sum of squares on a language model got a rate by the sum that was 12 times too low there.)

**SVFit.** Its numbers are singular values, and Adam moves each by about the learning rate. So they get
a share of the weight's largest one. The share is from searches on four tasks, where it costs at
most 2 % of the loss. (A rate at which the first step moves the weight as far as plain LoRA's was up
to six times too low, which cost up to 7 %.)

**A new linear layer.** Adam's first step of rate `lr` moves an output by `lr` times the sum of its
inputs' sizes, as far as the signs of the gradient agree. At the rate here that is one: as much as
tells one class from another (`scripts/bench_heads.py`).
"""

import math

from jaxtyping import Float
from torch import Tensor

CONSTANT = 0.25
POWER = 2
ROW_LENGTH = 3**-0.5
"""Expected norm of a row of `A` as PEFT draws it: uniform in `+-1 / sqrt(in)`."""
SHARE_OF_LARGEST = 0.06
"""Adam's first step of a number of SVFit, over the largest singular value of the weight."""


def first_moves(
    A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], scaling: float
) -> Float[Tensor, " r"]:
    """Root mean square of what each rank adds to `s B A` in Adam's first step of rate 1."""
    of_A = A.float().square().sum(dim=1) / A.shape[1]
    of_B = B.float().square().sum(dim=0) / B.shape[0]
    return abs(scaling) * (of_A + of_B).sqrt()


def lora_rate(in_features: int, r: int, scaling: float) -> float:
    """Rate to begin with for plain LoRA, `1 / (4 sqrt(in s r))`; `scaling` is `s`, not zero."""
    return CONSTANT / math.sqrt(in_features * abs(scaling) * r)


def rate_of_start(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], scaling: float) -> float:
    """Rate to begin with for factors that start at `A` and `B`; `scaling` is `s`, not zero."""
    r, in_features = A.shape
    usual = abs(scaling) * ROW_LENGTH / math.sqrt(in_features)
    moved = first_moves(A, B, scaling).quantile(0.5).item()
    return lora_rate(in_features, r, scaling) * min(1.0, usual / max(moved, 1e-30)) ** POWER


def spectral_rate(largest: float) -> float:
    """Rate to begin with for the numbers `delta` of `U diag(delta) Vh` (orthonormal `U`, `Vh`).

    `largest` is the largest singular value of the weight.
    """
    return SHARE_OF_LARGEST * largest


def rate_of_new_layer(size: float) -> float:
    """Rate at which Adam's first step moves an output of a linear layer by one: `1 / size`.

    `size` is the mean of the sum of the sizes of its inputs' entries, not zero.
    """
    return 1 / size
