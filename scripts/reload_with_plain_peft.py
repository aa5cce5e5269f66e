"""Evaluate saved adapters with plain PEFT; prints a line of JSON for each.

python scripts/reload_with_plain_peft.py out/quickstart/test out/quickstart/LoRA-GA …
python scripts/reload_with_plain_peft.py --prompts out/quickstart/prompts.json out/quickstart/LoRA-One
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(model: Any, tokenizer: Any, prompt: list[dict[str, str]]) -> str:
    """The model's likeliest answer to a chat, its first line.

    Args:
        model: a causal language model.
        tokenizer: its own, with a chat template.
        prompt: messages.

    Returns:
        The answer without special tokens.
    """
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    model.eval()
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split("\n\n")[0].split())


def answers(folder: str, prompts: list) -> dict:
    """Load an adapter onto a fresh base and answer."""
    base = json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    return {
        "answers": [answer(model, tokenizer, prompt) for prompt in prompts],
        "peft": peft.__version__,
        "plugin_imported": "peft_gradinit" in sys.modules,
    }


def evaluate(folder: str, loader: Any) -> dict:
    """Load an adapter onto a fresh base and count right predictions."""
    from minilm_task import load_model

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
    first, *folders = sys.argv[1:]
    if first == "--prompts":
        prompts = json.loads(Path(folders.pop(0)).read_text())
        for folder in folders:
            print(json.dumps(answers(folder, prompts)))
        return
    from datasets import load_from_disk
    from minilm_task import load_tokenizer
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    collate = DataCollatorWithPadding(load_tokenizer())
    loader = DataLoader(load_from_disk(first), batch_size=64, collate_fn=collate)
    for folder in folders:
        print(json.dumps(evaluate(folder, loader)))


if __name__ == "__main__":
    main()
