"""Load a published adapter by its name, where this package cannot be imported.

python chain_load.py <base> <name> <file with the wanted logits> <file with token ids>

Prints as JSON the relative errors of PEFT's and Transformers' way to load, everything that was
logged as a warning, and the keys of the config that was downloaded. Warnings end the process.
"""

import tests.hub.blocked  # noqa: F401 before all others

# isort: split

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import AutoModelForCausalLM

BASE, NAME, WANT, IDS = sys.argv[1:]


class Collector(logging.Handler):
    """Keeps what libraries log as warnings, which they do not show as Python warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(f"{record.name}: {record.getMessage()}")


def by_peft():
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), NAME)


def by_transformers():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.load_adapter(NAME)
    return model


def error(model):
    want = torch.load(WANT)
    with torch.no_grad():
        got = model.eval()(input_ids=torch.load(IDS)).logits
    assert got.dtype == want.dtype == torch.float32
    return ((got - want).norm() / want.norm()).item()


def main():
    warnings.simplefilter("error")
    # What PEFT asks of any model, adapter or not.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
    collector = Collector()
    for library in (None, "transformers", "peft", "huggingface_hub", "accelerate", "torch"):
        logging.getLogger(library).addHandler(collector)
    errors = [error(by_peft()), error(by_transformers())]
    config = Path(hf_hub_download(NAME, "adapter_config.json", local_files_only=True))
    result = {
        "errors": errors,
        "logged": collector.messages,
        "keys": list(json.loads(config.read_text())),
    }
    sys.stdout.write(json.dumps(result) + "\n")


main()
