"""Which learning rate to begin with: read off an adapter's start, shapes and scaling."""

import statistics
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import ConfigError
from ..linalg import lora_rate, spectral_rate
from .parameters import n_experts
from .svfit_layer import SVFitLinear

FACTOR = 2.0
"""How far from the suggestion the best rate was found to be, for LoRA and LoRA-GA of its length; for others
up to 3.4 times (SVFit 8)."""


class LearningRate(NamedTuple):
    """A learning rate for AdamW.

    Attributes:
        suggested: to begin with.
        low: where a search should begin; for long runs.
        high: where a search should end.
    """

    suggested: float
    low: float
    high: float

    @classmethod
    def of_layers(cls, layers: Iterable[tuple[float | None, int]]) -> "LearningRate | None":
        """One rate for all layers: the median over their ranks, since layers of high rank do most.

        Args:
            layers: rate and rank of each; layers without a rate are left out.

        Returns:
            The rate and the range to search; `None` if no layer has a rate.
        """
        rates = [rate for rate, r in layers if rate is not None for _ in range(r)]
        if not rates:
            return None
        rate = statistics.median(rates)
        return cls(rate, rate / FACTOR, rate * FACTOR)

    def __str__(self) -> str:
        return f"{self.suggested:.1e} ({self.low:.1e} to {self.high:.1e})"


def suggest_learning_rate(peft_model: nn.Module, adapter_name: str = "default") -> LearningRate:
    """Suggest a learning rate for AdamW without a sweep.

    Where to begin, from widths, rank, scaling and the lengths of the start's factors
    (`linalg/rates.py`); runs of thousands of steps do better at the lower end. README shows how
    far from the best rate it was on three tasks.

    Args:
        peft_model: with an adapter of this package that has its start, or with plain LoRA of PEFT.
        adapter_name: which adapter.

    Returns:
        The rate and a range to search.

    Raises:
        ConfigError: if no layer has such an adapter, or only layers that are no matrices.
    """
    tuner = getattr(peft_model, "base_model", peft_model)
    report = getattr(tuner, "init_report", {}).get(adapter_name)
    if report is not None and report.learning_rate is not None:
        return report.learning_rate
    rate = LearningRate.of_layers(_rates_of_shapes(peft_model, adapter_name))
    if rate is None:
        raise ConfigError(
            f"no layer of the model has a LoRA or SVFit adapter named {adapter_name!r} on a matrix, so "
            "there is nothing to suggest a learning rate for."
        )
    return rate


def _rates_of_shapes(model: nn.Module, adapter_name: str) -> Iterator[tuple[float, int]]:
    for layer in model.modules():
        if isinstance(layer, SVFitLinear) and adapter_name in layer.r:
            r = layer.r[adapter_name]
            yield spectral_rate(layer.out_features, layer.in_features, r), r
        elif isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
            lora_A, scaling = layer.lora_A[adapter_name], layer.scaling[adapter_name]
            if isinstance(lora_A, nn.Linear) and scaling:
                r = lora_A.out_features // n_experts(layer)
                yield lora_rate(lora_A.in_features, r, scaling), r
