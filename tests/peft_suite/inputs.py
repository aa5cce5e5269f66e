"""Calibration data that fit every model of PEFT's tests: numbers in [0, 1), and a loss that uses them.

PEFT's tests make a config before they make a model, so the data cannot be of the model's kind. The
loss function gets the model, and makes its inputs from the numbers.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.helpers import quiet

ROWS, COLUMNS = 9, 10
"""What PEFT's own models take; one of them takes no other number of rows."""

NOT_RUNNING = ("DeepMLP", "M", "CustomModel", "ToyMoEModel", "Sequential")
"""PEFT's models whose `forward` fails, or fits no inputs: those tests do not call it."""


def calibration():
    """Four batches of numbers and the loss that goes with them."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"numbers": torch.rand(ROWS, COLUMNS, generator=generator)} for _ in range(4)]
    return quiet(batches, loss_fn=loss_of)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Squared distance of the outputs from random targets, or the model's own loss if it has one."""
    outputs = outputs_of(model, batch["numbers"])
    if isinstance(outputs, dict) and outputs.get("loss") is not None:
        return outputs["loss"]
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    targets = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(1))
    return (outputs.float() - targets.to(outputs.device)).square().mean()


def outputs_of(model: nn.Module, numbers: Tensor) -> Any:
    """Run a model; layer by layer if its `forward` is missing or cannot run."""
    if type(model).__name__ in NOT_RUNNING or not _runs(model):
        return torch.cat([_flat(layer, numbers) for layer in _layers(model)])
    with _in_the_dtype_of_its_weights(model):
        return model(**inputs_of(model, numbers))


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model that have a weight, with their adapters."""
    for name, _ in _named_layers(model):
        yield model.get_submodule(name.split(".base_layer")[0])


def _named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        added = any(part in name for part in ("lora_", "svfit_", "modules_to_save", "parametri"))
        wrapper = hasattr(module, "base_layer") or "original_module" in module._modules
        if isinstance(weight, Tensor) and weight.dim() > 1 and not added and not wrapper:
            yield name, module


def _flat(layer: nn.Module, numbers: Tensor) -> Tensor:
    """The outputs of one layer as a row, for inputs of its kind."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if isinstance(base, nn.Embedding):
        return layer((numbers * base.num_embeddings).long()).flatten().float()
    if isinstance(base, nn.Conv1d | nn.Conv2d):
        side = (6,) * (base.weight.dim() - 2)
        x = _of_width(numbers, base.in_channels * 36)[:, : base.in_channels * math.prod(side)]
        x = x.reshape(-1, base.in_channels, *side)
    else:
        x = _of_width(numbers, _width(base))
    return layer(x.to(base.weight.dtype)).flatten().float()


def _width(layer: nn.Module) -> int:
    return layer.weight.shape[isinstance(layer, nn.Linear)]


@contextmanager
def _in_the_dtype_of_its_weights(model: nn.Module) -> Iterator[None]:
    """PEFT's models cast their input to `model.dtype`, which `model.half()` does not change."""
    known = vars(model).get("dtype")
    if known is None:
        yield
        return
    model.dtype = next(p.dtype for p in model.parameters())
    try:
        yield
    finally:
        model.dtype = known


def inputs_of(model: nn.Module, numbers: Tensor) -> dict[str, Any]:
    """Inputs of the kind that the model's `forward` takes.

    Args:
        model: one of PEFT's own test models, or one of transformers.
        numbers: what they are made from, in [0, 1).

    Returns:
        Its arguments, with labels where the model computes a loss.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = inspect.signature(base.forward).parameters
    if "input_ids" in parameters:
        return _tokens(model, numbers, parameters)
    if "pixel_values" in parameters:
        return _images(model, numbers)
    return {next(iter(parameters)): _vectors(model, numbers)}


def _vectors(model: nn.Module, numbers: Tensor) -> Tensor:
    """Ids if the first layer is an embedding, else floats, of the width of the first layer."""
    for _, layer in _named_layers(model):
        if isinstance(layer, nn.Embedding):
            return (numbers * layer.num_embeddings).long()
        if isinstance(layer, nn.Linear | Conv1D):
            width = _width(layer)
            return numbers if width == ROWS * COLUMNS else _of_width(numbers, width)
        return numbers
    return numbers


def _of_width(numbers: Tensor, width: int) -> Tensor:
    """Other numbers, as many rows of `width`; the given ones if they have it."""
    if width == COLUMNS:
        return numbers
    generator = torch.Generator().manual_seed(int(numbers.flatten()[0] * 2**31))
    rows = 10 if width == 1000 else ROWS
    return torch.rand(rows, width, generator=generator).to(numbers.device)


def _tokens(model: nn.Module, numbers: Tensor, parameters: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None:  # a model of a test, around an embedding
        return {"input_ids": _vectors(model, numbers)}
    ids = (numbers * config.get_text_config().vocab_size).long()
    inputs: dict[str, Any] = {"input_ids": ids}
    if "labels" in parameters:
        kind = type(model).__name__
        if "SequenceClassification" in kind:
            inputs["labels"] = (numbers[:, 0] * model.config.num_labels).long()
        elif "TokenClassification" in kind:
            inputs["labels"] = (numbers * model.config.num_labels).long()
        else:
            inputs["labels"] = ids
    elif "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids
    return inputs


def _images(model: nn.Module, numbers: Tensor) -> dict[str, Any]:
    config = model.config
    shape = (2, config.num_channels, config.image_size, config.image_size)
    seed = int(numbers[0, 0] * 2**31)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels.to(numbers.device)}
