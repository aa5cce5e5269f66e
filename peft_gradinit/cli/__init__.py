"""The command line; glue only."""

from .app import app, main

__all__ = ["app", "main"]
