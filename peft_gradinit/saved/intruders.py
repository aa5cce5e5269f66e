r"""Intruder dimensions: directions that fine-tuning puts in front of those of pre-training.

A leading left singular vector of `W + dW` is an intruder if it resembles none of `W` itself
(https://arxiv.org/abs/2410.21228). `W` is always the *original* weight. Scaling an intruder's
singular value by a factor `f` is the update `(f - 1) sigma u v^T`, so the mitigated adapter is a
LoRA again, exactly: of the rank of the old one plus the number of intruders.
"""

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from ..errors import ConfigError
from ..linalg import Factors, intruder_dimensions, joined, truncated_svd
from .adapters import SavedAdapter

TOP, THRESHOLD = 10, 0.5
"""As in the paper: the ten leading vectors, and a largest cosine below one half."""


@dataclasses.dataclass(frozen=True)
class LayerIntruders:
    """The intruders of one layer.

    Attributes:
        name: the layer.
        positions: of the intruders among the singular values of `W + dW`, 1-based.
        singular_values: theirs.
        mitigated: the update with the intruders scaled; the old one if there are none.
        error: what a truncation lost of the mitigated update, relative.
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
    """Find the intruders of every layer, and what the update would be with them scaled.

    Args:
        adapter: of an untouched base.
        weight: the original weight `(out, in)`, float32, of a layer by its name.
        top: how many leading vectors of the tuned weight are looked at.
        threshold: largest cosine below which a vector is an intruder.
        factor: what the intruders' singular values are multiplied with: 0 removes them, 1 keeps
            them.
        rank: truncate the mitigated updates to it. Default: keep them exact.

    Returns:
        One entry a layer.

    Raises:
        ConfigError: if an option is out of range.
    """
    adapter.check_untouched_base()
    if top < 1 or not 0 < threshold <= 1 or not 0 <= factor <= 1:
        raise ConfigError(
            f"intruders need top >= 1, 0 < threshold <= 1 and 0 <= factor <= 1; got top={top}, "
            f"threshold={threshold}, factor={factor}."
        )
    found = []
    for name, update in adapter.layers.items():
        line = _of_layer(name, update, weight(name), (top, threshold, factor))
        if rank is not None and rank < line.mitigated.r:
            mitigated, error = line.mitigated.truncated(rank)
            line = dataclasses.replace(line, mitigated=mitigated, error=error)
        found.append(line)
    return found


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
