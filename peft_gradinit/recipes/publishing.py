"""The upload at the end of a run: checked before training, and never at the cost of the adapter."""

from pathlib import Path
from typing import Any

from huggingface_hub import create_repo
from peft import PeftModel

from ..errors import ConfigError, OutputError
from .schema import PushSection


def make_repository(push: PushSection) -> None:
    """Make the repository, if it is not there, so that a fault shows before training.

    Args:
        push: where the adapter goes.

    Raises:
        ConfigError: if the Hub cannot be reached, or does not let this user write there.
    """
    try:
        create_repo(push.repo, private=push.private, exist_ok=True)
    except Exception as error:  # the client's, or those of the library that it connects with
        raise ConfigError(
            f"push.repo={push.repo!r} cannot be written to: {error}; log in with `hf auth login`, "
            "correct the name, or leave push out."
        ) from error


def publish(model: PeftModel, processor: Any, push: PushSection, folder: Path) -> None:
    """Upload the adapter, and what reads its data.

    Args:
        model: the trained model.
        processor: tokenizer or image processor, if it is one that can be uploaded.
        push: where the adapter goes.
        folder: where it was saved to, for the message.

    Raises:
        OutputError: if the upload fails; it says where the adapter lies and how to upload it.
    """
    try:
        for part in (model, processor):
            if hasattr(part, "push_to_hub"):
                part.push_to_hub(push.repo, private=push.private)
    except Exception as error:
        raise OutputError(
            f"the run is complete and its adapter is in {str(folder)!r}, but uploading it to "
            f"{push.repo!r} failed: {error}; upload it with `hf upload {push.repo} {folder}`."
        ) from error
