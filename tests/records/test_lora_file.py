"""What is known of the LoRA file agrees with what PEFT reads."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key

from peft_gradinit.linalg import Factors
from peft_gradinit.records import (
    alpha_of,
    doubled,
    entries,
    linear_layers,
    patterns,
    plain_config,
    rank_of,
    scaling,
    unscaled,
)
from tests.helpers import pico_llama

CONFIG = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": "all-linear",
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 5},
    "alpha_pattern": {"v_proj": 9},
}


def plain(**options):
    model = get_peft_model(pico_llama(), LoraConfig(**{**CONFIG, **options}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return model


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_scalings_and_factors_are_those_of_the_live_layers(use_rslora):
    model = plain(use_rslora=use_rslora)
    config = model.peft_config["default"]
    layers, others = linear_layers(get_peft_model_state_dict(model), config)
    assert not others
    assert len(layers) == 14
    for name, factors in layers.items():
        live = model.base_model.model.get_submodule(name)
        r = live.r["default"]
        assert rank_of(config, name) == r == factors.r
        assert scaling(alpha_of(config, name), r, use_rslora=use_rslora) == live.scaling["default"]
        torch.testing.assert_close(factors.matrix(), live.get_delta_weight("default"))


def test_entries_are_read_back():
    layers = {"a.b": Factors(torch.randn(2, 5), torch.randn(4, 2))}
    again, others = linear_layers(entries(layers), LoraConfig(r=2, lora_alpha=2))
    assert not others
    assert all(torch.equal(one, two) for one, two in zip(again["a.b"], layers["a.b"], strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("base_model.model.x.lora_B.weight"), "x has lora_A .* and lora_B .* None"),
        (
            lambda e: e.update({"base_model.model.x.lora_B.weight": torch.ones(4, 3)}),
            r"x has lora_A of shape \(2, 5\) and lora_B of shape \(4, 3\)",
        ),
        (
            lambda e: e.update(entries({"x": Factors(torch.ones(3, 5), torch.ones(4, 3))})),
            "x has rank 3 in the weights and 2 in adapter_config.json",
        ),
    ],
)
def test_a_file_that_disagrees_with_itself_is_refused(change, message):
    file = entries({"x": Factors(torch.randn(2, 5), torch.randn(4, 2))})
    change(file)
    with pytest.raises(ValueError, match=message):
        linear_layers(file, LoraConfig(r=2))


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.a", "layers.1.a", "layers.10.a"],
        ["a", "x.a", "x.x.a"],
        ["model.layers.1.q", "encoder.model.layers.1.q"],
        ["w1", "mlp.w1", "w10"],
        ["experts.gate_up_proj", "shared.gate_up_proj"],
        ["odd[0]", "odd0", "b+"],
    ],
)
def test_patterns_give_every_layer_its_own_value_in_any_order(names):
    values = {name: i for i, name in enumerate(names)}
    keys = patterns(values, default=None)
    for order in (list(keys), sorted(keys), sorted(keys, reverse=True)):
        found = {name: keys[get_pattern_key(order, name)] for name in names}
        assert found == values


def test_patterns_know_a_hat_only_where_a_name_is_ambiguous():
    """PEFT before 0.15 does not know `^`."""
    assert patterns({"layers.0.a": 1, "layers.1.a": 2}, default=2) == {"layers.0.a": 1}
    assert patterns({"a": 1, "x.a": 2}, default=None) == {"^a": 1, "x.a": 2}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_doubling_the_rank_keeps_every_scaling(use_rslora):
    config = LoraConfig(**{**CONFIG, "use_rslora": use_rslora})
    twice = doubled(plain_config(config))
    for name, _ in pico_llama().named_modules():
        r = rank_of(config, name)
        assert rank_of(twice, name) == 2 * r
        want = scaling(alpha_of(config, name), r, use_rslora=use_rslora)
        got = scaling(alpha_of(twice, name), 2 * r, use_rslora=use_rslora)
        assert got == pytest.approx(want)


def test_an_unscaled_file_has_scaling_one_also_for_readers_that_ignore_patterns():
    ranks = {"layers.0.a": 3, "layers.1.a": 5}
    config = unscaled(LoraConfig(use_rslora=True, lora_alpha=99, bias="all"), ranks)
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias) == (5, 5, False, "all")
    assert config.rank_pattern == config.alpha_pattern == {"layers.0.a": 3}
    for name, r in ranks.items():
        assert alpha_of(config, name) == rank_of(config, name) == r


def test_a_plain_config_keeps_every_option_and_takes_changes():
    config = LoraConfig(lora_dropout=0.1, bias="all", exclude_modules=["k_proj"], r=3)
    assert plain_config(config, r=7) == LoraConfig(
        lora_dropout=0.1, bias="all", exclude_modules=["k_proj"], r=7
    )
