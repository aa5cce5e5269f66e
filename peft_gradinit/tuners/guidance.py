"""The learning rate to begin with, from an adapter's start, shapes and scaling."""

from collections.abc import Iterator

from torch import nn

from ..errors import ConfigError, NotInitializedError
from ..linalg import lora_rate, spectral_rate
from ..records import LearningRate, init_report
from .lora import deferred_adapters, pairs
from .svfit import live_layers


def suggest_learning_rate(peft_model: nn.Module, adapter_name: str = "default") -> LearningRate:
    """Suggest a learning rate for AdamW without a sweep.

    The rate follows from widths, rank, scaling and the lengths of the start's factors
    (`linalg/rates.py`). Runs of thousands of steps do better at the lower end of the range. README
    shows how far from the best rate it was on three tasks.

    Args:
        peft_model: with an adapter of this package that has its start, or with plain LoRA of PEFT.
        adapter_name: which adapter.

    Returns:
        The rate and a range to search.

    Raises:
        ConfigError: if no layer has such an adapter, or only layers that are no matrices.
        NotInitializedError: if the adapter is deferred.
    """
    if adapter_name in deferred_adapters(peft_model):
        raise NotInitializedError(
            f"adapter {adapter_name!r} is deferred, and its rate depends on the start that it gets; "
            "call initialize(model, data) before, or read init_report(model).learning_rate after "
            "training has begun with a CalibrationCallback."
        )
    report = init_report(peft_model, adapter_name)
    if report is not None and report.learning_rate is not None:
        return report.learning_rate
    rate = LearningRate.of_layers(_rates_of_shapes(peft_model, adapter_name))
    if rate is None:
        raise ConfigError(
            f"no layer of the model has a LoRA or SVFit adapter named {adapter_name!r} on a "
            "matrix, so there is nothing to suggest a learning rate for."
        )
    return rate


def _rates_of_shapes(model: nn.Module, adapter_name: str) -> Iterator[tuple[float, int]]:
    for layer in live_layers(model, adapter_name).values():
        r = layer.r[adapter_name]
        yield spectral_rate(layer.out_features, layer.in_features, r), r
    for pair in pairs(model, adapter_name):
        if pair.scaling:
            r = pair.A.shape[0] // pair.n_experts  # the trained rank, also of an anchored pair
            yield lora_rate(pair.A.shape[1], r, pair.scaling), r
