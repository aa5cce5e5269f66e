"""The functions that users call besides `get_peft_model`: `calibrate` and `initialize`."""

from typing import Any, cast

from peft import PeftModel
from torch import nn

from ..calibration import DEFERRED, Calibration, CalibrationResult
from ..errors import ConfigError
from ..layouts import is_sharded
from ..records import InitReport
from ..starts import (
    GradInitConfig,
    compute_start,
    measured,
    resolve_targets,
    with_converted_targets,
)
from .lora import GradInitModel, deferred_adapters, live_targets


def calibrate(model: nn.Module, config: GradInitConfig, data: Any) -> CalibrationResult:
    """Run the calibration pass alone, to save its result for configs made later or elsewhere.

    The model is not changed. One result serves all options that do not change the measurement
    (`direction`, `scale`, `stable_gamma`, `lora_alpha`, …).

    Args:
        model: the base model, or a `PeftModel` around it.
        config: method, targets and ranks; its own `calibration` is not used.
        data: whatever `calibration=` takes.

    Returns:
        The result; `result.save(path)` writes it, `calibration=path` reads it.

    Raises:
        ConfigError: if `config` is not of this package.
    """
    _check_config(config)
    if not config.needs().reads_data:
        raise ConfigError(
            f"{type(config).__name__} computes its start from the weights alone: there is nothing "
            "to calibrate; pass the config to get_peft_model."
        )
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config = with_converted_targets(config, model)
    targets = resolve_targets(model, config)
    return measured(model, targets, config, Calibration.of(data))


def initialize(peft_model: nn.Module, data: Any, adapter_name: str = "default") -> InitReport:
    """Write the start of a deferred adapter into its existing parameters.

    Args:
        peft_model: a model whose adapter was made with `calibration="deferred"`; under FSDP the
            outermost module, which the training loop calls.
        data: whatever `calibration=` takes.
        adapter_name: which adapter.

    Returns:
        The report, also given by `init_report(peft_model, adapter_name)`.

    Raises:
        ConfigError: if there is no such adapter, it is of another kind, or it has its start.
    """
    runner = peft_model if is_sharded(peft_model) else None
    tuner, config = _deferred(_peft_model_in(peft_model), adapter_name)
    model = tuner.model
    if adapter_name not in deferred_adapters(model):
        raise ConfigError(
            f"adapter {adapter_name!r} has its start already, and initialising it again would undo "
            "its training; add a new adapter instead."
        )
    targets = live_targets(model, adapter_name)
    return tuner.fill(adapter_name, compute_start(model, targets, config, data, runner))


def _peft_model_in(model: nn.Module) -> nn.Module:
    """The `PeftModel` inside wrappers such as FSDP1 and DDP; the model if there is none."""
    return next((m for m in model.modules() if isinstance(m, PeftModel)), model)


def _deferred(peft_model: Any, adapter_name: str) -> tuple[GradInitModel, GradInitConfig]:
    tuner = getattr(peft_model, "base_model", None)
    if not isinstance(tuner, GradInitModel):
        raise ConfigError(
            f"initialize expects a PeftModel made with a config of this package, got "
            f"{type(peft_model).__name__} around {type(tuner).__name__}; call "
            f"get_peft_model(model, LoraGAConfig(…, calibration={DEFERRED!r})) first."
        )
    if adapter_name not in tuner.peft_config:
        raise ConfigError(
            f"there is no adapter {adapter_name!r}; the model has {sorted(tuner.peft_config)}."
        )
    return tuner, cast("GradInitConfig", tuner.peft_config[adapter_name])


def _check_config(config: Any) -> None:
    if not isinstance(config, GradInitConfig):
        raise ConfigError(
            f"expected a config of this package, got {type(config).__module__}."
            f"{type(config).__name__}; pass peft_gradinit.LoraGAConfig, not peft.LoraGAConfig."
        )
