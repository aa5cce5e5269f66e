"""`gradinit.json`: what must be remembered of an adapter beyond its plain LoRA files."""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from .config import GradInitConfig
    from .svfit_config import SpectralConfig

FILE_NAME = "gradinit.json"
FORMAT = "peft_gradinit.adapter/1"
_PACKAGES = ("peft_gradinit", "peft", "transformers", "accelerate", "torch")


def write_provenance(
    directory: str | os.PathLike[str], config: "GradInitConfig | SpectralConfig"
) -> None:
    """Write `gradinit.json` beside `adapter_config.json`.

    Args:
        directory: an existing folder.
        config: the live config; its report and fingerprint are included if there are any.
    """
    report, fingerprint = config.init_report, config.fingerprint
    content = {
        "format": FORMAT,
        "method": config.method,
        "config_class": type(config).__name__,
        "config": _plain(config.to_dict()),
        "report": report.to_dict() if report else None,
        "fingerprint": dataclasses.asdict(fingerprint) if fingerprint else None,
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    path = Path(directory) / FILE_NAME
    beside = path.with_name(f".{FILE_NAME}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(content, indent=2, sort_keys=True))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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
        content = json.loads(path.read_text())
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
        raise DataError(
            f"{str(path)!r} has format {got!r}, expected {FORMAT!r}; update the package."
        )
    return content


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
