"""Which layers deserve rank, from what a calibration measured."""

from collections.abc import Mapping

from torch import Tensor

from ..calibration import CalibrationResult
from ..errors import ConfigError
from ..linalg import allocate_ranks


def suggested_ranks(result: CalibrationResult, mean_rank: int) -> dict[str, int]:
    """Share `mean_rank` ranks a layer where they capture most.

    For gradients the largest squared singular values of all layers together are kept, for inputs
    those that explain the largest share of their own layer's variance (as EVA does). Every layer
    keeps rank 1 at least; none gets more than were measured.

    Args:
        result: what was measured.
        mean_rank: ranks a layer, on average.

    Returns:
        Ranks by layer.

    Raises:
        ConfigError: if fewer triplets were measured than `mean_rank`.
    """
    measured = min((len(svd.S) for svd in result.triplets.values()), default=0)
    if not 1 <= mean_rank <= measured:
        raise ConfigError(
            f"the calibration has {measured} singular triplets in its smallest layer, so the mean "
            f"rank must be between 1 and {measured}, got {mean_rank}; calibrate with a larger r "
            "or rho."
        )
    scores = _scores(result)
    return allocate_ranks(scores, mean_rank * len(scores), min_rank=1)


def _scores(result: CalibrationResult) -> Mapping[str, Tensor]:
    squares = {name: svd.S.double().square() for name, svd in result.triplets.items()}
    if result.fingerprint.statistic == "gradient":
        return squares
    return {name: s / max(result.energy[name], 1e-300) for name, s in squares.items()}
