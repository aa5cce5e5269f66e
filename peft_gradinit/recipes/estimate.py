"""What a calibration will cost, before it is run: memory, volume, arithmetic, time."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..statistics import TestMatrixPool, gradient_statistic, input_statistic
from .schema import CalibrationSection

_FLOAT32 = 4
_PROBE_SIZE = 1024
_LEAF_BITS = {"4bit": 0.5, "8bit": 1.0, None: None}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Costs of one calibration pass.

    Attributes:
        n_sequences: that will be read.
        n_tokens: in them.
        n_targets: linear layers that are measured.
        weight_bytes: of the model.
        statistic_bytes: what the accumulators and their test matrices hold at the end; for inputs
            an upper bound, since layers with the same input share.
        activation_bytes: what lives between forward and backward, roughly.
        result_bytes: of the file.
        flops: forward, input gradients and sketches.
        seconds: `flops` at the speed of a large matrix product on this device, which real layers
            reach about half of.
    """

    n_sequences: int
    n_tokens: int
    n_targets: int
    weight_bytes: int
    statistic_bytes: int
    activation_bytes: int
    result_bytes: int
    flops: float
    seconds: float


def estimate(
    model: nn.Module,
    targets: Mapping[str, list[int]],
    statistic: str,
    lengths: list[int],
    calibration: CalibrationSection,
    *,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
) -> Estimate:
    """Add up what a pass will cost.

    Args:
        model: on any device, also meta.
        targets: `[out, in, rank]` by module name, as in a fingerprint.
        statistic: `"gradient"` or `"inputs"`.
        lengths: tokens of the sequences that will be read.
        calibration: batch size and estimator.
        device: where the pass will run; its speed is measured.
        quantization: of the targets' weights.

    Returns:
        The costs.
    """
    gradients = statistic == "gradient"
    held, flops_a_token = _statistics(targets, gradients, calibration)
    n_tokens = sum(lengths)
    n_computed = _matrix_parameters(model)
    flops = n_tokens * ((4 if gradients else 2) * n_computed + flops_a_token)
    width = max(lengths, default=0) * calibration.batch_size
    speed = _flops_per_second(device, next(model.parameters()).dtype)
    return Estimate(
        n_sequences=len(lengths),
        n_tokens=n_tokens,
        n_targets=len(targets),
        weight_bytes=_weight_bytes(model, targets, quantization),
        statistic_bytes=held,
        activation_bytes=_activation_bytes(model, targets, gradients, width),
        result_bytes=_FLOAT32 * sum(_kept(t, gradients) for t in targets.values()),
        flops=flops,
        seconds=2 * flops / speed,
    )


def _statistics(
    targets: Mapping[str, list[int]], gradients: bool, calibration: CalibrationSection
) -> tuple[int, float]:
    """Bytes of all accumulators, and their arithmetic for each token."""
    pool, held, flops, dimensions = TestMatrixPool(), 0, 0.0, set()
    options: dict[str, Any] = {
        "estimator": calibration.estimator,
        "sketch_size": calibration.sketch_size,
        "seed": calibration.seed,
        "pool": pool,
    }
    for out_features, in_features, rank in targets.values():
        if gradients:
            made = gradient_statistic((out_features, in_features), rank=rank, **options)
            width, n = getattr(made, "width", 0), getattr(made, "n_oriented", 0)
            sides = out_features + in_features
            dense = not width
        else:
            made = input_statistic(in_features, rank=min(rank, in_features), **options)
            width, n = made.width, getattr(made, "n_oriented", 0)
            sides = in_features
            dense = width == in_features
        if dense:
            size = out_features * in_features if gradients else in_features**2
            held, flops = held + _FLOAT32 * size, flops + 2 * size
            continue
        held += _FLOAT32 * (width + n) * sides
        flops += 4 * width * sides
        dimensions |= {(in_features, width)} | ({(-out_features, width)} if gradients else set())
    return held + _FLOAT32 * sum(abs(d) * w for d, w in dimensions), flops


def _matrix_parameters(model: nn.Module) -> int:
    """Weights that every token is multiplied with: all but embeddings, and the head if tied."""
    total = sum(p.numel() for p in model.parameters())
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    total -= sum(m.weight.numel() for m in embeddings)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and any(head.weight is m.weight for m in embeddings):
        total += head.weight.numel()
    return total


def _weight_bytes(
    model: nn.Module, targets: Mapping[str, list[int]], quantization: str | None
) -> int:
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    bytes_each = _LEAF_BITS[quantization]
    if bytes_each is None:
        return total
    n = sum(out_features * in_features for out_features, in_features, _ in targets.values())
    return int(total - n * (next(model.parameters()).element_size() - bytes_each))


def _activation_bytes(
    model: nn.Module, targets: Mapping[str, list[int]], gradients: bool, n_tokens: int
) -> int:
    """The targets' inputs (twice, for what lies between them), and the logits with their loss."""
    size = next(model.parameters()).element_size()
    inputs = [in_features for _, in_features, _ in targets.values()]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0)
    logits = n_tokens * vocabulary * (size + (2 * _FLOAT32 if gradients else 0))
    held = 2 * sum(inputs) if gradients else 4 * max(inputs, default=0)
    return n_tokens * held * size + logits


def _kept(target: list[int], gradients: bool) -> int:
    out_features, in_features, rank = target
    return rank * (in_features + 1 + (out_features if gradients else 0))


def _flops_per_second(device: torch.device | str, dtype: torch.dtype) -> float:
    """The speed of one product of square matrices, after one to warm up."""
    a = torch.ones(_PROBE_SIZE, _PROBE_SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * _PROBE_SIZE**3 / best
