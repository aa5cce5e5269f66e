"""What PEFT offers for LoRA works on our adapters, live and loaded; where it cannot, it says so."""

import copy

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from peft_gradinit import export_adapter, load_for_training
from peft_gradinit.errors import ConfigError
from tests.exports import config, trained
from tests.helpers import base_weights, pico_llama, relative_error, same_weights, train_steps
from tests.peft_tools.adapters import (
    EXACT,
    NAMES,
    adapter,
    another,
    every_form,
    every_method,
    output,
    two_adapters,
)


@every_form
@every_method
def test_merge_and_unload_gives_the_function_in_a_plain_model(method, form, tmp_path):
    peft_model = adapter(method, form, tmp_path)
    want = output(peft_model)
    model = peft_model.merge_and_unload(safe_merge=True)
    assert type(model) is type(pico_llama())
    assert {n for n, _ in model.named_parameters()} == {
        n for n, _ in pico_llama().named_parameters()
    }
    assert relative_error(output(model), want) <= EXACT


@every_form
@every_method
def test_merging_and_unmerging_comes_back(method, form, tmp_path):
    peft_model = adapter(method, form, tmp_path)
    want, before = output(peft_model), base_weights(peft_model)
    peft_model.merge_adapter()
    assert relative_error(output(peft_model), want) <= EXACT
    assert not same_weights(before, base_weights(peft_model))
    peft_model.unmerge_adapter()
    assert relative_error(output(peft_model), want) <= EXACT
    for name, weight in base_weights(peft_model).items():
        assert relative_error(weight, before[name]) <= 1e-6


@every_form
@every_method
def test_one_of_two_adapters_is_merged_by_name(method, form, tmp_path):
    peft_model = two_adapters(method, form, tmp_path)
    peft_model.set_adapter("second")
    want = output(peft_model)
    peft_model.set_adapter("default")
    assert relative_error(output(peft_model), want) > 1e-3
    assert (
        relative_error(output(peft_model.merge_and_unload(adapter_names=["second"])), want) <= EXACT
    )


@every_form
@every_method
def test_switching_and_deleting(method, form, tmp_path):
    peft_model = two_adapters(method, form, tmp_path)
    first = output(peft_model)
    peft_model.set_adapter("second")
    second = output(peft_model)
    assert relative_error(second, first) > 1e-3
    peft_model.set_adapter("default")
    assert torch.equal(output(peft_model), first)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        peft_model.delete_adapter("default")
    assert list(peft_model.peft_config) == peft_model.active_adapters == ["second"]
    assert torch.equal(output(peft_model), second)
    assert not any(".default" in name for name in peft_model.state_dict())
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model), output(pico_llama()))


@every_form
@every_method
def test_adapters_in_one_batch(method, form, tmp_path):
    peft_model = two_adapters(method, form, tmp_path)
    names = ["default", "second", "__base__", "second"]
    if (method, form) == ("svfit", "live"):
        with pytest.raises(ConfigError, match=r"cannot mix adapters in one batch.*as plain LoRA"):
            output(peft_model, adapter_names=names)
        return
    mixed = output(peft_model, adapter_names=names)
    want = {"__base__": output(pico_llama())}
    for name in ("default", "second"):
        peft_model.set_adapter(name)
        want[name] = output(peft_model)
    for row, name in enumerate(names):
        assert relative_error(mixed[row], want[name][row]) <= EXACT


@pytest.mark.parametrize("method", ["lora_ga", "eva"])
def test_adapters_in_one_generated_batch(method, tmp_path):
    peft_model = two_adapters(method, "live", tmp_path)
    prompts = torch.arange(1, 13).reshape(3, 4)
    names = ["default", "second", "__base__"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = peft_model.generate(input_ids=prompts, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = pico_llama() if name == "__base__" else peft_model
        if name != "__base__":
            peft_model.set_adapter(name)
        one = alone.generate(input_ids=prompts[row : row + 1], **options)
        assert torch.equal(mixed[row], one[0])


@every_method
def test_hot_swapping_of_loaded_adapters(method, tmp_path):
    options = {"rho": 1} if method == "eva" else {}  # else the patterns differ
    loaded = trained(method, **options)
    loaded.save_pretrained(tmp_path / "first")
    other = trained(method, **options)
    train_steps(other, 5)
    other.eval().save_pretrained(tmp_path / "second")
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path / "first")
    hotswap_adapter(loaded, str(tmp_path / "second"), adapter_name="default")
    assert relative_error(output(loaded), output(other)) <= EXACT


def test_hot_swapping_between_methods_and_ranks_after_an_export_for_serving(tmp_path):
    for i, method in enumerate(NAMES):
        export_adapter(another(method, steps=i), tmp_path / method, "serving")
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path / NAMES[0])
    for i, method in enumerate(NAMES):
        hotswap_adapter(loaded, str(tmp_path / method), adapter_name="default")
        assert relative_error(output(loaded), output(another(method, steps=i))) <= EXACT


@every_method
def test_swapping_a_saved_adapter_into_a_live_one_is_refused(method, tmp_path):
    peft_model = trained(method)
    want = output(peft_model)
    another(method).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Incompatible PEFT types found"):
        hotswap_adapter(peft_model, str(tmp_path), adapter_name="default")
    assert torch.equal(output(peft_model), want)


