"""`gradinit.json`: the facts about an adapter that its plain LoRA files have no place for."""

import dataclasses
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

from ..errors import AdapterError, DataError
from ..files import write_json
from .digests import digest_of_facts, file_digests
from .hub import hub_id
from .live import AdapterRecord
from .names import PROVENANCE_FILE
from .publishing import saved
from .reading import read_dict

FORMAT = "peft_gradinit.adapter/1"
EXPORT_FORMAT = "peft_gradinit.export/1"
_PACKAGES = ("peft_gradinit", "peft", "transformers", "accelerate", "torch")


def write_provenance(directory: str | os.PathLike[str], config: Any, record: AdapterRecord) -> None:
    """Write a live adapter's `gradinit.json` into an existing folder, and complete its card."""
    directory = Path(directory)
    content = {"format": FORMAT, **facts_of(config, record)}
    content["files"] = file_digests(directory, record)
    content["sha256"] = digest_of_facts(content)
    write_json(directory / PROVENANCE_FILE, content)
    saved(directory, record.name)


def facts_of(config: Any, record: AdapterRecord | None) -> dict[str, Any]:
    """The facts about a live adapter as plain dicts, without any path of this machine.

    `config` is of this package or of PEFT. Adapters of PEFT have no record.
    """
    record = record or AdapterRecord()
    values = _plain({**dataclasses.asdict(config), **record.resolved})
    values.pop("runtime_config", None)  # as PEFT does on saving
    values["base_model_name_or_path"] = hub_id(values.get("base_model_name_or_path"))
    fingerprint = record.fingerprint
    return {
        "method": getattr(config, "method", "LoRA"),
        "about": {name: getattr(config, name, None) for name in ("paper", "start", "anchored")},
        "config_class": type(config).__name__,
        "config": values,
        "report": record.report.to_dict() if record.report else None,
        "fingerprint": dataclasses.asdict(fingerprint) if fingerprint else None,
        "classes": record.classes,
        "padding": record.padding,
        "dataset": _dataset_id(config),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def read_provenance(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the `gradinit.json` of a saved adapter; `DataError` if it cannot serve training."""
    path = Path(directory) / PROVENANCE_FILE
    if not path.exists():
        raise DataError(
            f"{str(directory)!r} holds no {PROVENANCE_FILE}, so it was not saved from an adapter "
            "of this package; load plain LoRA with PeftModel.from_pretrained(…, is_trainable=True)."
        )
    try:
        content = read_dict(path)
    except AdapterError as error:
        raise DataError(str(error)) from error
    if (got := content.get("format")) != FORMAT:
        if got == EXPORT_FORMAT:
            raise DataError(
                f"{str(directory)!r} was written by export_adapter and holds no state to train on; "
                "pass what save_pretrained wrote, or load it with PeftModel.from_pretrained(…, "
                "is_trainable=True) as plain LoRA."
            )
        raise DataError(
            f"{str(path)!r} has format {got!r}, expected {FORMAT!r}; update the package."
        )
    if content.get("sha256", digest := digest_of_facts(content)) != digest:
        raise DataError(
            f"{str(path)!r} is damaged or was changed: its SHA-256 is not the one that it holds; "
            "restore the saved adapter."
        )
    return content


def _dataset_id(config: Any) -> str | None:
    """The Hub name of the calibration data, if `datasets` has recorded a download from there."""
    data = getattr(getattr(config, "calibration", None), "data", None)
    info = getattr(getattr(data, "dataset", data), "info", None)
    for url in getattr(info, "download_checksums", None) or {}:
        if found := re.match(r"hf://datasets/([^@]+)@", url):
            return found[1]
    return None


def _plain(value: Any) -> Any:
    """A value of a config with its sets sorted into lists and its enums as their values."""
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
