"""Which kind of thing a path holds."""

from pathlib import Path

from peft_gradinit.calibration import FILE_NAME


def is_calibration(path: str) -> bool:
    """Whether a path is of a calibration, file or folder; else it is taken for an adapter."""
    place = Path(path)
    return (place.is_file() and place.suffix == ".safetensors") or (place / FILE_NAME).exists()
