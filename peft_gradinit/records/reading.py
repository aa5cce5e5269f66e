"""Files of saved adapters, read whole; what is no ordinary file is not opened."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterError
from ..files import check_is_file


def read_dict(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a dict; `AdapterError` if it does not, or cannot be read."""
    try:
        check_is_file(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"cannot read {str(path)!r}: {error}; restore the saved adapter."
        ) from error
    if not isinstance(content, dict):
        raise AdapterError(
            f"{str(path)!r} holds a {type(content).__name__} where a dict is expected; restore the "
            "saved adapter."
        )
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    check_is_file(path)
    return load_file(path)
