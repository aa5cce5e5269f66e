"""Evaluate saved adapters with plain PEFT; prints a line of JSON for each.

python scripts/reload_with_plain_peft.py out/quickstart/test out/quickstart/LoRA-GA …
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


def evaluate(folder: str, loader: DataLoader) -> dict:
    """Load an adapter onto a fresh base and count right predictions."""
    model = PeftModel.from_pretrained(load_model(), folder).eval()
    n_right = n = 0
    with torch.no_grad():
        for batch in loader:
            predictions = model(**batch).logits.argmax(-1)
            n_right += int((predictions == batch["labels"]).sum())
            n += len(predictions)
    config = model.peft_config["default"]
    return {
        "accuracy": n_right / n,
        "peft": peft.__version__,
        "peft_type": str(config.peft_type.value),
        "r": config.r,
        "plugin_imported": "peft_gradinit" in sys.modules,
    }


def main() -> None:
    """Evaluate every folder on the command line."""
    data, *folders = sys.argv[1:]
    collate = DataCollatorWithPadding(load_tokenizer())
    loader = DataLoader(load_from_disk(data), batch_size=64, collate_fn=collate)
    for folder in folders:
        print(json.dumps(evaluate(folder, loader)))


if __name__ == "__main__":
    main()
