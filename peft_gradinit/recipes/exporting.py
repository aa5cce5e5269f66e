"""What a run writes: its adapter and further forms of it, in the place of those of an earlier run."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from peft import PeftModel

from ..export import ExportTarget, check_directory, export_adapter
from ..files import whole_folder
from ..records import CARD, PROVENANCE_FILE, unsaved
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
    output = Path(recipe.output)
    for folder in {*(output / target for target, _ in exports_of(recipe)), *_earlier(output)}:
        check_directory(folder, overwrite=True)


@contextmanager
def written_adapter(model: PeftModel, folder: Path, processor: Any) -> Iterator[None]:
    """Save an adapter with its tokenizer or processor; put it in place when the block ends without an error.

    The folder is replaced as a whole, so nothing of an earlier adapter is left but what people wrote into
    its card.

    Args:
        model: the trained model.
        folder: where the adapter goes.
        processor: what reads its data; saved if it can be.
    """
    with whole_folder(folder, overwrite=True, is_ours=lambda _: True) as new:
        for name in (CARD, PROVENANCE_FILE):
            if (folder / name).is_file():
                shutil.copy(folder / name, new)
        unsaved(new)
        model.save_pretrained(str(new))
        if hasattr(processor, "save_pretrained"):
            processor.save_pretrained(str(new))
        yield


def remove_exports(output: Path) -> None:
    """Remove the exports of an earlier run.

    Args:
        output: of the recipe.
    """
    for folder in _earlier(output):
        check_directory(folder, overwrite=True)
        shutil.rmtree(folder)


def write_exports(model: PeftModel, recipe: Recipe, processor: Any) -> None:
    """Write the exports; a merged model with what reads its data, so that it loads alone.

    Args:
        model: the trained model.
        recipe: which exports.
        processor: tokenizer or image processor, if it is one that can be saved.
    """
    saved = processor if hasattr(processor, "save_pretrained") else None
    for target, rank in exports_of(recipe):
        export_adapter(
            model,
            Path(recipe.output) / target,
            target,
            rank,
            overwrite=True,
            processing_class=saved if target == "merged" else None,
        )


def _earlier(output: Path) -> list[Path]:
    """Exports in an output, which are of an earlier run."""
    folders = (output / target for target in get_args(ExportTarget))
    return [folder for folder in folders if (folder / PROVENANCE_FILE).exists()]
