"""`peft-gradinit doctor`: what is installed, what devices there are, and what works on them."""

import typer

from ..output import results_alone
from . import options


def doctor(as_json: options.AsJson = False) -> None:
    """Say which versions and devices there are, and what is supported with them.

    Exit code 1 if something that is needed is missing or does not work.
    """
    with results_alone():
        from ..work.doctor import run

    if not run(as_json=as_json):
        raise typer.Exit(1)
