"""The learning rate to begin with, from an adapter's start, shapes and scaling."""

from collections.abc import Iterator

from torch import Tensor, nn

from ..errors import ConfigError, NotInitializedError
from ..linalg import lora_rate, rate_of_start, spectral_rate
from ..records import LearningRate, init_report
from .lora import deferred_adapters, pairs
from .svfit import live_layers

ADAMW = "adamw"
RATES = {"lora_muon": 0.03}
"""Rates of optimisers whose step depends on no shape and no scaling: in the middle of the best rates of
four tasks, 0.018 to 0.1, of rank 4 and 8 and widths from 64 to 576. On short answers it was 0.003 (one seed). All with a
momentum of 0.9; with the default of 0.8 the rate costs no more."""
SHARES = {"lora_one": 0.6, "lora_pro": 1 / 6, "lora_rite": 0.25}
"""Rates over AdamW's of optimisers that divide by a root mean square as Adam does, each in its default mode.
From the searches of the same four tasks, with plain LoRA and with starts of this package
(`scripts/rate_rule.py`)."""


def suggest_learning_rate(
    peft_model: nn.Module, adapter_name: str = "default", *, optimizer: str = ADAMW
) -> LearningRate:
    """Suggest a learning rate without a sweep.

    The rate follows from widths, rank, scaling and the lengths of the start's factors
    (`linalg/rates.py`). Runs of thousands of steps do better at the lower end of the range. The
    benchmarks show how far from the best rate it was on three tasks.

    Args:
        peft_model: with an adapter of this package that has its start, or with LoRA of PEFT, also from
            PEFT's own starts. (One that was saved and loaded as plain LoRA gets the rate of its shapes.)
        adapter_name: which adapter.
        optimizer: `"adamw"` (default), or an optimiser of pairs in its default mode: `"lora_muon"`,
            whose rate is the same for all models, `"lora_one"`, `"lora_pro"` or `"lora_rite"`, whose
            rates are shares of AdamW's.

    Returns:
        The rate and a range to search.

    Raises:
        ConfigError: if no layer has such an adapter, or only layers that are no matrices, or no rule
            is known for the optimiser.
        NotInitializedError: if the adapter is deferred, and the rate depends on its start.
    """
    if optimizer in RATES:
        return _rate_of_pairs(optimizer, peft_model, adapter_name)
    if adapter_name in deferred_adapters(peft_model):
        raise NotInitializedError(
            f"adapter {adapter_name!r} is deferred, and its rate depends on the start that it gets; "
            "call initialize(model, data) before, or read init_report(model).learning_rate after "
            "training has begun with a CalibrationCallback."
        )
    share = _share_of_adamw(optimizer, peft_model, adapter_name)
    return LearningRate(*(share * rate for rate in _rate_of_adamw(peft_model, adapter_name)))


def _rate_of_adamw(peft_model: nn.Module, adapter_name: str) -> LearningRate:
    report = init_report(peft_model, adapter_name)
    if report is not None and report.learning_rate is not None:
        return report.learning_rate
    rate = LearningRate.of_layers(_rates_of_layers(peft_model, adapter_name))
    if rate is None:
        raise ConfigError(
            f"no layer of the model has a LoRA or SVFit adapter named {adapter_name!r} on a "
            "matrix, so there is nothing to suggest a learning rate for."
        )
    return rate


def _rate_of_pairs(optimizer: str, model: nn.Module, adapter_name: str) -> LearningRate:
    rate = LearningRate.of_layers((RATES[optimizer], 1) for _ in pairs(model, adapter_name))
    if rate is None:
        raise _no_pairs(optimizer, adapter_name)
    return rate


def _share_of_adamw(optimizer: str, model: nn.Module, adapter_name: str) -> float:
    if optimizer == ADAMW:
        return 1.0
    if optimizer not in SHARES:
        raise ConfigError(
            f"no rule is known for the rate of {optimizer!r}, only for "
            f"{[ADAMW, *RATES, *SHARES]}; search for it."
        )
    if next(iter(pairs(model, adapter_name)), None) is None:
        raise _no_pairs(optimizer, adapter_name)
    return SHARES[optimizer]


def _no_pairs(optimizer: str, adapter_name: str) -> ConfigError:
    return ConfigError(
        f"no layer of the model has a LoRA adapter named {adapter_name!r} on a matrix, so there is "
        f"nothing that {optimizer} could train."
    )


def _rates_of_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[float, int]]:
    for layer in live_layers(model, adapter_name).values():
        yield spectral_rate(layer.largest[adapter_name]), layer.r[adapter_name]
    has_start = _has_start_of_peft(model, adapter_name)
    for pair in pairs(model, adapter_name):
        if not pair.scaling:
            continue
        r = pair.A.shape[0] // pair.n_experts  # the trained rank, also of an anchored pair
        if has_start and pair.n_experts == 1 and type(pair.A.data) is Tensor and not pair.A.is_meta:
            yield rate_of_start(pair.A.detach(), pair.B.detach(), pair.scaling), r
        else:
            yield lora_rate(pair.A.shape[1], r, pair.scaling), r


def _has_start_of_peft(model: nn.Module, adapter_name: str) -> bool:
    """Whether PEFT has filled the factors otherwise than by default: PiSSA, OLoRA, Gaussian, and so on."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    return isinstance(getattr(config, "init_lora_weights", None), str)
