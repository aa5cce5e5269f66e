"""Load what was published for training, by its name: python live.py <directory with want.pt>"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from peft_gradinit import load_for_training
from peft_gradinit.errors import DataError
from tests.hub.server import TOKEN

torch.set_num_threads(1)
OUT = Path(sys.argv[1])
WAYS = {
    "lora_ga": {},
    "lora_one": {"revision": "main"},
    "eva": {"token": TOKEN},
    "svfit": {},
    "named": {"subfolder": "german"},
}
ids, wanted, errors = torch.load(OUT / "ids.pt"), torch.load(OUT / "want.pt"), {}


def base():
    return AutoModelForCausalLM.from_pretrained("me/pico-llama")


for name, options in WAYS.items():
    model = load_for_training(base(), f"me/{name}", **options)
    assert any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        got = model.eval()(input_ids=ids).logits
    errors[name] = ((got - wanted[name]).norm() / wanted[name].norm()).item()

try:
    load_for_training(base(), "me/absent")
except DataError as error:
    refusal = str(error)
torch.save({"errors": errors, "refusal": refusal}, OUT / "live.pt")
