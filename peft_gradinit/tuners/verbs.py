"""The functions that users call besides `get_peft_model`: `calibrate` and `initialize`."""

from typing import Any, cast

from peft import PeftModel
from torch import nn

from ..calibration import DEFERRED, Calibration, CalibrationResult
from ..errors import ConfigError
from ..layouts import is_sharded, uncompiled
from ..records import InitReport
from ..starts import (
    GradInitConfig,
    compute_start,
    measured,
    resolve_targets,
    with_converted_targets,
)
from .hosts import adapter_hosts
from .lora import GradInitModel, deferred_adapters, live_targets


def calibrate(model: nn.Module, config: GradInitConfig, data: Any) -> CalibrationResult:
    """Run the calibration pass alone, to save its result for configs made later or elsewhere.

    The model is not changed. One result serves all options that do not change the measurement
    (`direction`, `scale`, `stable_gamma`, `lora_alpha`, …).

    Args:
        model: the base model, or a `PeftModel` around it; of a compiled one, the model inside.
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
    model = uncompiled(model)  # the wrapper is in names of layers
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config = with_converted_targets(config, model)
    targets = resolve_targets(model, config)
    return measured(model, targets, config, Calibration.of(data))


def initialize(peft_model: nn.Module, data: Any, adapter_name: str = "default") -> InitReport:
    """Write the start of a deferred adapter into its existing parameters.

    Args:
        peft_model: a model whose adapter was made with `calibration="deferred"`, by `get_peft_model`
            or by Transformers' `add_adapter`; under FSDP the outermost module, which the training
            loop calls.
        data: whatever `calibration=` takes.
        adapter_name: which adapter.

    Returns:
        The report, also given by `init_report(peft_model, adapter_name)`.

    Raises:
        ConfigError: if there is no such adapter, it is of another kind, or it has its start.
    """
    runner = peft_model if is_sharded(peft_model) else None
    tuner, config = _deferred(peft_model, adapter_name)
    model = tuner.model
    if adapter_name not in deferred_adapters(model):
        raise ConfigError(
            f"adapter {adapter_name!r} has its start already, and initialising it again would undo "
            "its training; add a new adapter instead."
        )
    targets = live_targets(model, adapter_name)
    start = compute_start(model, targets, config, data, runner, adapter_name=adapter_name)
    return tuner.fill(adapter_name, start)


def _deferred(model: nn.Module, adapter_name: str) -> tuple[GradInitModel, GradInitConfig]:
    host: Any = next(iter(adapter_hosts(model)), None)
    tuner = host.base_model if isinstance(host, PeftModel) else _tuner_around(host)
    if not isinstance(tuner, GradInitModel):
        kinds = [type(config).__name__ for config in getattr(host, "peft_config", {}).values()]
        raise ConfigError(
            f"initialize starts adapters that were made with calibration={DEFERRED!r}, got "
            f"{type(model).__name__} (configs of its adapters: {kinds or None}); call "
            f"get_peft_model(model, LoraGAConfig(…, calibration={DEFERRED!r})) first."
        )
    if adapter_name not in tuner.peft_config:
        raise ConfigError(
            f"there is no adapter {adapter_name!r}; the model has {sorted(tuner.peft_config)}."
        )
    return tuner, cast("GradInitConfig", tuner.peft_config[adapter_name])


def _tuner_around(host: Any) -> GradInitModel | None:
    """A tuner for adapters that Transformers injected, whose own tuner is gone; `None` if none is ours."""
    configs = getattr(host, "peft_config", {})
    if not any(isinstance(config, GradInitConfig) for config in configs.values()):
        return None
    tuner = GradInitModel.__new__(GradInitModel)
    nn.Module.__init__(tuner)  # PEFT's would inject
    tuner.model, tuner.peft_config = host, configs
    return tuner


def _check_config(config: Any) -> None:
    if not isinstance(config, GradInitConfig):
        raise ConfigError(
            f"expected a config of this package, got {type(config).__module__}."
            f"{type(config).__name__}; pass peft_gradinit.LoraGAConfig, not peft.LoraGAConfig."
        )
