"""The recipes that come with the package."""

import os
from pathlib import Path

from ..errors import ConfigError
from .sections import nearest

_PACKAGED = Path(__file__).parent / "configs"
_CHECKOUT = Path(__file__).parents[2] / "configs"


def shipped() -> dict[str, Path]:
    """Files by name: the folder in `configs/` and the file, without its ending."""
    folder = _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT
    files = sorted(folder.glob("*/*.yaml"))
    return {f"{path.parent.name}/{path.stem}": path for path in files}


def recipe_path(recipe: str | os.PathLike[str]) -> Path:
    """The file of a recipe.

    Args:
        recipe: a file, or the name of one that ships, such as `small/smollm2_135m_chat`.

    Returns:
        Its path.

    Raises:
        ConfigError: if there is neither.
    """
    if (path := Path(recipe)).exists():
        return path
    known = shipped()
    name = os.fspath(recipe).removesuffix(".yaml").removeprefix("configs/")
    if name not in known:
        raise ConfigError(
            f"there is no recipe {os.fspath(recipe)!r}{nearest(name, known)}; give a file, or one of "
            "those that ship: peft-gradinit train --list."
        )
    return known[name]
