"""Load adapters with an old PEFT: python with_old_peft.py FOLDER ADAPTER…

Knows nothing of this package. FOLDER holds the base as `config.json` and
`base.safetensors`, and `ids`. Prints as JSON the version of PEFT and everything that was logged as a
warning; leaves the logits in every adapter's folder. Python warnings end the process.
"""

# ruff: noqa: E402
import sys

for newer in ("bitsandbytes", "hqq", "optimum", "torchao"):  # an old PEFT would try to use them
    sys.modules[newer] = None  # "not installed", to whoever asks

# isort: split

import json
import warnings
from pathlib import Path

import peft
import torch
from logged import Collector
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER, ADAPTERS = Path(sys.argv[1]), sys.argv[2:]


def base():
    config = LlamaConfig(**json.loads((FOLDER / "config.json").read_text()))
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return model


def main():
    assert not any(name.startswith("peft_gradinit") for name in sys.modules)
    collector = Collector("transformers", "peft")
    for folder in ADAPTERS:
        model = base()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapted = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            torch.save(adapted(input_ids=torch.load(FOLDER / "ids")).logits, f"{folder}/logits")
    sys.stdout.write(json.dumps({"peft": peft.__version__, "logged": collector.messages}) + "\n")


main()
