"""What users call besides `get_peft_model`: `calibrate`, `initialize`, `load_for_training`."""

import dataclasses
import os
from pathlib import Path
from typing import Any, cast

import peft
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from ..calibration import DEFERRED, Calibration, CalibrationResult, has_offloaded, is_sharded
from ..errors import ConfigError, DataError, FingerprintError
from ..statistics import Fingerprint
from .config import GradInitConfig
from .model import GradInitModel
from .parameters import with_converted_targets
from .pending import is_pending
from .provenance import read_provenance
from .report import InitReport
from .rollback import all_or_nothing, remove_adapter
from .start import base_fingerprint, compute_start, measured
from .svfit_config import SpectralConfig
from .targets import live_targets, resolve_targets


def calibrate(model: nn.Module, config: GradInitConfig, data: Any) -> CalibrationResult:
    """Run the calibration pass alone, to save its result for configs made later or elsewhere.

    The model is not changed. One result serves every option of the method that does not need
    another measurement (`direction`, `scale`, `stable_gamma`, `lora_alpha`, …).

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
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    config = with_converted_targets(config, model)
    targets = resolve_targets(model, config)
    return measured(model, targets, config, Calibration.of(data))


def initialize(peft_model: nn.Module, data: Any, adapter_name: str = "default") -> InitReport:
    """Give a deferred adapter its start, in place: parameters stay the objects that they are.

    Args:
        peft_model: a model whose adapter was made with `calibration="deferred"`; if FSDP shards it,
            the outermost module, which the training loop calls.
        data: whatever `calibration=` takes.
        adapter_name: which adapter.

    Returns:
        The report, also at `peft_model.base_model.init_report[adapter_name]`.

    Raises:
        ConfigError: if there is no such adapter, it is of another kind, or it has its start.
    """
    runner = peft_model if is_sharded(peft_model) else None
    tuner, config = _deferred(_peft_model_in(peft_model), adapter_name)
    model = tuner.model
    targets = live_targets(model, config, adapter_name)
    if not any(is_pending(module, adapter_name) for module in model.modules()):
        raise ConfigError(
            f"adapter {adapter_name!r} has its start already, and initialising it again would undo "
            "its training; add a new adapter instead."
        )
    return tuner.fill(adapter_name, compute_start(model, targets, config, data, runner))


def load_for_training(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    allow_mismatch: bool = False,
) -> PeftModel:
    """Load a saved adapter in the form in which it was trained, to continue training it.

    `PeftModel.from_pretrained` gives the same function as a plain LoRA of the saved rank; this
    gives the live adapter back, with its own rank and its anchor, without calibrating again.

    Args:
        model: the untouched base model, or a `PeftModel` to add the adapter to.
        directory: what `save_pretrained` or a `Trainer` checkpoint wrote.
        adapter_name: name of the adapter in the model.
        allow_mismatch: load although the base weights differ from those that it was made on.

    Returns:
        The `PeftModel`, its adapter active and trainable.

    Raises:
        DataError: if the directory holds no readable `gradinit.json`, or no readable weights.
        FingerprintError: if the base model has other weights.
    """
    content = read_provenance(directory)
    config = _restored_config(content, directory)
    fingerprint, report = _restored_facts(content, directory)
    if not allow_mismatch:
        _check_base(model, config, content["fingerprint"], directory)
    _check_weights(directory)
    if isinstance(model, PeftModel):
        peft_model = model
        peft_model.add_adapter(adapter_name, config)
    else:
        peft_model = get_peft_model(model, config, adapter_name)
    tuner = cast("BaseTuner", peft_model.base_model)
    with all_or_nothing(peft_model, lambda: remove_adapter(tuner, adapter_name)):
        if has_offloaded(peft_model):  # PEFT's `load_adapter` would dispatch the model anew
            set_peft_model_state_dict(
                peft_model, load_peft_weights(str(directory), "cpu"), adapter_name
            )
        else:
            peft_model.load_adapter(str(directory), adapter_name, is_trainable=True)
        _check_complete(peft_model, adapter_name, directory)
    peft_model.set_adapter(adapter_name)
    live = cast("GradInitConfig | SpectralConfig", peft_model.peft_config[adapter_name])
    live.fingerprint, live.init_report = fingerprint, report
    return peft_model


def _restored_facts(
    content: dict[str, Any], directory: str | os.PathLike[str]
) -> tuple[Fingerprint | None, InitReport | None]:
    try:
        fingerprint, report = content["fingerprint"], content["report"]
        return (
            Fingerprint(**fingerprint) if fingerprint else None,
            InitReport.from_dict(report) if report else None,
        )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the gradinit.json of {str(directory)!r} is damaged: {error!r}; restore the saved "
            "adapter, or update the package if a later version wrote it."
        ) from error


def _check_weights(directory: str | os.PathLike[str]) -> None:
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    if not any((Path(directory) / name).exists() for name in names):
        raise DataError(
            f"{str(directory)!r} holds none of {names}, so there is no adapter to load; restore the "
            "saved adapter."
        )
    file = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    try:
        if file.exists():
            with safe_open(file, "pt"):
                pass
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{str(file)!r} cannot be read ({error}); a run that was killed while it saved leaves such a "
            "file: load the checkpoint before it, or restore the saved adapter."
        ) from error


def _check_complete(model: nn.Module, adapter_name: str, directory: str | os.PathLike[str]) -> None:
    """Refuse weights that lack a layer, which would run without its adapter and not train.

    Args:
        model: with the weights loaded.
        adapter_name: the adapter.
        directory: where they are from, for the message.

    Raises:
        DataError: naming the first such layer.
    """
    lacking = [name for name, layer in model.named_modules() if is_pending(layer, adapter_name)]
    if lacking:
        raise DataError(
            f"the weights in {str(directory)!r} lack {len(lacking)} layers that their gradinit.json "
            f"describes ({lacking[0]}, …); restore the saved adapter."
        )


def _check_options(
    config_cls: type,
    values: dict[str, Any],
    content: dict[str, Any],
    directory: str | os.PathLike[str],
) -> None:
    """Refuse options that a later version has written: without them it would be another adapter.

    Args:
        config_cls: the class that they are for.
        values: options by name.
        content: of `gradinit.json`, which names the versions that wrote it.
        directory: where it is, for the message.

    Raises:
        DataError: naming the options.
    """
    known = {field.name for field in dataclasses.fields(config_cls)}
    if unknown := sorted(values.keys() - known):
        versions = content.get("versions") or {}
        wrote = ", ".join(f"{n} {versions.get(n, '?')}" for n in ("peft_gradinit", "peft"))
        raise DataError(
            f"the gradinit.json of {str(directory)!r} has options that {config_cls.__name__} does not know "
            f"here: {unknown}; they were written by {wrote}: update these packages."
        )


def _restored_config(
    content: dict[str, Any], directory: str | os.PathLike[str]
) -> GradInitConfig | SpectralConfig:
    try:
        values = dict(content["config"])
        config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(values.pop("peft_type"))]
        _check_options(config_cls, values, content, directory)
        config = cast("GradInitConfig | SpectralConfig", config_cls(**values))
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the config in the gradinit.json of {str(directory)!r} cannot be restored: {error!r}; "
            "restore the saved adapter, or update the package if a later version wrote it."
        ) from error
    config.restored = True
    config.inference_mode = False
    config.base_model_name_or_path = None  # the fingerprint tells the base, wherever it is from
    return config


def _check_base(
    model: nn.Module,
    config: GradInitConfig | SpectralConfig,
    stored: dict[str, Any] | None,
    directory: str | os.PathLike[str],
) -> None:
    if stored is None:
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, got in base_fingerprint(base, config).items():
        if (want := stored["weights"].get(name)) != got:
            raise FingerprintError(
                f"the adapter in {str(directory)!r} was made on another base model: {name} has hash "
                f"{want} there and {got} here; load that base, or pass allow_mismatch=True."
            )


def _peft_model_in(model: nn.Module) -> nn.Module:
    """The `PeftModel` inside of wrappers such as FSDP1 and DDP; the model if there is none."""
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
        hint = "peft_gradinit.LoraGAConfig, not peft.LoraGAConfig"
        raise ConfigError(
            f"expected a config of this package, got {type(config).__module__}."
            f"{type(config).__name__}; pass {hint}."
        )
