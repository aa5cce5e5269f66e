"""`gradinit.json`: what must be remembered of an adapter beyond its plain LoRA files."""

import dataclasses
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..files import write_json
from .publishing import hub_id, saved

if TYPE_CHECKING:
    from .config import GradInitConfig
    from .svfit_config import SpectralConfig

FILE_NAME = "gradinit.json"
FORMAT = "peft_gradinit.adapter/1"
EXPORT_FORMAT = "peft_gradinit.export/1"
_PACKAGES = ("peft_gradinit", "peft", "transformers", "accelerate", "torch")


def write_provenance(
    directory: str | os.PathLike[str], config: "GradInitConfig | SpectralConfig"
) -> None:
    """Write `gradinit.json` beside `adapter_config.json`.

    Args:
        directory: an existing folder.
        config: the live config; its report and fingerprint are included if there are any.
    """
    write_json(Path(directory) / FILE_NAME, {"format": FORMAT, **facts_of(config)})
    saved(Path(directory))


def facts_of(config: Any) -> dict[str, Any]:
    """What is worth knowing of an adapter, for JSON; no path of the machine is in it.

    Args:
        config: the live config, or one of PEFT.

    Returns:
        Method, config, report, fingerprint, the data's name on the Hub, and versions.
    """
    report, fingerprint = (getattr(config, name, None) for name in ("init_report", "fingerprint"))
    values = _plain(config.to_dict())
    values["base_model_name_or_path"] = hub_id(values.get("base_model_name_or_path"))
    return {
        "method": getattr(config, "method", "LoRA"),
        "config_class": type(config).__name__,
        "config": values,
        "report": report.to_dict() if report else None,
        "fingerprint": dataclasses.asdict(fingerprint) if fingerprint else None,
        "dataset": _dataset_id(config),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def read_provenance(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_provenance` wrote.

    Args:
        directory: a saved adapter.

    Returns:
        The content of `gradinit.json`.

    Raises:
        DataError: if there is none, or it is not one.
    """
    path = Path(directory) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{str(directory)!r} holds no {FILE_NAME}, so it was not saved from an adapter of this "
            "package; load plain LoRA with PeftModel.from_pretrained(…, is_trainable=True)."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error}; restore the saved adapter."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        if got == EXPORT_FORMAT:
            raise DataError(
                f"{str(directory)!r} was written by export_adapter and holds no state to train on; "
                "pass what save_pretrained wrote, or load it with PeftModel.from_pretrained(…, "
                "is_trainable=True) as plain LoRA."
            )
        raise DataError(
            f"{str(path)!r} has format {got!r}, expected {FORMAT!r}; update the package."
        )
    return content


def _dataset_id(config: Any) -> str | None:
    """The Hub name of the calibration data, where `datasets` has recorded what it downloaded."""
    data = getattr(getattr(config, "calibration", None), "data", None)
    info = getattr(getattr(data, "dataset", data), "info", None)
    for url in getattr(info, "download_checksums", None) or {}:
        if found := re.match(r"hf://datasets/([^@]+)@", url):
            return found[1]
    return None


def _plain(value: Any) -> Any:
    """Sets and enums as JSON knows them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return getattr(value, "value", value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
