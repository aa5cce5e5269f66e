"""Data of LLaMA-Factory 0.9.5: alpaca rows, a template, and a collator that pads labels."""

import json
from pathlib import Path

import datasets
from transformers import DataCollatorForSeq2Seq


def get_template_and_fix_tokenizer(tokenizer, data_args):
    return data_args.template


def get_dataset(template, model_args, data_args, training_args, stage, tokenizer, processor=None):
    folder = Path(data_args.dataset_dir)
    names = json.loads((folder / "dataset_info.json").read_text())
    rows = json.loads((folder / names[data_args.dataset]["file_name"]).read_text())
    encoded = []
    for row in rows:
        prompt = tokenizer(f"Human: {row['instruction']}\nAssistant:")["input_ids"]
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return {"train_dataset": datasets.Dataset.from_list(encoded)}


class SFTDataCollatorWith4DAttentionMask(DataCollatorForSeq2Seq):
    def __init__(
        self, *, template, model, tokenizer, processor, label_pad_token_id, block_diag_attn,
        neat_packing, attn_implementation, compute_dtype,
    ):  # fmt: skip
        super().__init__(tokenizer, model, label_pad_token_id=label_pad_token_id)
