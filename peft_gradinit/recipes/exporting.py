"""What a run writes beside its adapter: further forms, in the place of those of an earlier run."""

import shutil
from pathlib import Path
from typing import get_args

from peft import PeftModel

from ..export import ExportTarget, check_directory, export_adapter
from ..records import PROVENANCE_FILE
from .schema import Recipe


def exports_of(recipe: Recipe) -> list[tuple[ExportTarget, int | None]]:
    """Forms and ranks of what is written beside the adapter itself."""
    rank = recipe.export.rank
    return [
        (target, rank if target != "merged" else None)
        for target in recipe.export.targets
        if target != "peft" or rank is not None
    ]


def check_places(recipe: Recipe) -> None:
    """Refuse an output whose exports hold files of others, before anything is trained.

    Args:
        recipe: where its exports go.
    """
    written = [Path(recipe.output) / target for target, _ in exports_of(recipe)]
    for folder in (*written, *_left(recipe)):
        check_directory(folder, overwrite=True)


def write_exports(model: PeftModel, recipe: Recipe) -> None:
    """Write the exports, and remove those that only an earlier run in the same output has written.

    Args:
        model: the trained model.
        recipe: which exports.
    """
    for folder in _left(recipe):
        check_directory(folder, overwrite=True)
        shutil.rmtree(folder)
    for target, rank in exports_of(recipe):
        export_adapter(model, Path(recipe.output) / target, target, rank, overwrite=True)


def _left(recipe: Recipe) -> list[Path]:
    """Exports of an earlier run that this one does not write again."""
    again = {target for target, _ in exports_of(recipe)}
    others = (Path(recipe.output) / target for target in get_args(ExportTarget))
    return [path for path in others if path.name not in again and (path / PROVENANCE_FILE).exists()]
