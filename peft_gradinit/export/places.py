"""Folders of exports: which files in them an export wrote, so that another may replace them."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..errors import AdapterError, ExportError
from ..files import check_replaceable, check_writable
from ..records import CARD, PICTURE, PROVENANCE_FILE, read_dict

PROCESSING_FILES = "processing_files"
"""Key of `gradinit.json`: names of what a tokenizer or processor wrote."""
_FILES = (CONFIG_NAME, PROVENANCE_FILE, CARD, PICTURE, "config.json", "generation_config.json")
_WEIGHTS = re.compile(r"(adapter_)?model.*\.(safetensors|bin|safetensors\.index\.json)")


def check_directory(directory: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse a directory that `export_adapter` would refuse, before there is an adapter."""
    check_replaceable(Path(directory), overwrite, is_exported(directory))
    check_writable(Path(directory).parent)


def is_exported(directory: str | os.PathLike[str]) -> Callable[[str], bool]:
    """Whether an export wrote a file of that name in `directory`: by its name, or as `gradinit.json` says."""
    path = Path(directory) / PROVENANCE_FILE
    try:
        listed = read_dict(path).get(PROCESSING_FILES, []) if path.is_file() else []
    except AdapterError:  # damaged: it tells nothing
        listed = []
    return lambda name: name in _FILES or name in listed or _WEIGHTS.fullmatch(name) is not None


def save_processor(processor: Any, directory: Path) -> list[str]:
    """Save a tokenizer or processor into a folder.

    Args:
        processor: with a `save_pretrained` of its own.
        directory: an export.

    Returns:
        Names of the files that are new.

    Raises:
        ExportError: if it cannot be saved.
    """
    if not hasattr(processor, "save_pretrained"):
        raise ExportError(
            f"processing_class must be a tokenizer or processor with save_pretrained, got a "
            f"{type(processor).__name__}; leave it out if the model has none."
        )
    before = {path.name for path in directory.iterdir()}
    processor.save_pretrained(str(directory))
    return sorted({path.name for path in directory.iterdir()} - before)
