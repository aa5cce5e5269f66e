"""Load what was published by its name, where this package cannot be imported.

python load.py <directory with want.pt and ids.pt>
"""

import tests.hub.blocked  # noqa: F401 before all others

# isort: split

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

OUT = Path(sys.argv[1])
BASE = "me/pico-llama"


def loaded(name):
    """The model of one repository, as its card says."""
    if name == "merged":
        return AutoModelForCausalLM.from_pretrained("me/merged")
    if name in ("lora_one", "eva"):
        return AutoPeftModelForCausalLM.from_pretrained(f"me/{name}")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    if name == "svfit":
        model.load_adapter("me/svfit")
        return model
    folder = "german" if name == "named" else None
    return PeftModel.from_pretrained(model, f"me/{name}", subfolder=folder)


ids, errors = torch.load(OUT / "ids.pt"), {}
for name, want in torch.load(OUT / "want.pt").items():
    with torch.no_grad():
        got = loaded(name).eval()(input_ids=ids).logits
    errors[name] = ((got - want).norm() / want.norm()).item()
torch.save(errors, OUT / "errors.pt")
