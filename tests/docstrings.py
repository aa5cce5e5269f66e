"""Real text for tests: docstrings of standard-library modules."""

import random

from peft_gradinit.recipes.embedded import MODULES, docstrings_of


def labelled_docstrings(n: int, seed: int = 0) -> list[tuple[str, int]]:
    """`n` docstrings of at least 60 characters with the index of their module, shuffled."""
    found = [
        (text, label) for label, module in enumerate(MODULES) for text in docstrings_of(module)
    ]
    random.Random(seed).shuffle(found)
    return found[:n]
