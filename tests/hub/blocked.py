"""Imported first, it makes this package unknown, wherever it is installed."""

import sys


class Blocker:
    """Finds no module of this package."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_gradinit":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Blocker())
