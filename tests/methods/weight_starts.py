"""What starts that depend on the weight take out of a model, here and in PEFT."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_gradinit import CorDAConfig, MiLoRAConfig, OLoRAConfig, PiSSAConfig, pairs
from tests.helpers import quiet, token_batches

R, ALPHA = 4, 8
WITHOUT_DATA = (PiSSAConfig, MiLoRAConfig, OLoRAConfig)
ALL = (*WITHOUT_DATA, CorDAConfig)


def config_of(config_cls, **options):
    """A config with small defaults; CorDA calibrates on `token_batches()`."""
    values = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if config_cls is CorDAConfig:
        values["calibration"] = quiet(token_batches())
    return config_cls(**{**values, **options})


def started(config_cls, model: nn.Module, name: str = "default", **options) -> PeftModel:
    return get_peft_model(model, config_of(config_cls, **options), name)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the linear layers' weights by name, `(out, in)`, float32, without the head."""
    found = {}
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name and name != "lm_head":
            weight = module.weight.detach().float().clone()
            found[name] = weight.T if isinstance(module, Conv1D) else weight
    return found


def products(peft_model: PeftModel, name: str = "default") -> dict[str, Tensor]:
    """`s B0 A0` of every layer, by name; of a parameter's experts with their index."""
    found = {}
    for pair in pairs(peft_model, name):
        for i, (A0, B0) in enumerate(pair.anchors()):
            key = pair.name if pair.n_experts == 1 else f"{pair.name}[{i}]"
            found[key] = pair.scaling * (B0 @ A0)
    return found


def taken_by_peft(model: nn.Module, init_lora_weights: str, **options) -> dict[str, Tensor]:
    """What PEFT's own start takes out of the weights, which it overwrites."""
    values = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    before = weights(model)
    config = LoraConfig(init_lora_weights=init_lora_weights, **{**values, **options})
    after = weights(get_peft_model(model, config))
    return {name: weight - after[name] for name, weight in before.items()}


def best_approximation(matrix: Tensor, r: int) -> Tensor:
    """The best approximation of rank `r`, by the SVD in float64."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def expected(config_cls, weight: Tensor, r: int, scaling: float = 1.0) -> Tensor:
    """`s B0 A0` of a method without data by its paper's formula, float64."""
    weight = weight.double()
    if config_cls is PiSSAConfig:
        return best_approximation(weight, r)
    if config_cls is MiLoRAConfig:
        return weight - best_approximation(weight, min(weight.shape) - r)
    Q, upper = torch.linalg.qr(weight)
    return scaling * Q[:, :r] @ upper[:r]


def layer_inputs(model: nn.Module, rows: list[Tensor]) -> dict[str, Tensor]:
    """What every linear layer is given, token by token, by name."""
    seen = {}

    def hook_of(name):
        return lambda module, args, out: seen.setdefault(name, []).append(args[0].flatten(0, 1))

    named = dict(model.named_modules())
    handles = [named[name].register_forward_hook(hook_of(name)) for name in weights(model)]
    with torch.no_grad():
        for row in rows:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}
