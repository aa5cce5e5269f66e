"""Arguments of LLaMA-Factory 0.9.5, as far as the plug-in reads them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml

DEFAULTS = {
    "finetuning": {
        "stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "lora_alpha": None,
        "lora_dropout": 0.0, "lora_target": "all", "use_rslora": False, "use_dora": False,
        "additional_target": None, "freeze_vision_tower": True, "use_llama_pro": False,
        "freeze_trainable_layers": 2,
    },
    "model": {
        "model_name_or_path": None, "adapter_name_or_path": None, "block_diag_attn": False,
        "resize_vocab": False,
    },
    "data": {"dataset": None, "dataset_dir": "data", "template": None, "neat_packing": False},
    "training": {"output_dir": None, "learning_rate": 5e-5, "max_steps": -1},
}  # fmt: skip
_OTHERS = {"do_train", "use_cpu", "report_to", "cutoff_len", "per_device_train_batch_size"}


def read_args(args=None):
    """Theirs merges by OmegaConf: `a.b=c` goes into the section `a`, values are YAML."""
    if args is not None:
        return args
    if not sys.argv[1].endswith((".yaml", ".yml", ".json")):
        return sys.argv[1:]
    merged = yaml.safe_load(Path(sys.argv[1]).absolute().read_text())
    for override in sys.argv[2:]:
        key, _, value = override.partition("=")
        *sections, last = key.split(".")
        place = merged
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    return merged


def get_train_args(args=None):
    known = {name for section in DEFAULTS.values() for name in section} | _OTHERS
    if unknown := set(args) - known:
        raise ValueError(f"Some keys are not used by the HfArgumentParser: {unknown}")
    sections = {
        name: SimpleNamespace(**{key: args.get(key, value) for key, value in section.items()})
        for name, section in DEFAULTS.items()
    }
    finetuning = sections["finetuning"]
    finetuning.lora_target = [name.strip() for name in finetuning.lora_target.split(",")]
    finetuning.lora_alpha = finetuning.lora_alpha or 2 * finetuning.lora_rank
    sections["model"].compute_dtype = torch.float32
    sections["training"].device = torch.device("cpu")
    return sections["model"], sections["data"], sections["training"], finetuning, None
