"""Ranks for the layers, suggested by what a calibration measured."""

from torch import Tensor

from ..calibration import CalibrationResult
from ..errors import ConfigError
from ..linalg import allocate_ranks
from ..starts import scores_of_all


def suggested_ranks(result: CalibrationResult, mean_rank: int) -> dict[str, int]:
    """Share `mean_rank` ranks a layer as a config with `rank_allocation` would.

    From gradients, the ranks capture most of the gradient of all layers together. From inputs, they
    explain the largest shares of their own layers' variance, as in EVA. All experts of a parameter
    have one rank, by the parameter's name. Every layer gets rank 1 at least, and none gets more
    than was measured.

    Raises:
        ConfigError: if the calibration measured less than `mean_rank` takes.
    """
    scores = _scores(result)
    measured = sum(map(len, scores.values())) // max(1, len(scores))
    if not 1 <= mean_rank <= measured:
        raise ConfigError(
            f"the calibration serves {measured} ranks a layer in the mean, so the mean rank must be "
            f"between 1 and {measured}, got {mean_rank}; calibrate with a larger r or rho."
        )
    return allocate_ranks(scores, mean_rank * len(scores), min_rank=1)


def _scores(result: CalibrationResult) -> dict[str, Tensor]:
    *_, allocation = result.need.allocations
    if allocation == "uniform":
        raise ConfigError(
            f"the calibration holds {result.need.title}, which cannot rank layers; calibrate for a "
            "method that measures gradients or inputs."
        )
    scores: dict[str, list[Tensor]] = {}
    for name, readouts in result.readouts.items():
        gains = result.need.scores(readouts, result.energy[name], allocation)
        scores.setdefault(name.rpartition("[")[0] or name, []).append(gains)
    return {name: scores_of_all(of, each_counts=False) for name, of in scores.items()}
