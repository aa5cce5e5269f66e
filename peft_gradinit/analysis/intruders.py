r"""Intruder dimensions: leading singular vectors of a fine-tuned weight that its base lacks.

A leading left singular vector of `W + dW` is an intruder if it resembles none of `W` itself
(https://arxiv.org/abs/2410.21228). `W` is always the *original* weight. Scaling an intruder's
singular value by a factor `f` is the update `(f - 1) sigma u v^T`. So the mitigated adapter is
exactly a LoRA again, whose rank is the old one plus the number of intruders.
"""

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from ..errors import ConfigError
from ..linalg import Factors, intruder_dimensions, joined, truncated_svd
from ..records import SavedAdapter

TOP, THRESHOLD = 10, 0.5
"""As in the paper: the ten leading vectors, and a largest cosine below one half."""


@dataclasses.dataclass(frozen=True)
class LayerIntruders:
    """The intruders of one layer.

    Attributes:
        name: the layer.
        positions: positions of the intruders among the singular values of `W + dW`, 1-based.
        singular_values: singular values of the intruders.
        mitigated: the update with the intruders scaled; the old one if there are none.
        error: relative error of the mitigated update by truncation.
    """

    name: str
    positions: tuple[int, ...]
    singular_values: tuple[float, ...]
    mitigated: Factors
    error: float = 0.0


def find_intruders(
    adapter: SavedAdapter,
    weight: Callable[[str], Tensor],
    *,
    top: int = TOP,
    threshold: float = THRESHOLD,
    factor: float = 0.0,
    rank: int | None = None,
) -> list[LayerIntruders]:
    """Find the intruders among the `top` leading vectors of every layer; scale them by `factor`.

    A vector is an intruder if its largest cosine is below `threshold`. A `factor` of 0 removes
    intruders, 1 keeps them. `rank` truncates the mitigated updates, which are exact by default.

    Raises:
        ConfigError: if an option is out of range.
    """
    adapter.check_untouched_base()
    if top < 1 or not 0 < threshold <= 1 or not 0 <= factor <= 1:
        raise ConfigError(
            f"intruders need top >= 1, 0 < threshold <= 1 and 0 <= factor <= 1; got top={top}, "
            f"threshold={threshold}, factor={factor}."
        )
    lines = []
    for name, update in adapter.layers.items():
        line = _of_layer(name, update, weight(name), (top, threshold, factor))
        if rank is not None and rank < line.mitigated.r:
            mitigated, error = line.mitigated.truncated(rank)
            line = dataclasses.replace(line, mitigated=mitigated, error=error)
        lines.append(line)
    return lines


def mitigated_updates(lines: list[LayerIntruders]) -> Mapping[str, Factors]:
    """The updates with their intruders scaled, by layer."""
    return {line.name: line.mitigated for line in lines}


def _of_layer(
    name: str, update: Factors, weight: Tensor, options: tuple[int, float, float]
) -> LayerIntruders:
    top, threshold, factor = options
    base = truncated_svd(weight, min(weight.shape))
    tuned = truncated_svd(weight + update.matrix(), min(top, *weight.shape))
    which = intruder_dimensions(tuned, base.U, threshold)
    S = tuned.S[which]
    if len(which):
        scaled = Factors(tuned.Vh[which], tuned.U[:, which] * ((factor - 1) * S))
        update = joined(update, scaled)
    return LayerIntruders(name, tuple((which + 1).tolist()), tuple(S.tolist()), update)
