"""How a model's weights are laid out over devices and processes."""

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether running the model is a collective: all processes must run it equally often.

    Args:
        model: with FSDP1, FSDP2 or transformers' native sharding, or without.

    Returns:
        `True` if a weight, or a module, is spread over processes.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
