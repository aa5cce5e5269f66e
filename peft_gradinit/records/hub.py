"""Names of repositories on the Hub."""

from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


def hub_id(name: str | None) -> str | None:
    """`name` if it is that of a repository on the Hub; `None` for local paths and for no name."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
