"""A cache of the Hub with small random models under the names that PEFT's tests ask for.

PEFT's tests load models of the Hub. In this folder they find stand-ins of the same architecture,
in the layout of a download, so that nothing is fetched and nothing of the Hub is replaced.
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

REVISION = "0" * 40
_SIZES = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_OPT = ("OPT", "ForCausalLM", {"ffn_dim": 32, "word_embed_proj_dim": 16})
_LLAMA = ("Llama", "ForCausalLM", _GROUPED)
_GPT2 = ("GPT2", "LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4})
_T5 = (
    "T5",
    "ForConditionalGeneration",
    {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    | {"decoder_start_token_id": 0},
)
_BART = (
    "Bart",
    "ForConditionalGeneration",
    {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32}
    | {"decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
)
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _OPT,
    "peft-internal-testing/opt-125m": _OPT,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _GPT2,
    "peft-internal-testing/tiny-random-gpt2": _GPT2,
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJ",
        "ForCausalLM",
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoX", "ForCausalLM", {}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "Bloom",
        "ForCausalLM",
        {"n_head": 4, "num_hidden_layers": 5},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("Mistral", "ForCausalLM", _GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", "ForCausalLM", _GROUPED),
    "Qwen/Qwen2-0.5B": ("Qwen2", "ForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3",
        "ForCausalLM",
        _GROUPED | {"tie_word_embeddings": True},
    ),
    "hf-internal-testing/Mixtral-tiny": ("Mixtral", "ForCausalLM", _GROUPED | _EXPERTS),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "Qwen3Moe",
        "ForCausalLM",
        _GROUPED | _EXPERTS | {"moe_intermediate_size": 16},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4",
        "ForCausalLM",
        _GROUPED | _EXPERTS | {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOss", "ForCausalLM", _GROUPED | _EXPERTS),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "Llama",
        "ForSequenceClassification",
        _GROUPED,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("Bert", "Model", {}),
    "peft-internal-testing/tiny-random-RobertaModel": ("Roberta", "Model", {}),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "Bert",
        "ForSequenceClassification",
        {},
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "Roberta",
        "ForSequenceClassification",
        {},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("Deberta", "Model", _RELATIVE),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2", "Model", _RELATIVE),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _T5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _T5,
    "peft-internal-testing/tiny-random-t5": _T5,
    "google/flan-t5-small": _T5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _BART,
}


def fill_cache(cache: Path) -> None:
    """Write all models into an empty folder that `HF_HUB_CACHE` names."""
    for model_id, (architecture, head, options) in MODELS.items():
        folder = cache / f"models--{model_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        files = folder / "snapshots" / REVISION
        _model(architecture, head, options).save_pretrained(files)
        _tokenizer().save_pretrained(files)


def _model(architecture: str, head: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    text = "Text" if architecture in ("Gemma3", "Llama4") else ""
    config = getattr(transformers, f"{architecture}{text}Config")(**{**_SIZES, **options})
    return getattr(transformers, architecture + head)(config)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token is a character."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class EveryModelKnown(dict):
    """For `hub_online_once` of PEFT's tests: every model was fetched before."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1
