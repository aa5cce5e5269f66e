"""`load_for_training`: a saved adapter in the form in which it was trained."""

import dataclasses
import os
import re
from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import peft
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from ..calibration import RESTORED
from ..errors import OTHER_DTYPE, AdapterError, DataError, FingerprintError, GradInitError
from ..files import check_is_file
from ..records import (
    InitReport,
    adapter_folder,
    check_digests,
    check_finite,
    meaning,
    read_dict,
    read_provenance,
    read_tensors,
    records_of,
)
from ..starts import GradInitConfig, SpectralConfig, base_fingerprint
from ..statistics import Fingerprint
from .checks import check_host
from .lora import adapted_layers, is_deferred
from .rollback import all_or_nothing, remove_adapter


def load_for_training(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    allow_mismatch: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """Load a saved adapter in the form in which it was trained, to continue training it.

    `PeftModel.from_pretrained` gives the same function as a plain LoRA of the saved rank. This
    function restores the live adapter, with its rank and its anchor, without a new calibration.

    Args:
        model: the untouched base model, or a `PeftModel` to add the adapter to.
        directory: the folder that `save_pretrained` wrote, a checkpoint of `Trainer`, or the name
            of a repository on the Hub, `"me/adapter"`.
        adapter_name: name of the adapter in the model.
        allow_mismatch: load although the adapter was made on other base weights.
        subfolder: folder of the adapter in the directory or repository.
        revision: branch, tag or commit of the repository.
        token: token for the Hub; `True` for the one that is stored.
        autocast_adapter_dtype: as in PEFT's `get_peft_model`: hold an adapter on layers of float16 or
            bfloat16 in float32; `False`: in the dtype of its layers. SVFit's is float32 in any case.

    Returns:
        The `PeftModel`, its adapter active and trainable.

    Raises:
        DataError: if the directory holds no readable `gradinit.json` or no readable weights, or if
            they are damaged or of different saves.
        FingerprintError: if the base model has other weights.
    """
    directory = adapter_folder(directory, subfolder, revision, token)
    content = read_provenance(directory)
    config = _restored_config(content, directory)
    facts = _restored_facts(content, directory)
    weights = _checked_weights(directory, content, config)
    if not allow_mismatch:
        _check_base(model, config, content["fingerprint"], directory, weights)
    peft_model = _with_adapter(model, config, adapter_name, directory, autocast_adapter_dtype)
    tuner = cast("BaseTuner", peft_model.base_model)
    with all_or_nothing(peft_model, lambda: remove_adapter(tuner, adapter_name)):
        _load(peft_model, adapter_name, directory, weights)
    peft_model.set_adapter(adapter_name)
    record = records_of(peft_model)[adapter_name]
    record.fingerprint, record.report = facts
    return peft_model


def restore_record(model: nn.Module, directory: str, adapter_name: str = "default") -> None:
    """Give an adapter, whose weights a trainer loads from a checkpoint, the record that was saved there.

    Args:
        model: with the adapter.
        directory: the checkpoint.
        adapter_name: name of the adapter.

    Raises:
        DataError: if the checkpoint holds no readable `gradinit.json`.
    """
    record = records_of(model)[adapter_name]
    record.fingerprint, record.report = _restored_facts(read_provenance(directory), directory)


def _with_adapter(
    model: nn.Module,
    config: GradInitConfig | SpectralConfig,
    adapter_name: str,
    directory: str | os.PathLike[str],
    autocast: bool,
) -> PeftModel:
    check_host(model, config, adapter_name)
    try:
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name, autocast_adapter_dtype=autocast)
        model.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast)
        return model
    except GradInitError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"PEFT cannot add the adapter that the gradinit.json of {str(directory)!r} describes: "
            f"{error!r}; give the model that it was made on, or restore the saved adapter."
        ) from error


def _restored_facts(
    content: dict[str, Any], directory: str | os.PathLike[str]
) -> tuple[Fingerprint | None, InitReport | None]:
    try:
        fingerprint, report = content["fingerprint"], content["report"]
        return (
            Fingerprint(**fingerprint) if fingerprint else None,
            InitReport.from_dict(report) if report else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the gradinit.json of {str(directory)!r} is damaged: {error!r}; restore the saved "
            "adapter, or update the package if a later version wrote it."
        ) from error


def _checked_weights(
    directory: str | os.PathLike[str],
    content: dict[str, Any],
    config: GradInitConfig | SpectralConfig,
) -> dict[str, Tensor]:
    """Read the weights, which must be finite and of the same save as the files beside them."""
    folder = Path(directory)
    weights = _read_weights(folder)
    try:
        check_digests(folder, content, weights)
        check_finite(folder, weights)
        _check_config(folder, config)
    except AdapterError as error:
        raise DataError(str(error)) from error
    return weights


def _read_weights(folder: Path) -> dict[str, Tensor]:
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    file = next((folder / name for name in names if (folder / name).exists()), None)
    if file is None:
        raise DataError(
            f"{str(folder)!r} holds none of {names}, so there is no adapter to load; restore "
            "the saved adapter."
        )
    try:
        if file.name == SAFETENSORS_WEIGHTS_NAME:
            return read_tensors(file)
        check_is_file(file)
        return load_peft_weights(str(folder), "cpu")
    except (SafetensorError, OSError, ValueError, RuntimeError, UnpicklingError) as error:
        raise DataError(
            f"{str(file)!r} cannot be read ({error}); a run that was killed while it saved leaves "
            "such a file: load the checkpoint before it, or restore the saved adapter."
        ) from error


