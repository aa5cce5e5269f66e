"""The life of an SVFit adapter inside PEFT: inject, train, disable, switch, delete, fail."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_gradinit import SVFitConfig, load_for_training
from peft_gradinit.errors import ConfigError, TargetError
from tests.helpers import (
    logits,
    pico_gpt2,
    pico_llama,
    relative_error,
    same_weights,
    train_steps,
)
from tests.tuners.svfits import EXPORT, gpt2_with_tied_head, layers_of, svfit, svfitted

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is"),
]


MODELS = [
    pytest.param(lambda: svfitted(pico_llama()), pico_llama, id="llama"),
    pytest.param(lambda: svfitted(pico_llama(), r="full"), pico_llama, id="llama-full"),
    pytest.param(gpt2_with_tied_head, pico_gpt2, id="gpt2-conv1d-tied"),
]


@pytest.mark.parametrize(("make", "base"), MODELS)
def test_output_at_step_zero_and_when_disabled_is_the_base_bit_for_bit(make, base):
    before = logits(base())
    peft_model = make()
    assert torch.equal(logits(peft_model), before)
    train_steps(peft_model, lr=0.1)
    assert not torch.equal(logits(peft_model), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before)


@pytest.mark.parametrize("r", [1, 4, "full"])
def test_exactly_r_numbers_a_layer_are_trained(r):
    peft_model = svfitted(pico_llama(), r=r)
    layers = layers_of(peft_model)
    assert len(layers) == 14
    for layer in layers.values():
        want = min(layer.in_features, layer.out_features) if r == "full" else r
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == want
        assert layer.r == {"default": want}
    trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    assert all(".svfit_delta." in name for name in trained)
    start = {n: p.clone() for n, p in peft_model.named_parameters()}
    losses = train_steps(peft_model, n=9, lr=0.1)
    assert losses[-3] < losses[0]  # the same batch
    moved = {n for n, p in peft_model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == trained.keys()


@pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2"])
def test_base_weights_are_never_written(make, tmp_path):
    model = make()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    peft_model = svfitted(model)
    train_steps(peft_model, lr=0.1)
    peft_model.save_pretrained(tmp_path)
    after = peft_model.unload().state_dict()
    assert same_weights(before, after)


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": r".*layers\.1\..*(q|down)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": None},
    ],
    ids=["regex", "exclude", "layers", "default"],
)
def test_targets_are_those_of_pefts_lora(selection):
    plain = get_peft_model(pico_llama(), LoraConfig(**selection, task_type="CAUSAL_LM"))
    assert svfitted(pico_llama(), **selection).targeted_module_names == plain.targeted_module_names


# Ranks ----------------------------------------------------------------------------------------


def test_rank_above_the_layers_is_lowered_by_name_and_only_there(tmp_path):
    with pytest.warns(UserWarning, match=r"a lower rank: .*k_proj \(24 of 40\).*v_proj") as warned:
        peft_model = svfitted(pico_llama(), r=40, rank_pattern={"up_proj": "full"})
    assert "q_proj" not in str(warned[0].message)
    ranks = {n.split(".")[-1]: layer.r["default"] for n, layer in layers_of(peft_model).items()}
    assert (ranks["q_proj"], ranks["k_proj"], ranks["up_proj"]) == (40, 24, 48)
    train_steps(peft_model, lr=0.1)
    peft_model.save_pretrained(tmp_path)
    saved = LoraConfig.from_pretrained(tmp_path)
    assert (saved.r, saved.lora_alpha) == (48, 48)
    assert saved.rank_pattern == saved.alpha_pattern
    assert saved.rank_pattern["model.layers.0.self_attn.k_proj"] == 24
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path)
    assert relative_error(logits(loaded), logits(peft_model)) <= EXPORT
    again = load_for_training(pico_llama(), tmp_path)  # without a warning
    assert torch.equal(logits(again), logits(peft_model))


# Several adapters -----------------------------------------------------------------------------


def test_two_adapters_side_by_side_and_summed():
    peft_model = svfitted(pico_llama())
    train_steps(peft_model, lr=0.1)
    first = logits(peft_model)
    peft_model.add_adapter("second", svfit(r=3, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits(peft_model), first)
    peft_model.set_adapter("second")
    assert torch.equal(logits(peft_model), logits(pico_llama()))
    train_steps(peft_model, lr=0.1)
    second = logits(peft_model)
    peft_model.base_model.set_adapter(["default", "second"])
    both = logits(peft_model)
    assert relative_error(logits(peft_model.merge_and_unload()), both) <= EXPORT
    assert min(relative_error(both, first), relative_error(both, second)) > 1e-3


def test_deleting_an_adapter_leaves_the_others():
    peft_model = svfitted(pico_llama())
    train_steps(peft_model, lr=0.1)
    first = logits(peft_model)
    peft_model.add_adapter("second", svfit(target_modules=["q_proj"]))
    peft_model.delete_adapter("second")
    assert torch.equal(logits(peft_model), first)
    assert not any("second" in name for name in peft_model.state_dict())
    peft_model.add_adapter("third", svfit(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        peft_model.delete_adapter("default")
    assert torch.equal(logits(peft_model), logits(pico_llama()))


def test_mixed_batches_are_refused_rather_than_ignored():
    peft_model = svfitted(pico_llama())
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"cannot mix adapters .* adapter_names=\['default'\]"):
        peft_model(input_ids=ids, adapter_names=["default"])


# Failures -------------------------------------------------------------------------------------


def assert_untouched(model, before):
    assert not layers_of(model)
    assert same_weights(before, model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_other_kinds_of_layers_are_refused_by_name():
    model = pico_llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(TargetError, match=r"matches model\.embed_tokens, a Embedding"):
        svfitted(model, target_modules=["q_proj", "embed_tokens"])
    assert_untouched(model, before)


def test_weight_that_is_not_finite_is_refused_by_name():
    model = pico_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.up_proj has values that are not fin"):
        svfitted(model)
    assert_untouched(model, before)


def test_sharded_weight_is_refused_by_name():
    model = pico_llama()
    model.model.layers[1].mlp.up_proj.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(TargetError, match=r"the whole weight of .*up_proj, \(112, 48\), but got"):
        svfitted(model)


def test_interrupted_decomposition_leaves_the_model_as_it_was(monkeypatch):
    def interrupt(self, weight, r, name):
        raise KeyboardInterrupt

    peft_model = svfitted(pico_llama())
    train_steps(peft_model, lr=0.1)
    trained, model = logits(peft_model), pico_llama()
    narrow = svfitted(pico_llama(), target_modules=["q_proj"])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    monkeypatch.setattr(SVFitConfig, "basis", interrupt)
    with pytest.raises(KeyboardInterrupt):
        svfitted(model)
    assert_untouched(model, before)
    with pytest.raises(KeyboardInterrupt):
        peft_model.add_adapter("second", svfit())
    assert torch.equal(logits(peft_model), trained)
    assert list(peft_model.peft_config) == ["default"]
    with pytest.raises(KeyboardInterrupt):
        narrow.add_adapter("second", svfit())
    assert {name.rpartition(".")[2] for name in layers_of(narrow)} == {"q_proj"}
