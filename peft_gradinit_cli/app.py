"""`peft-gradinit`: what a person uses before and around a training script."""

import importlib.metadata
import os
import sys
import warnings
from typing import Annotated

import typer

from .commands import calibrate, compare, convert, doctor, export, inspect, start, train
from .output import errors

FAILED = 1

app = typer.Typer(
    name="peft-gradinit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (calibrate, start, inspect, compare, convert, export, train, doctor):
    app.command(no_args_is_help=command is not doctor)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-gradinit {importlib.metadata.version('peft_gradinit')}")
        raise typer.Exit


@app.callback()
def _peft_gradinit(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Starts for LoRA adapters, computed from a model and data.

    **Before training**: `calibrate` measures what a method needs, `inspect` shows it, `start` saves
    an adapter that other frameworks continue from.
    **Training**: `train` runs a recipe.
    **After training**: `inspect` and `compare` look at adapters, `convert` frees those whose start
    wrote into the base model, `export` writes the form that is needed. `doctor` says what works here.

    Exit codes: 0 done, 1 could not be done (the reason is on standard error), 2 wrong command line,
    130 interrupted. `PEFT_GRADINIT_TRACEBACK=1` shows where an error came from.
    """


def run() -> None:
    """Run the command line; expected errors are one clear line and an exit code.

    Raises:
        Exception: if an error is a fault of the program, or the traceback was asked for.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app()
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get("PEFT_GRADINIT_TRACEBACK"):
            raise
        errors.print("[bold red]error[/]: ", end="")
        errors.print(message, markup=False, highlight=False, soft_wrap=True)
        sys.exit(FAILED)


def _message(error: Exception) -> str | None:
    """What a person is told of an error.

    Args:
        error: whose class, if it is not a built-in one, has been imported by now.

    Returns:
        One line, or None if the error is a fault of the program.
    """
    torch, ours = sys.modules.get("torch"), sys.modules.get("peft_gradinit.errors")
    if torch and isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {error}; lower the batch size or the sequence length."
    if isinstance(error, OSError | ValueError) or (ours and isinstance(error, ours.GradInitError)):
        return str(error)
    return None
