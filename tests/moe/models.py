"""Tiny mixture-of-experts models and what autograd says about them, shared by the tests here."""

import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_gradinit.calibration import ExpertWeight
from tests.helpers import VOCABULARY

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def qwen3_moe(seed: int = 0, **options) -> Qwen3MoeForCausalLM:
    """6 experts, 2 of them for each token; `gate_up_proj (6, 32, 48)`, `down_proj (6, 48, 16)`."""
    values = {
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
    }
    return _made(Qwen3MoeForCausalLM, Qwen3MoeConfig, seed, values | options)


def mixtral(seed: int = 0, **options) -> MixtralForCausalLM:
    """4 experts; `gate_up_proj (4, 64, 48)`, `down_proj (4, 48, 32)`, and a router of 4 rows."""
    values = {"intermediate_size": 32, "num_local_experts": 4, "initializer_range": 0.2}
    return _made(MixtralForCausalLM, MixtralConfig, seed, values | options)


def gpt_oss(seed: int = 0, **options) -> GptOssForCausalLM:
    """4 experts with biases, stored `(experts, in, out)`: `gate_up_proj (4, 48, 64)`."""
    values = {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
        "head_dim": 12,
    }
    return _made(GptOssForCausalLM, GptOssConfig, seed, values | options)


def llama4(seed: int = 0, **options) -> Llama4ForCausalLM:
    """3 experts, run on all tokens, most of them zeros, in one batched product."""
    values = {
        "intermediate_size": 32,
        "intermediate_size_mlp": 32,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "initializer_range": 0.2,
        "head_dim": 12,
        "no_rope_layers": [1, 1],
        "pad_token_id": 0,
    }
    return _made(Llama4ForCausalLM, Llama4TextConfig, seed, values | options)


def _made(model_class, config_class, seed: int, values: dict):
    torch.manual_seed(seed)
    return model_class(config_class(**{**_SHARED, **values})).eval()


def starve(model: nn.Module, expert: int, layer: int = 0) -> str:
    """Keep the router of a layer from choosing an expert; gives the name of its block."""
    router = model.model.layers[layer].mlp.gate

    def avoid(module, args, output):
        logits, scores, chosen = output
        other = (expert + 1) % router.num_experts
        return logits, scores, torch.where(chosen == expert, other, chosen)

    router.register_forward_hook(avoid)
    return f"model.layers.{layer}.mlp.experts"


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every expert parameter by full name; biases are not among them."""
    return {n: p for n, p in model.named_parameters() if n.endswith(tuple(BOTH))}


def expert_weights(model: nn.Module) -> dict[str, ExpertWeight]:
    """Every expert's matrices by name, in the layout that PEFT takes them to have."""
    weights = {}
    for name, parameter in expert_parameters(model).items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        transposed = getattr(module, "is_transposed", False)
        for i in range(len(parameter)):
            weights[f"{name}[{i}]"] = ExpertWeight(module, attribute, i, transposed)
    return weights


def as_out_in(tensor: Tensor, weight: ExpertWeight) -> Tensor:
    """A matrix of a parameter as `(out, in)` in PEFT's sense."""
    matrix = tensor if weight.index is None else tensor[weight.index]
    return matrix.T if weight.transposed else matrix


def dense_gradients(
    model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]
) -> dict[str, Tensor]:
    """Token-weighted mean gradient of whole parameters, by plain autograd: the oracle."""
    parameters = dict(model.named_parameters())
    total, weight = dict.fromkeys(names, 0.0), 0
    for batch in batches:
        n_tokens = int((batch["labels"][:, 1:] != -100).sum())
        loss = model(**batch).loss * n_tokens
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names])
        for n, gradient in zip(names, gradients, strict=True):
            total[n] = total[n] + gradient
        weight += n_tokens
    return {n: g / weight for n, g in total.items()}
