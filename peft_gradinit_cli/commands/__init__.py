"""What a command line may say: the options of every command, and their help.

A command imports what does its work when it is called.
"""

from .calibrate import calibrate
from .compare import compare
from .convert import convert
from .doctor import doctor
from .export import export
from .inspect import inspect
from .start import start
from .train import train

__all__ = [
    "calibrate",
    "compare",
    "convert",
    "doctor",
    "export",
    "inspect",
    "start",
    "train",
]
