"""What the processes of `test_two_processes` run."""

import torch

from peft_gradinit import EvaConfig, LoraGAConfig, calibrate
from tests.helpers import quiet, token_batches
from tests.moe.models import BOTH, qwen3_moe

CONFIGS = (LoraGAConfig, EvaConfig)


def batches(size: int = 1):
    """Four sequences, so short that hardly one of them reaches all experts."""
    return token_batches(4, size, length=6, seed=5)


def reached(batch) -> set[tuple[int, int]]:
    """Layer and expert of everything that a batch is routed to."""
    model, found = qwen3_moe(), set()
    for i, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, args, i=i: found.update((i, int(e)) for e in args[1].unique())
        )
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return found


def measured():
    """Energies, failures, and products that do not depend on signs, with their bytes, by method."""
    found = {}
    for config_cls in CONFIGS:
        config = config_cls(r=1, target_modules=["q_proj"], target_parameters=BOTH)
        result = calibrate(qwen3_moe(), config, quiet(batches(), estimator="dense"))
        products = {}
        for name, svd in result.triplets.items():
            left = svd.U if len(svd.U) else svd.Vh.T
            products[name] = ((left * svd.S) @ svd.Vh, svd.Vh.numpy().tobytes())
        found[config_cls.__name__] = (result.energy, result.failures, products)
    return found
