"""Load a published adapter by its name, where this package cannot be imported.

python chain_load.py <base> <name> <file with the wanted logits> <file with token ids>

Prints as JSON the relative errors of PEFT's and Transformers' way to load, everything that was
logged as a warning, and the keys of the config that was downloaded. Warnings end the process.
"""

import tests.hub.blocked  # noqa: F401 before all others

# isort: split

import json
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.logged import Collector

BASE, NAME, WANT, IDS = sys.argv[1:]


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
    collector = Collector(None, "transformers", "peft", "huggingface_hub", "accelerate", "torch")
    errors = [error(by_peft()), error(by_transformers())]
    config = Path(hf_hub_download(NAME, "adapter_config.json", local_files_only=True))
    result = {
        "errors": errors,
        "logged": collector.messages,
        "keys": list(json.loads(config.read_text())),
    }
    sys.stdout.write(json.dumps(result) + "\n")


main()
