"""Names of repositories on the Hub, and adapters that are there."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import DataError
from .names import PROVENANCE_FILE


def hub_id(name: str | None) -> str | None:
    """`name` if it is that of a repository on the Hub; `None` for local paths and for no name."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def adapter_folder(
    name: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder of a saved adapter; one on the Hub is downloaded into the cache first.

    Args:
        name: a folder, or the name of a repository with an owner, `"me/adapter"`.
        subfolder: folder of the adapter inside.
        revision: branch, tag or commit of the repository.
        token: token for the Hub; `True` for the one that is stored.

    Raises:
        DataError: if `name` is no folder and cannot be downloaded.
    """
    folder, repo = Path(name), hub_id(str(name))
    if repo is not None and "/" in repo:
        inside = f"{subfolder}/" if subfolder else ""
        files = [f"{inside}adapter_*", f"{inside}{PROVENANCE_FILE}"]
        try:
            folder = Path(
                snapshot_download(repo, revision=revision, token=token, allow_patterns=files)
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise DataError(
                f"{repo!r} is no folder here, and cannot be downloaded from the Hub: {error}; check "
                "the name, revision and token, or pass the folder that save_pretrained wrote."
            ) from error
    return folder / subfolder if subfolder else folder
