"""The command line of `peft_gradinit`; glue only.

What a command line may say is in `commands`, what it does is in `work`. Only the latter needs torch and
the libraries of models, which load slowly, and it is imported when there is work.
"""

import os
import sys

__all__ = ["main"]

_EXTRA = ("datasets", "pydantic", "sklearn", "trl", "typer", "yaml")
"""Packages of the extra `cli`, as they are imported."""


def main() -> None:
    """Run the command line; errors are one clear line and an exit code.

    Raises:
        ModuleNotFoundError: if a package is missing that the extra `cli` does not install.
    """
    try:
        from .app import run

        run()
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA or os.environ.get("PEFT_GRADINIT_TRACEBACK"):
            raise
        sys.exit(
            f"error: the command line needs {error.name}, which is not installed; "
            "pip install 'peft_gradinit[cli]'"
        )
