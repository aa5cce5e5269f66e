"""All that a calibration might touch of a model and of the process, to compare before and after."""

import copy
import random

import numpy as np
import torch
from torch import nn


def random_states():
    numpy_state = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy_state[1].tolist(), random.getstate()


def hooks_of(module: nn.Module):
    names = [n for n in vars(module) if n.endswith(("_hooks", "_with_kwargs", "_always_called"))]
    assert "_forward_hooks_with_kwargs" in names  # torch still names them so
    return {n: copy.copy(vars(module)[n]) for n in names}


def snapshot(model: nn.Module):
    """Everything that the pass might touch, in comparable form; weights bit for bit."""
    state = {}
    for name, module in model.named_modules():
        public = {k: v for k, v in vars(module).items() if isinstance(v, float | bool | str | int)}
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        state[name] = (public, hooks_of(module), id(checkpoint))
    for name, p in model.named_parameters():
        state[f"{name}.flags"] = (p.requires_grad, p.grad is None, p.data_ptr(), p._version)
        state[f"{name}.values"] = p.detach().flatten().tolist()
        state[f"{name}.grad"] = None if p.grad is None else p.grad.flatten().tolist()
    for name, buffer in model.named_buffers():
        state[name] = buffer.flatten().tolist()
    state["config"] = model.config.to_dict()
    state["random"] = random_states()
    return state


def lived_in_model(make):
    """A model in the middle of its user's work: mixed modes and flags, a grad, hooks."""
    model = make().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    modules = list(model.modules())
    for module in modules[::3]:
        module.training = False
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        if i % 4 == 0:
            parameter.grad = torch.ones_like(parameter)
    layer = modules[-1]
    layer.register_forward_hook(lambda *args: None)
    layer.register_forward_pre_hook(lambda *args: None)
    layer.register_full_backward_hook(lambda *args: None)
    assert model.config.use_cache
    return model