def _check_config(folder: Path, config: GradInitConfig | SpectralConfig) -> None:
    """Refuse an `adapter_config.json` that gives the same file another function."""
    if isinstance(config, SpectralConfig) or not (folder / CONFIG_NAME).exists():
        return
    want, got = meaning(config.saved_config().to_dict()), meaning(read_dict(folder / CONFIG_NAME))
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if want.get(name) != got.get(name):
            raise AdapterError(
                f"{str(folder / CONFIG_NAME)!r} has {name}={got.get(name)!r}, but the "
                f"gradinit.json beside it needs {want.get(name)!r}: one of them is damaged or of "
                "another save; restore the saved adapter."
            )


def _load(
    model: PeftModel,
    adapter_name: str,
    directory: str | os.PathLike[str],
    weights: dict[str, Tensor],
) -> None:
    """Load weights with PEFT; refuse keys that are unknown or lacking, and shapes that differ."""
    try:  # PEFT's `load_adapter` would read them again, and dispatch an offloaded model anew
        result = set_peft_model_state_dict(model, weights, adapter_name)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(
            f"the weights in {str(directory)!r} are not those that their gradinit.json describes: "
            f"{error!r}; restore the saved adapter."
        ) from error
    except RuntimeError as error:
        if (first := re.search(r"size mismatch for .*", str(error))) is None:
            raise
        raise DataError(
            f"the weights in {str(directory)!r} have other shapes than their gradinit.json "
            f"describes: {first[0].rstrip('.')}; load them on the base model that they were made "
            "on, with its vocabulary, or restore the saved adapter."
        ) from error
    _check_keys(model, result, adapter_name, directory)


def _check_keys(
    model: PeftModel, result: Any, adapter_name: str, directory: str | os.PathLike[str]
) -> None:
    """Refuse loaded weights that lack entries of the adapter, or have entries of another one."""
    name = re.compile(rf"\.{re.escape(adapter_name)}(?:\.|$)")
    prefix = cast("BaseTuner", model.base_model).prefix  # tied trained tokens are not loaded twice
    missing = [key for key in result.missing_keys if prefix in key and name.search(key)]
    lacking = {name.split(key)[0] for key in missing}
    layers = adapted_layers(model, adapter_name)
    waiting = {layer for layer, module in layers if is_deferred(module, adapter_name)}
    if absent := sorted(lacking or waiting):  # a layer that waits would run without its adapter
        raise DataError(
            f"the weights in {str(directory)!r} lack {len(absent)} entries that their "
            f"gradinit.json describes ({absent[0]}, …); restore the saved adapter."
        )
    if unknown := unknown_entries(model, result, adapter_name):
        raise DataError(
            f"the weights in {str(directory)!r} have {len(unknown)} entries that are unknown to "
            f"the adapter ({unknown[0]}, …); restore the saved adapter."
        )


def unknown_entries(model: PeftModel, result: Any, adapter_name: str) -> list[str]:
    """Entries of a file that a model with its adapter has no place for.

    Args:
        model: after loading.
        result: what PEFT gives for it.
        adapter_name: of the adapter.

    Returns:
        Their keys, sorted.
    """
    if not result.unexpected_keys:
        return []
    # PEFT saves trained tokens of tied embeddings twice, and loads them once.
    embeddings = hasattr(model, "get_input_embeddings")
    own = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=embeddings
    )
    return sorted(set(result.unexpected_keys) - own.keys())


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
        names = config.modules_to_save or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"modules_to_save={names!r} is no list of names")
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the config in the gradinit.json of {str(directory)!r} cannot be restored: {error!r}; "
            "restore the saved adapter, or update the package if a later version wrote it."
        ) from error
    if isinstance(config, GradInitConfig):
        config.calibration = RESTORED  # pyright: ignore[reportAttributeAccessIssue]
    config.inference_mode = False
    config.base_model_name_or_path = None  # the fingerprint identifies the base
    return config


def check_base(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Refuse a base model with other weights than those that a saved adapter was made on.

    Args:
        model: without adapters.
        directory: of the adapter, or its name on the Hub; without a `gradinit.json` nothing is known.

    Raises:
        FingerprintError: naming a weight.
    """
    directory = adapter_folder(directory)
    try:
        content = read_provenance(directory)
    except DataError:
        return
    config = _restored_config(content, directory)
    weights = _checked_weights(directory, content, config)
    _check_base(model, config, content["fingerprint"], directory, weights)


def _check_base(
    model: nn.Module,
    config: GradInitConfig | SpectralConfig,
    stored: dict[str, Any] | None,
    directory: str | os.PathLike[str],
    saved: Collection[str],
) -> None:
    if stored is None:
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, got in base_fingerprint(base, config, saved).items():
        if (want := stored["weights"].get(name)) != got:
            raise FingerprintError(
                f"the adapter in {str(directory)!r} was made on another base model: {name} has "
                f"hash {want} there and {got} here; load that base. In Python, load_for_training(..., "
                f"allow_mismatch=True) loads it onto this one. {OTHER_DTYPE}"
            )