@pytest.mark.parametrize("method", ["lora_ga", "lora_one", "eva"])
def test_padded_live_adapter_is_not_saved_as_something_unloadable(method, tmp_path):
    peft_model = trained(method)
    prepare_model_for_compiled_hotswap(peft_model, target_rank=16)
    with pytest.raises(ConfigError, match=r"q_proj has factors of rank 16, but .*compiled_hotswap"):
        peft_model.save_pretrained(tmp_path)


@every_form
@every_method
def test_compiled_model_is_the_same_function(method, form, tmp_path):
    peft_model = adapter(method, form, tmp_path)
    want = output(peft_model)
    torch.compiler.reset()
    compiled = torch.compile(peft_model, backend="aot_eager")
    assert relative_error(output(compiled), want) <= EXACT


@pytest.mark.parametrize("method", ["lora_ga", "svfit"])
def test_compiled_model_trains_alike(method):
    torch.compiler.reset()
    eager, compiled = trained(method).train(), trained(method).train()
    losses = train_steps(torch.compile(compiled, backend="aot_eager"), 2)
    assert losses == pytest.approx(train_steps(eager, 2), rel=1e-5)


@every_method
def test_live_layers_compile_without_a_graph_break(method):
    torch.compiler.reset()
    peft_model = trained(method)
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 48)
    want = layer(x)
    got = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert relative_error(got, want) <= EXACT


@every_method
def test_mixed_model_takes_the_saved_form_and_names_the_live_one(method, tmp_path):
    peft_model = trained(method)
    peft_model.save_pretrained(tmp_path)
    mixed = PeftMixedModel.from_pretrained(pico_llama(), str(tmp_path))
    assert relative_error(output(mixed), output(peft_model)) <= EXACT
    model = pico_llama()
    with pytest.raises(ValueError, match=rf"'{method.upper()}' is not compatible"):
        get_peft_model(model, config(method), mixed=True)
    assert torch.equal(output(model), output(pico_llama()))


@every_form
@every_method
def test_status_knows_the_adapters(method, form, tmp_path):
    peft_model = two_adapters(method, form, tmp_path)
    status = get_model_status(peft_model)
    kind = method.upper() if form == "live" else "LORA"
    assert status.peft_types == {"default": kind, "second": kind}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.available_adapters == ["default", "second"]
    assert status.num_adapter_layers == 14
    assert set(status.devices) == {"default", "second"}
    assert len(get_layer_status(peft_model)) == 14
    n_trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert status.trainable_params == n_trainable
    assert status.requires_grad["default"] is (form == "live")
    peft_model.merge_adapter()
    assert get_model_status(peft_model).merged_adapters == ["default"]


@every_method
def test_auto_model_finds_base_and_adapter(method, tmp_path):
    pico_llama().save_pretrained(tmp_path / "base")
    base = type(pico_llama()).from_pretrained(tmp_path / "base").eval()
    peft_model = trained(method, base)
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert relative_error(output(loaded), output(peft_model)) <= EXACT


@every_method
def test_saved_adapter_beside_a_live_one(method, tmp_path):
    saved = another(method)
    saved.save_pretrained(tmp_path)
    peft_model = trained(method)
    want = output(peft_model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        peft_model.load_adapter(tmp_path, "second")
    assert torch.equal(output(peft_model), want)
    load_for_training(peft_model, tmp_path, "second")
    assert relative_error(output(peft_model), output(saved)) <= EXACT
    peft_model.set_adapter("default")
    assert torch.equal(output(peft_model), want)


@every_form
@every_method
def test_copies_are_independent(method, form, tmp_path):
    peft_model = adapter(method, form, tmp_path)
    want = output(peft_model)
    peft_model.save_pretrained(tmp_path / "saved")  # attends to what is published from here
    duplicate = copy.deepcopy(peft_model)
    assert torch.equal(output(duplicate), want)
    for name, parameter in duplicate.named_parameters():
        if "lora_" in name or "svfit_delta" in name:
            parameter.data.mul_(1.5)
    assert torch.equal(output(peft_model), want)
    assert relative_error(output(duplicate), want) > 1e-3
    duplicate.save_pretrained(tmp_path / "duplicate")
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path / "duplicate")
    assert relative_error(output(loaded), output(duplicate)) <= EXACT


@every_form
@every_method
def test_rescaling(method, form, tmp_path):
    peft_model = adapter(method, form, tmp_path)
    want = output(peft_model)
    if (method, form) == ("svfit", "live"):
        with (
            pytest.raises(ValueError, match="scaling is only supported"),
            rescale_adapter_scale(peft_model, 0.0),
        ):
            pass
        return
    with rescale_adapter_scale(peft_model, 0.0):
        assert relative_error(output(peft_model), output(pico_llama())) <= EXACT
    assert torch.equal(output(peft_model), want)


def test_plain_adapter_beside_a_loaded_one(tmp_path):
    peft_model = adapter("lora_ga", "loaded", tmp_path)
    want = output(peft_model)
    peft_model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
    peft_model.add_weighted_adapter(
        ["default", "plain"], [1.0, 1.0], "both", combination_type="cat"
    )
    peft_model.set_adapter("both")
    assert relative_error(output(peft_model), want) <= EXACT


def test_live_svfit_says_how_it_is_combined():
    peft_model = trained("svfit")
    with pytest.raises(ConfigError, match=r"cannot combine the live SVFit adapters \['default'\]"):
        peft_model.add_weighted_adapter(["default"], [1.0], "sum")
