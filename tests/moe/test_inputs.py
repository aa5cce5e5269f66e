"""EVA's components of every expert are those of exact PCA of the tokens that were routed to it."""

import pytest
import torch
from torch import Tensor, nn

from peft_gradinit import EvaConfig, calibrate
from peft_gradinit.errors import CalibrationError
from tests.helpers import overlap, pad, quiet, relative_error, rows_of, token_batches
from tests.moe.models import BOTH, IMPLEMENTATIONS, gpt_oss, llama4, mixtral, qwen3_moe

R = 3
CASES = [(make, kind) for make in (qwen3_moe, mixtral, gpt_oss) for kind in IMPLEMENTATIONS]


def eva(**options) -> EvaConfig:
    values = {"r": R, "rho": 1, "target_modules": ["q_proj"], "target_parameters": BOTH}
    return EvaConfig(**values | options)


def routed(model: nn.Module, batches, *, keep) -> dict[str, Tensor]:
    """Inputs of every `gate_up_proj`, by the router's choice alone; `keep(batch)` masks tokens."""
    found: dict[str, list[Tensor]] = {}

    def hook_of(name):
        def hook(module, args):
            hidden, chosen = args[0], args[1]
            for expert in range(module.num_experts):
                mine = (chosen == expert).any(dim=1) & counted[0]
                found.setdefault(f"{name}.gate_up_proj[{expert}]", []).append(hidden[mine])

        return hook

    experts = {n: m for n, m in model.named_modules() if n.endswith("mlp.experts")}
    handles = [m.register_forward_pre_hook(hook_of(n)) for n, m in experts.items()]
    with torch.no_grad():
        for batch in batches:
            counted = [keep(batch).flatten()]
            model(**{k: v for k, v in batch.items() if k != "labels"})
    for handle in handles:
        handle.remove()
    return {n: torch.cat(parts) for n, parts in found.items()}


def gated(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Inputs of the `down_proj` of the same expert."""
    path, _, index = name.removesuffix("]").partition(".gate_up_proj[")
    experts = model.get_submodule(path)
    W = experts.gate_up_proj[int(index)]
    out = x @ W if experts.is_transposed else x @ W.T
    bias = experts.gate_up_proj_bias[int(index)] if experts.has_bias else 0
    return experts._apply_gate(out + bias)


def carries_loss(batch) -> Tensor:
    shifted = batch["labels"][:, 1:] != -100
    return torch.cat([shifted, torch.zeros_like(shifted[:, :1])], dim=1)


def check(model, batches, result, keep) -> None:
    """Variance and components agree with PCA of the routed tokens, where it is distinct."""
    inputs = routed(model, batches, keep=keep)
    inputs |= {
        n.replace("gate_up_proj", "down_proj"): gated(model, n, x) for n, x in inputs.items()
    }
    compared = 0
    for name, x in inputs.items():
        if len(x) < 2:
            assert name in result.failures
            continue
        centred = (x - x.mean(0)).double()
        _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
        variance = centred.square().sum().item() / len(x)
        assert result.energy[name] == pytest.approx(variance, rel=1e-4), name
        n = min(R, len(x) - 1)
        got = result.triplets[name]
        assert relative_error(got.S[:n], S[:n].float() / len(x) ** 0.5) < 1e-3, name
        if len(S) > n and S[n] < 0.95 * S[n - 1]:
            assert overlap(got.Vh[:n].double(), Vh[:n]) > 1 - 1e-5, name
            compared += 1
    assert compared > len(inputs) / 3


@pytest.mark.parametrize(("make", "kind"), CASES)
def test_components_are_those_of_pca(make, kind):
    model, batches = make(), token_batches(24)
    model.set_experts_implementation(kind)
    result = calibrate(model, eva(), quiet(batches))
    check(model, batches, result, carries_loss)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_padding_does_not_count(kind):
    model = qwen3_moe()
    model.set_experts_implementation(kind)
    batches = [pad(rows_of(token_batches(24))[i : i + 6], extra=5) for i in range(0, 24, 6)]
    result = calibrate(model, eva(use_label_mask=False), quiet(batches))
    check(model, batches, result, lambda batch: batch["attention_mask"].bool())


def test_unmasked_data_are_read_in_one_forward():
    model = mixtral()
    calls = []
    for module in (model.model.layers[0].mlp.experts, model):
        forward = module.forward

        def counted(*args, _forward=forward, _of=module, **kwargs):
            calls.append(_of is model)
            return _forward(*args, **kwargs)

        module.forward = counted
    batches = [{"input_ids": token_batches(4, 4)[0]["input_ids"]} for _ in range(2)]
    calibrate(model, eva(), quiet(batches))
    assert calls.count(False) == calls.count(True) == 2


def test_batch_size_does_not_matter():
    small, large = (
        calibrate(qwen3_moe(), eva(), quiet(token_batches(batch_size=n))) for n in (2, 12)
    )
    assert small.energy.keys() == large.energy.keys()
    for name, energy in large.energy.items():
        assert small.energy[name] == pytest.approx(energy, rel=1e-4, abs=1e-12), name


def test_lora_a_at_the_outputs_is_refused():
    targets = [f"feed_forward.{name}" for name in BOTH]
    with pytest.raises(
        CalibrationError,
        match=r"gate_up_proj cannot be the start of its lora_A: .*"
        r"Llama4TextExperts stores it as \(experts, in, out\)",
    ):
        calibrate(llama4(), eva(target_parameters=targets), quiet(token_batches()))
