"""Evaluate a saved adapter with plain PEFT; prints one line of JSON.

python scripts/reload_with_plain_peft.py out/quickstart/adapter out/quickstart/test
"""

import json
import sys

import peft
import torch
from datasets import load_from_disk
from minilm_task import load_model, load_tokenizer
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding


def main() -> None:
    """Load the adapter onto a fresh base and count right predictions."""
    model = PeftModel.from_pretrained(load_model(), sys.argv[1]).eval()
    collate = DataCollatorWithPadding(load_tokenizer())
    loader = DataLoader(load_from_disk(sys.argv[2]), batch_size=64, collate_fn=collate)
    n_right = n = 0
    with torch.no_grad():
        for batch in loader:
            predictions = model(**batch).logits.argmax(-1)
            n_right += int((predictions == batch["labels"]).sum())
            n += len(predictions)
    facts = {
        "accuracy": n_right / n,
        "peft": peft.__version__,
        "peft_type": str(model.peft_config["default"].peft_type.value),
        "plugin_imported": "peft_gradinit" in sys.modules,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
