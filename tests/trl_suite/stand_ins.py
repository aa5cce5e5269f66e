"""Small random models and made-up data under the names that TRL's tests ask the Hub for.

The models lie in a folder in the layout of a download, which `HF_HUB_CACHE` names.
"""

from pathlib import Path

import torch
import transformers
from datasets import Dataset, DatasetDict

from peft_gradinit.recipes.embedded import pico_tokenizer
from tests.trainer.trl_runs import words

OWNER = "trl-internal-testing"
REVISION = "0" * 40
N_TRAIN, N_TEST = 17, 2
_SIZES = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention"] * 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", "CausalLM"),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2", "SequenceClassification"),
    "tiny-Qwen3ForCausalLM": ("Qwen3", "CausalLM"),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", "CausalLM"),
    "tiny-GptOssForCausalLM": ("GptOss", "CausalLM"),
}


def fill_cache(cache: Path) -> None:
    """Write all models into an empty folder."""
    for name, (architecture, task) in MODELS.items():
        folder = cache / f"models--{OWNER}--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        config = getattr(transformers, f"{architecture}Config")(**_SIZES)
        if task == "SequenceClassification":
            config.num_labels = 1
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}For{task}")(config)
        model.save_pretrained(folder / "snapshots" / REVISION)
        pico_tokenizer().save_pretrained(folder / "snapshots" / REVISION)


def rows(config: str) -> DatasetDict:
    """The dataset `zen`, of other words: `standard_` texts or `conversational_` turns."""
    form, _, kind = config.partition("_")
    say = _turns if form == "conversational" else _text
    made = [_ROWS[kind](i, say) for i in range(N_TRAIN + N_TEST)]
    return DatasetDict(
        train=Dataset.from_list(made[:N_TRAIN]), test=Dataset.from_list(made[N_TRAIN:])
    )


def _text(role: str, text: str):
    return text


def _turns(role: str, text: str):
    return [{"role": role, "content": text}]


def _asked(i, say):
    return say("user", words(i, 4))


def _answered(i, say):
    return say("assistant", " " + words(i + 3, 5 + i % 3))


_ROWS = {
    "language_modeling": lambda i, say: (
        {"text": words(i, 6 + i % 7)}
        if say is _text
        else {"messages": _asked(i, say) + _answered(i, say)}
    ),
    "prompt_only": lambda i, say: {"prompt": _asked(i, say)},
    "prompt_completion": lambda i, say: {
        "prompt": _asked(i, say),
        "completion": _answered(i, say),
    },
    "preference": lambda i, say: {
        "prompt": _asked(i, say),
        "chosen": _answered(i, say),
        "rejected": _answered(i + 7, say),
    },
    "implicit_prompt_preference": lambda i, say: {
        "chosen": _asked(i, say) + _answered(i, say),
        "rejected": _asked(i, say) + _answered(i + 7, say),
    },
}
