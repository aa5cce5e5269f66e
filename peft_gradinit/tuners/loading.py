"""`load_for_training`: a saved adapter in the form in which it was trained."""

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

from ..calibration import RESTORED
from ..errors import DataError, FingerprintError
from ..layouts import has_offloaded
from ..records import InitReport, read_provenance, records_of
from ..starts import GradInitConfig, SpectralConfig, base_fingerprint
from ..statistics import Fingerprint
from .lora import adapted_layers, is_deferred
from .rollback import all_or_nothing, remove_adapter


def load_for_training(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    allow_mismatch: bool = False,
) -> PeftModel:
    """Load a saved adapter in the form in which it was trained, to continue training it.

    `PeftModel.from_pretrained` gives the same function as a plain LoRA of the saved rank. This
    function restores the live adapter, with its rank and its anchor, without a new calibration.

    Args:
        model: the untouched base model, or a `PeftModel` to add the adapter to.
        directory: the folder that `save_pretrained` wrote, or a checkpoint of `Trainer`.
        adapter_name: name of the adapter in the model.
        allow_mismatch: load although the adapter was made on other base weights.

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
    record = records_of(peft_model)[adapter_name]
    record.fingerprint, record.report = fingerprint, report
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
            f"{str(directory)!r} holds none of {names}, so there is no adapter to load; restore "
            "the saved adapter."
        )
    file = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    try:
        if file.exists():
            with safe_open(file, "pt"):
                pass
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{str(file)!r} cannot be read ({error}); a run that was killed while it saved leaves "
            "such a file: load the checkpoint before it, or restore the saved adapter."
        ) from error


def _check_complete(model: nn.Module, adapter_name: str, directory: str | os.PathLike[str]) -> None:
    """Refuse loaded weights without a layer that would then run without its adapter."""
    layers = adapted_layers(model, adapter_name)
    lacking = [name for name, layer in layers if is_deferred(layer, adapter_name)]
    if lacking:
        raise DataError(
            f"the weights in {str(directory)!r} lack {len(lacking)} layers that their "
            f"gradinit.json describes ({lacking[0]}, …); restore the saved adapter."
        )


def _check_options(
    config_cls: type,
    values: dict[str, Any],
    content: dict[str, Any],
    directory: str | os.PathLike[str],
) -> None:
    """Refuse unknown options of a later version, without which the adapter would be another one."""
    known = {field.name for field in dataclasses.fields(config_cls)}
    if unknown := sorted(values.keys() - known):
        versions = content.get("versions") or {}
        wrote = ", ".join(f"{n} {versions.get(n, '?')}" for n in ("peft_gradinit", "peft"))
        raise DataError(
            f"the gradinit.json of {str(directory)!r} has options that {config_cls.__name__} does "
            f"not know here: {unknown}; they were written by {wrote}: update these packages."
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
    if isinstance(config, GradInitConfig):
        config.calibration = RESTORED  # pyright: ignore[reportAttributeAccessIssue]
    config.inference_mode = False
    config.base_model_name_or_path = None  # the fingerprint identifies the base
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
                f"the adapter in {str(directory)!r} was made on another base model: {name} has "
                f"hash {want} there and {got} here; load that base, or pass allow_mismatch=True."
            )
