"""Models that make methods decide."""

import torch


def narrow(model):
    """Inputs of `down_proj` with two directions: the second explains more than a query's first."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[2:] = 0
            layer.mlp.gate_proj.weight[2:] = 0
    return model
