"""Which layers LLaMA-Factory 0.9.5 adapts: of `lora_target: all`, and of expanded blocks."""

from torch import nn


def find_all_linear_modules(model, freeze_vision_tower):
    without = {"lm_head", *(["vision_tower"] if freeze_vision_tower else [])}
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    return sorted({n.split(".")[-1] for n in linear if not any(part in n for part in without)})


def find_expanded_modules(model, target_modules, num_layer_trainable):
    n_layers = model.config.num_hidden_layers
    stride = n_layers // num_layer_trainable
    blocks = [f".{i}." for i in range(stride - 1, n_layers, stride)]
    names = [n for n, _ in model.named_modules() if any(block in n for block in blocks)]
    return [n for n in names if any(target in n for target in target_modules)]
