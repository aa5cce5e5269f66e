"""`add_weighted_adapter` on our adapters: plain LoRA of the ranks that are there, no calibration."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_gradinit import EvaConfig, LoraOneConfig, load_for_training
from peft_gradinit.errors import ConfigError
from tests.helpers import logits, pico_llama, quiet, relative_error, token_batches

ADDS_FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
FACTORS_A_SUM = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
WEIGHTS = {"default": 1.0, "b": 0.5}


class Once:
    """Batches that can be read once: a second calibration would find none."""

    def __init__(self, seed):
        self._batches = token_batches(seed=seed)

    def __iter__(self):
        batches, self._batches = self._batches, None
        return iter(batches)


def config(config_cls, seed, **options):
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return config_cls(**{**values, **options}, calibration=quiet(Once(seed)))


def pair(config_cls, **options):
    """Two adapters with different starts, both moved as by training."""
    model = get_peft_model(pico_llama(), config(config_cls, 1, **options))
    model.add_adapter("b", config(config_cls, 2, **options))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def layers(model):
    return {
        n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")
    }


def weighted_sum(layer):
    return sum(w * layer.get_delta_weight(n) for n, w in WEIGHTS.items() if n in layer.lora_A)


def combine(model, kind, **options):
    options.setdefault("density", 0.5)
    model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum", kind, **options)


def check_reload(model, tmp_path):
    model.set_adapter("sum")
    want = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path / "sum")
    assert type(plain.peft_config["default"]) is LoraConfig
    assert (logits(plain) - want).abs().max() <= 1e-5
    assert not (tmp_path / "sum" / "gradinit.json").exists()


@pytest.mark.parametrize("config_cls", [LoraOneConfig, EvaConfig])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_cat_is_the_weighted_sum_and_reads_no_data(config_cls, use_rslora, tmp_path):
    model = pair(config_cls, use_rslora=use_rslora)
    combine(model, "cat")
    for name, layer in layers(model).items():
        if layer.lora_A:
            want = weighted_sum(layer)
            assert relative_error(layer.get_delta_weight("sum"), want) <= 1e-5, name
            assert layer.r["sum"] == sum(layer.r[n] for n in WEIGHTS if n in layer.r)
    check_reload(model, tmp_path)


def test_eva_layers_that_one_adapter_has_lost_are_combined_all_the_same():
    model = pair(EvaConfig, min_rank=0)
    lost = {n for n, m in layers(model).items() if ("default" in m.lora_A) != ("b" in m.lora_A)}
    model.delete_adapter("b")  # make sure that there is such a layer
    names = [n for n, m in layers(model).items() if "default" in m.lora_A]
    model.add_adapter("b", config(EvaConfig, 2, exclude_modules=[names[0]], max_rank=6))
    combine(model, "cat")
    assert "b" not in layers(model)[names[0]].lora_A
    for name in {names[0], *lost}:
        layer = layers(model)[name]
        assert relative_error(layer.get_delta_weight("sum"), weighted_sum(layer)) <= 1e-5


@pytest.mark.parametrize("kind", [*FACTORS_A_SUM, *ADDS_FACTORS])
@pytest.mark.parametrize(
    ("config_cls", "options"), [(LoraOneConfig, {}), (EvaConfig, {"rho": 1.0, "use_rslora": True})]
)
def test_every_kind_of_combination_reloads_as_plain_lora(config_cls, options, kind, tmp_path):
    model = pair(config_cls, **options)
    combine(model, kind)
    check_reload(model, tmp_path)


def test_svd_keeps_the_best_approximation_at_the_largest_rank():
    model = pair(EvaConfig)
    largest = max(rank for layer in layers(model).values() for rank in layer.r.values())
    assert largest > 4
    combine(model, "svd")
    for name, layer in layers(model).items():
        if layer.lora_A:
            want = weighted_sum(layer)
            S = torch.linalg.svdvals(want)
            error = (layer.get_delta_weight("sum") - want).norm()
            assert layer.r["sum"] == min(largest, *want.shape), name
            assert error <= 1.001 * S[largest:].norm() + 1e-6, name


@pytest.mark.parametrize("kind", ADDS_FACTORS)
def test_adding_factors_of_different_ranks_is_refused_and_leaves_the_model(kind):
    model = pair(EvaConfig)
    before, configs = logits(model), dict(model.peft_config)
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=rf"combination_type='{kind}'.*equal ranks.*'cat' or"):
        combine(model, kind)
    assert model.peft_config == configs
    assert trains == {n: p.requires_grad for n, p in model.named_parameters()}
    assert torch.equal(logits(model), before)


def test_adapters_that_were_loaded_for_training_combine_too(tmp_path):
    pair(LoraOneConfig).save_pretrained(tmp_path)
    model = load_for_training(pico_llama(), tmp_path)
    model = load_for_training(model, tmp_path / "b", "b")
    combine(model, "cat")
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    assert relative_error(layer.get_delta_weight("sum"), weighted_sum(layer)) <= 1e-5


def test_a_name_that_exists_is_left_alone_as_in_peft():
    model = pair(LoraOneConfig)
    combine(model, "cat")
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    factors = layer.lora_A["sum"].weight.clone()
    model.add_weighted_adapter(["default"], [7.0], "sum", "cat")
    assert torch.equal(layer.lora_A["sum"].weight, factors)
