"""What a config would measure, on a model that may have no weights yet."""

from torch import nn

from .allocation import offered_rank
from .config import GradInitConfig
from .parameters import with_converted_targets
from .targets import resolve_targets


def planned_targets(model: nn.Module, config: GradInitConfig) -> dict[str, list[int]]:
    """What a calibration would measure: linear layers, and experts one by one.

    Args:
        model: the base model, also on the meta device.
        config: method, targets and ranks.

    Returns:
        `[out, in, triplets]` by module name, as in a fingerprint.
    """
    config = with_converted_targets(config, model)
    return {
        name: [*target.shape, config.n_triplets(offered_rank(target, config))]
        for name, target in resolve_targets(model, config).items()
        if target.shape is not None
    }
