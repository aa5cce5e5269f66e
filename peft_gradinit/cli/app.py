"""`peft-gradinit`: what a person uses before and around a training script."""

import os
import sys
import warnings
from typing import Annotated

import datasets
import torch
import transformers
import typer

from .. import __version__
from ..errors import GradInitError
from .calibrate import calibrate
from .compare import compare
from .convert import convert
from .doctor import doctor
from .export import export
from .inspect import inspect
from .output import errors

FAILED = 1

app = typer.Typer(
    name="peft-gradinit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (calibrate, inspect, compare, convert, export, doctor):
    app.command(no_args_is_help=command is not doctor)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-gradinit {__version__}")
        raise typer.Exit


@app.callback()
def _peft_gradinit(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Starts for LoRA adapters, computed from a model and data.

    **Before training**: `calibrate` measures what a method needs, `inspect` shows it.
    **After training**: `inspect` and `compare` look at adapters, `convert` frees those whose start
    wrote into the base model, `export` writes the form that is needed. `doctor` says what works here.

    Exit codes: 0 done, 1 could not be done (the reason is on standard error), 2 wrong command line,
    130 interrupted. `PEFT_GRADINIT_TRACEBACK=1` shows where an error came from.
    """


def main() -> None:
    """Run the command line; errors are one clear line and an exit code."""
    _quieten()
    try:
        app()
    except torch.OutOfMemoryError as error:
        _fail(error, f"out of memory: {error}; lower the batch size or the sequence length.")
    except (GradInitError, OSError, ValueError) as error:
        _fail(error, str(error))


def _fail(error: Exception, message: str) -> None:
    if os.environ.get("PEFT_GRADINIT_TRACEBACK"):
        raise error
    errors.print("[bold red]error[/]: ", end="")
    errors.print(message, markup=False, highlight=False, soft_wrap=True)
    sys.exit(FAILED)


def _quieten() -> None:
    """Leave standard error to what this program says."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
