"""What a calibration will cost, before it is run: memory, volume, arithmetic, time."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from ..calibration import Measured, PassSize, plan_pass
from ..statistics import product_dtype
from .schema import CalibrationSection
from .speed import flops_per_second

_FLOAT32 = 4
_N_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What the configs of Transformers call the number of experts of a block."""

_BYTES_OF_WEIGHTS = {"4bit": 0.5, "8bit": 1.0, None: None}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Costs of one calibration pass.

    Attributes:
        n_sequences: that will be read.
        n_tokens: in them.
        n_processes: that share them.
        n_targets: matrices that are measured: linear layers, and experts one by one.
        weight_bytes: of the model.
        statistic_bytes: what the accumulators and their test matrices hold at the end, on every
            process; an upper bound for inputs, since layers with the same input share, and for
            experts, since those that no token is routed to hold nothing.
        largest_layer_bytes: of the accumulator that holds most.
        activation_bytes: what lives between forward and backward, roughly.
        result_bytes: of the file.
        summed_bytes: payload of the sums over processes, in all; 0 for one process.
        agreed_bytes: payload of the broadcasts of oriented test matrices, in all.
        broadcast_bytes: payload of the broadcasts of factors.
        flops: forward, input gradients and statistics, on all processes; attention's products of
            activations and the factorisations are left out.
        statistic_flops: of the statistics alone.
        seconds: `flops` at the speed of large matrix products on this device, each in its own
            dtype; real layers reach about half of it. Shared by the processes.
        dense_bytes: what whole gradients (for inputs: second moments) would hold.
        dense_summed_bytes: payload of summing them once.
        dense_flops: of a pass that makes them.
    """

    n_sequences: int
    n_tokens: int
    n_processes: int
    n_targets: int
    weight_bytes: int
    statistic_bytes: int
    largest_layer_bytes: int
    activation_bytes: int
    result_bytes: int
    summed_bytes: int
    agreed_bytes: int
    broadcast_bytes: int
    flops: float
    statistic_flops: float
    seconds: float
    dense_bytes: int
    dense_summed_bytes: int
    dense_flops: float


def estimate(
    model: nn.Module,
    targets: Mapping[str, list[int]],
    need: Measured,
    lengths: list[int],
    calibration: CalibrationSection,
    *,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    n_processes: int = 1,
) -> Estimate:
    """Add up what a pass will cost.

    Args:
        model: on any device, also meta.
        targets: `[out, in, rank]` by module name, as in a fingerprint; experts one by one.
        need: what is measured.
        lengths: tokens of the sequences that will be read.
        calibration: batch size and estimator.
        device: where the pass will run; its speed is measured.
        quantization: of the targets' weights.
        n_processes: that share the data.

    Returns:
        The costs.
    """
    n_tokens, experts = sum(lengths), _Experts.of(model)
    size = PassSize(
        n_sequences=len(lengths),
        n_tokens=n_tokens,
        n_processes=n_processes,
        estimator=calibration.estimator,
        sketch_size=calibration.sketch_size,
    )
    shares = {name: experts.share_of_target(name) for name in targets}
    said = plan_pass(targets, need, size, shares=shares)
    model_flops = n_tokens * (4 if need.backward else 2) * _matrix_parameters(model, experts)
    flops = model_flops + said.sketched.flops
    width = max(lengths, default=0) * calibration.batch_size
    dtype = next(model.parameters()).dtype
    seconds = model_flops / flops_per_second(device, dtype)
    of_statistics = product_dtype(torch.empty(0, dtype=dtype, device=device))
    seconds += said.sketched.flops / flops_per_second(device, of_statistics)
    return Estimate(
        n_sequences=len(lengths),
        n_tokens=n_tokens,
        n_processes=n_processes,
        n_targets=len(targets),
        weight_bytes=_weight_bytes(model, targets, quantization),
        statistic_bytes=said.sketched.held_bytes + said.test_matrix_bytes,
        largest_layer_bytes=said.largest_layer.held_bytes,
        activation_bytes=_activation_bytes(model, targets, shares, need.backward, width),
        result_bytes=said.sketched.factor_bytes,
        summed_bytes=said.sketched.summed_bytes,
        agreed_bytes=said.sketched.agreed_bytes,
        broadcast_bytes=said.sketched.factor_bytes if n_processes > 1 else 0,
        flops=flops,
        statistic_flops=said.sketched.flops,
        seconds=2 * seconds / n_processes,
        dense_bytes=said.dense.held_bytes,
        dense_summed_bytes=said.dense.summed_bytes,
        dense_flops=model_flops + said.dense.flops,
    )


@dataclasses.dataclass(frozen=True)
class _Experts:
    """How a mixture of experts routes its tokens; evenly, as nothing else is known beforehand.

    Attributes:
        n: experts of a block; 0 for models without any.
        share: part of the tokens that an expert is given.
    """

    n: int
    share: float

    @classmethod
    def of(cls, model: nn.Module) -> "_Experts":
        config = getattr(model, "config", None)
        config = config.get_text_config() if config is not None else None
        n = next((k for name in _N_EXPERTS if (k := getattr(config, name, None))), 0)
        chosen = getattr(config, "num_experts_per_tok", None) or n
        return cls(n, chosen / n if n else 1.0)

    def share_of(self, parameter: nn.Parameter) -> float:
        is_stack = self.n > 0 and parameter.dim() == 3 and parameter.shape[0] == self.n
        return self.share if is_stack else 1.0

    def share_of_target(self, name: str) -> float:
        return self.share if name.endswith("]") else 1.0


def _matrix_parameters(model: nn.Module, experts: _Experts) -> float:
    """Weights that every token is multiplied with: all but embeddings, the head also if tied."""
    total = sum(p.numel() * experts.share_of(p) for p in model.parameters())
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
    bytes_each = _BYTES_OF_WEIGHTS[quantization]
    if bytes_each is None:
        return total
    n = sum(out_features * in_features for out_features, in_features, _ in targets.values())
    return int(total - n * (next(model.parameters()).element_size() - bytes_each))


def _activation_bytes(
    model: nn.Module,
    targets: Mapping[str, list[int]],
    shares: Mapping[str, float],
    gradients: bool,
    n_tokens: int,
) -> int:
    """The targets' inputs (twice, for what lies between them), and the logits with their loss."""
    size = next(model.parameters()).element_size()
    inputs = [in_features * shares[name] for name, (_, in_features, _) in targets.items()]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0)
    logits = n_tokens * vocabulary * (size + (2 * _FLOAT32 if gradients else 0))
    held = 2 * sum(inputs) if gradients else 4 * max(inputs, default=0)
    return int(n_tokens * held * size + logits)
