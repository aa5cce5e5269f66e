"""The life of a LoRA-GA adapter inside PEFT: inject, disable, switch, delete, merge, unload."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from peft_gradinit import LoraGAConfig, load_for_training
from peft_gradinit.errors import ConfigError
from tests.helpers import (
    adapted,
    anchors,
    base_weights,
    logits,
    lora_ga,
    pico_gpt2,
    pico_llama,
    relative_error,
    same_factors,
    same_weights,
    token_batches,
    train_steps,
)
from tests.methods.rows import INFO, config_of, started

MODELS = [pytest.param(pico_llama, id="llama"), pytest.param(pico_gpt2, id="gpt2-conv1d-tied")]


@pytest.mark.parametrize("make", MODELS)
def test_function_at_step_zero_is_the_base(make):
    before = logits(make())
    assert relative_error(logits(adapted(make())), before) <= 1e-5


@pytest.mark.parametrize("make", MODELS)
def test_base_weights_are_never_written(make, tmp_path):
    model = make()
    before = base_weights(model)
    peft_model = adapted(model)
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert same_weights(before, base_weights(peft_model))


def test_disabled_adapter_is_the_base_bit_for_bit():
    before = logits(pico_llama())
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    assert not torch.equal(logits(peft_model), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before)


def test_training_lowers_the_loss_and_moves_both_factors():
    peft_model = adapted(pico_llama())
    start = {n: p.clone() for n, p in peft_model.named_parameters() if p.requires_grad}
    losses = train_steps(peft_model, n=9)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in peft_model.named_parameters() if n in start)


@pytest.mark.parametrize("name", ["default", "german"])
def test_saved_adapter_is_plain_lora_on_a_fresh_base(name, tmp_path):
    peft_model = adapted(pico_llama(), name=name)
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    directory = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(pico_llama(), directory)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert relative_error(logits(loaded), logits(peft_model)) <= 1e-5


def test_merge_and_unload_gives_the_function_and_unload_the_base():
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    trained = logits(peft_model)
    assert relative_error(logits(peft_model.merge_and_unload(safe_merge=True)), trained) <= 1e-5
    other = adapted(pico_llama())
    assert torch.equal(logits(other.unload()), logits(pico_llama()))


def test_two_adapters_side_by_side_do_not_disturb_each_other():
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    first = logits(peft_model)
    peft_model.add_adapter("second", lora_ga(r=3, direction="A2rBr"))
    assert torch.equal(logits(peft_model), first)
    peft_model.set_adapter("second")
    assert relative_error(logits(peft_model), logits(pico_llama())) <= 1e-5
    train_steps(peft_model)
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model), first)
    peft_model.delete_adapter("second")
    assert torch.equal(logits(peft_model), first)
    assert list(peft_model.base_model.init_report) == ["default"]


def test_config_without_calibration_raises_and_changes_nothing():
    model = pico_llama()
    modules = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="has no calibration"):
        get_peft_model(model, LoraGAConfig(target_modules="all-linear"))
    assert [type(m) for m in model.modules()] == modules


def test_merging_and_unmerging_gives_the_function_and_the_base_back():
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    before, trained = base_weights(peft_model), logits(peft_model)
    peft_model.merge_adapter(safe_merge=True)
    assert relative_error(logits(peft_model), trained) <= 1e-5
    with pytest.raises(ConfigError, match=r"\['default'\] are merged .*unmerge_adapter\(\) first"):
        peft_model.add_adapter("second", lora_ga())
    peft_model.unmerge_adapter()
    assert relative_error(logits(peft_model), trained) <= 1e-5
    for name, weight in base_weights(peft_model).items():
        # PEFT adds and subtracts, so the base comes back to float32 rounding of the sum.
        assert relative_error(weight, before[name]) <= 1e-6


@pytest.mark.parametrize("method", INFO)
def test_no_start_is_taken_from_merged_weights(method):
    peft_model = started(method)
    train_steps(peft_model)
    peft_model.merge_adapter()
    with pytest.raises(ConfigError, match=r"\['default'\] are merged .*unmerge_adapter\(\) first"):
        peft_model.add_adapter("second", config_of(method))
    assert list(peft_model.peft_config) == ["default"]
    peft_model.unmerge_adapter()
    peft_model.add_adapter("second", config_of(method))


def test_delta_weight_is_the_change_of_the_effective_weight():
    peft_model = adapted(pico_llama())
    layer = peft_model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.get_delta_weight("default").abs().max() <= 1e-6  # A0 and A cancel in float32
    train_steps(peft_model)
    x = torch.randn(5, 112)
    change = x @ layer.get_delta_weight("default").T
    assert relative_error(layer(x) - layer.base_layer(x), change) <= 1e-4  # a difference of sums


def test_adapters_mix_in_one_batch():
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    peft_model.add_adapter("second", lora_ga(r=2))
    peft_model.set_adapter("second")
    train_steps(peft_model, n=3)
    ids = torch.arange(1, 31).reshape(3, 10)
    peft_model.eval()
    want = []
    with torch.no_grad():
        for row, name in zip(ids, ("default", "second"), strict=False):
            peft_model.set_adapter(name)
            want.append(peft_model(row[None]).logits)
        with peft_model.disable_adapter():
            want.append(peft_model(ids[2:]).logits)
        mixed = peft_model(ids, adapter_names=["default", "second", "__base__"]).logits
    assert relative_error(mixed, torch.cat(want)) <= 1e-5


def test_switching_moves_requires_grad_and_status_is_readable():
    peft_model = adapted(pico_llama())
    peft_model.add_adapter("second", lora_ga())
    for name in ("second", "default"):
        peft_model.set_adapter(name)
        trainable = [n for n, p in peft_model.named_parameters() if p.requires_grad]
        assert trainable
        assert all(f".{name}." in n for n in trainable)
    status = peft_model.get_model_status()
    assert (status.active_adapters, status.available_adapters) == (
        ["default"],
        ["default", "second"],
    )
    assert status.requires_grad == {"default": True, "second": False}
    assert status.trainable_params == sum(
        p.numel() for p in peft_model.parameters() if p.requires_grad
    )
    assert len(peft_model.get_layer_status()) == 14


def test_trainable_parameters_are_those_of_a_lora_of_the_same_rank():
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = get_peft_model(pico_llama(), config).get_nb_trainable_parameters()[0]
    assert adapted(pico_llama()).get_nb_trainable_parameters()[0] == plain


def test_deepcopy_is_independent():
    peft_model = adapted(pico_llama())
    other = copy.deepcopy(peft_model)
    before = logits(peft_model)
    train_steps(other)
    assert torch.equal(logits(peft_model), before)
    assert not torch.equal(logits(other), before)


def test_dropout_is_off_in_calibration_and_on_in_training():
    with_dropout = adapted(pico_llama(), lora_ga(lora_dropout=0.5))
    want = anchors(adapted(pico_llama()))
    assert same_factors(anchors(with_dropout), want)
    batch = token_batches()[0]
    with_dropout.train()
    train_steps(with_dropout, n=1)
    assert with_dropout(**batch).loss != with_dropout(**batch).loss


def test_sequence_classifier_trains_and_reloads_its_head(tmp_path):
    def classifier():
        torch.manual_seed(0)
        config = pico_llama().config
        config.num_labels, config.pad_token_id = 3, 0
        return LlamaForSequenceClassification(config).eval()

    data = [{**b, "labels": torch.arange(4) % 3} for b in token_batches()]
    peft_model = adapted(
        classifier(), lora_ga(data, task_type="SEQ_CLS", target_modules=["q_proj"])
    )
    ids = data[0]["input_ids"]
    assert relative_error(peft_model(ids).logits, classifier()(ids).logits) <= 1e-5
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    for batch in data:
        peft_model(**batch).loss.backward()
        optimizer.step()
    peft_model.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(classifier(), tmp_path),
        load_for_training(classifier(), tmp_path),
    ):
        assert relative_error(loaded(ids).logits, peft_model(ids).logits) <= 1e-5
