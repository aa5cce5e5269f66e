"""`pairs` shows the factors that train, whatever the adapter and the layer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_gradinit import EvaConfig, LoraGAConfig, PiSSAConfig, SVFitConfig, pairs
from tests.helpers import adapted, anchors, lora_ga, pico_gpt2, pico_llama, quiet, token_batches
from tests.moe.models import mixtral

OPTIONS = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIGS = {
    "plain LoRA": lambda: LoraConfig(**OPTIONS),
    "LoRA-GA": lambda: LoraGAConfig(**OPTIONS, calibration=quiet(token_batches())),
    "EVA": lambda: EvaConfig(**OPTIONS, rho=1, calibration=quiet(token_batches())),
    "PiSSA": lambda: PiSSAConfig(**OPTIONS, use_rslora=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS)


def trainable(model):
    return {id(p): n for n, p in model.named_parameters() if p.requires_grad}


@every_config
@pytest.mark.parametrize("make", [pico_llama, pico_gpt2])
def test_the_pairs_are_all_that_trains(config, make):
    model = get_peft_model(make(), CONFIGS[config]())
    found = list(pairs(model))
    assert {id(p) for pair in found for p in (pair.A, pair.B)} == trainable(model).keys()
    base = dict(make().named_modules())
    assert [pair.name for pair in found] == [n for n in base if n in {p.name for p in found}]


@every_config
def test_a_pair_says_what_its_layer_computes(config):
    model = get_peft_model(pico_llama(), CONFIGS[config]())
    with torch.no_grad():
        for pair in pairs(model):
            pair.B.add_(torch.randn_like(pair.B))
    for pair in pairs(model):
        ((A, B),) = pair.matrices()
        assert (A.shape[0], B.shape[1]) == (pair.r, pair.r) == (4, 4)
        product = B @ A
        for A0, B0 in pair.anchors():
            product = product - B0 @ A0
        want = pair.layer.get_delta_weight("default")
        torch.testing.assert_close(pair.scaling * product, want, rtol=1e-4, atol=1e-5)


def test_matrices_share_memory_with_the_parameters():
    model = adapted(pico_llama())
    pair = next(pairs(model))
    ((A, B),) = pair.matrices()
    with torch.no_grad():
        A.zero_()
        B.fill_(2.0)
    assert not pair.A.any()
    assert (pair.B == 2.0).all()


def test_an_anchored_pair_shows_its_anchor_and_others_none():
    model = adapted(pico_llama())
    want = anchors(model)
    for pair in pairs(model):
        ((A0, B0),) = pair.anchors()
        assert torch.equal(A0, want[pair.name][0])
        assert torch.equal(B0, want[pair.name][1])
    plain = get_peft_model(pico_llama(), LoraConfig(**OPTIONS))
    assert all(pair.anchor is None and pair.anchors() == [] for pair in pairs(plain))


def test_experts_are_given_one_by_one():
    config = LoraGAConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        calibration=quiet(token_batches()),
        uncalibrated="lora",
    )
    model = get_peft_model(mixtral(), config)
    found = list(pairs(model))
    assert found
    for pair in found:
        parent, _, parameter = pair.name.rpartition(".")
        stack = getattr(mixtral().get_submodule(parent), parameter)
        assert pair.n_experts == len(stack) == len(pair.matrices())
        delta = pair.layer.get_delta_weight("default")
        for (A, B), (A0, B0), of_expert in zip(pair.matrices(), pair.anchors(), delta, strict=True):
            assert A.shape == A0.shape == (2, A.shape[1])
            product = pair.scaling * (B @ A - B0 @ A0)
            assert product.shape in (of_expert.shape, of_expert.T.shape)


def test_each_adapter_has_its_own_pairs_and_other_layers_have_none():
    model = adapted(pico_llama(), lora_ga(r=3, target_modules=["q_proj"]))
    model.add_adapter("second", lora_ga(r=2, target_modules=["v_proj"]))
    first, second = list(pairs(model)), list(pairs(model, "second"))
    assert {pair.name.rpartition(".")[2] for pair in first} == {"q_proj"}
    assert {pair.name.rpartition(".")[2] for pair in second} == {"v_proj"}
    assert {pair.r for pair in second} == {2}
    assert list(pairs(model, "third")) == []
    assert list(pairs(get_peft_model(pico_llama(), SVFitConfig(target_modules=["q_proj"])))) == []


def test_embeddings_and_convolutions_have_no_pair():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    peft_model = get_peft_model(model, LoraConfig(target_modules=["0", "1"], r=2))
    assert [pair.name for pair in pairs(peft_model)] == ["1"]
