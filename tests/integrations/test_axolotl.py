"""The plug-in in the order in which axolotl calls its hooks."""

import pytest
from peft import LoraModel, PeftModel

from peft_gradinit import METHODS, CalibrationCallback, init_report
from peft_gradinit.errors import ConfigError
from peft_gradinit.tuners import deferred_adapters
from tests.helpers import logits, pico_llama
from tests.trainers import losses_of, trainer_of

PLUGIN = "peft_gradinit.integrations.axolotl.GradInitPlugin"
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}


@pytest.fixture
def plugin():
    from axolotl.integrations.base import load_plugin

    return load_plugin(PLUGIN)


def cfg(adapter="lora_ga", **more):
    from axolotl.utils.dict import DictDefault

    return DictDefault({"adapter": adapter, **LORA, **more})


def trained(plugin, model, config, folder):
    trainer = trainer_of(model, folder)
    for callback in plugin.add_callbacks_post_trainer(config, trainer):
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def test_an_adapter_on_the_hub_goes_on_as_it_was_trained(plugin, tmp_path, monkeypatch):
    config = cfg("pissa")
    model, _ = plugin.load_adapter(pico_llama(), config)
    model.save_pretrained(tmp_path / "saved")
    download = lambda repo, **options: {"me/adapter": str(tmp_path / "saved")}[repo]  # noqa: E731
    monkeypatch.setattr("peft_gradinit.records.hub.snapshot_download", download)
    continued, used = plugin.load_adapter(pico_llama(), cfg("pissa", lora_model_dir="me/adapter"))
    assert used.peft_type.value == "PISSA"
    assert continued.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"peft_layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"peft_ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"peft_init_lora_weights": "pissa"}, "init_lora_weights must stay True, got 'pissa'"),
    ],
)
def test_what_the_methods_have_not_is_refused(more, part, plugin):
    with pytest.raises(ConfigError, match=part):
        plugin.load_adapter(pico_llama(), cfg(**more))


def test_a_run_starts_from_the_trainers_data_and_is_continued(plugin, tmp_path):
    config = cfg(gradinit={"learning_rate": "suggested", "max_tokens": 64, "stable_gamma": 32})
    model, used = plugin.load_adapter(pico_llama(), config)
    assert (used.r, used.lora_alpha, used.stable_gamma) == (4, 8, 32)
    assert deferred_adapters(model) == ["default"]
    trainer = trained(plugin, model, config, tmp_path)
    report = init_report(model)
    assert report.facts.n_tokens >= 64
    assert trainer.args.learning_rate == report.learning_rate.suggested
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "saved")

    there = cfg(lora_model_dir=str(tmp_path / "saved"))
    continued, _ = plugin.load_adapter(pico_llama(), there)
    assert continued.peft_config["default"].peft_type.value == "LORA_GA"
    assert any(p.requires_grad for p in continued.parameters())
    plain, _ = plugin.load_adapter(pico_llama(), there, inference=True)
    assert type(plain.base_model) is LoraModel
    assert not any(p.requires_grad for p in plain.parameters())
    assert (logits(continued) - logits(model)).abs().max() < 1e-5
    assert (logits(plain) - logits(model)).abs().max() < 1e-5
    assert plugin.add_callbacks_post_trainer(there, trainer_of(continued, tmp_path)) == []


def test_it_offers_every_method_and_leaves_others_alone(plugin, tmp_path):
    from axolotl.integrations.base import BasePlugin

    assert isinstance(plugin, BasePlugin)
    names = [capability.name for capability in plugin.get_adapter_capabilities()]
    assert names == [method.name for method in METHODS]
    assert plugin.load_adapter(pico_llama(), cfg("lora")) is None
    trainer = trainer_of(plugin.load_adapter(pico_llama(), cfg())[0], tmp_path)
    assert plugin.add_callbacks_post_trainer(cfg("lora"), trainer) == []
    assert isinstance(plugin.add_callbacks_post_trainer(cfg(), trainer)[0], CalibrationCallback)


def test_trainers_that_make_the_adapter_get_the_config_alone(plugin):
    model, config = plugin.load_adapter(pico_llama(), cfg("eva"), config_only=True)
    assert model is None
    assert (config.name, config.is_deferred, config.task_type) == ("eva", True, "CAUSAL_LM")


def test_a_start_from_the_weights_needs_no_callback(plugin, tmp_path):
    model, _ = plugin.load_adapter(pico_llama(), cfg("pissa"))
    assert isinstance(model, PeftModel)
    trainer = trained(plugin, model, cfg("pissa"), tmp_path)
    assert not any(isinstance(c, CalibrationCallback) for c in trainer.callback_handler.callbacks)


def test_what_cannot_work_is_told(plugin):
    with pytest.raises(ConfigError, match="lora_target_linear=true and lora_target_modules"):
        plugin.load_adapter(pico_llama(), cfg(lora_target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="did you mean 'stable_gamma'"):
        plugin.load_adapter(pico_llama(), cfg(gradinit={"stable_gama": 3}))
    with pytest.raises(ConfigError, match="quantises the base for the adapters 'lora' and 'qlora'"):
        plugin.pre_model_load(cfg(load_in_4bit=True))
    with pytest.raises(ConfigError, match=r"lora_qkv_kernel would compute .* adapter: lora_ga"):
        plugin.pre_model_load(cfg(lora_qkv_kernel=True, lora_o_kernel=False))
    plugin.pre_model_load(cfg())
    plugin.pre_model_load(cfg("qlora", load_in_4bit=True, lora_mlp_kernel=True))


def test_the_key_of_the_yaml_has_a_schema(plugin):
    import importlib

    module, name = plugin.get_input_args().rsplit(".", 1)
    schema = getattr(importlib.import_module(module), name)
    assert schema(gradinit={"max_tokens": 5}).gradinit == {"max_tokens": 5}
    assert schema().gradinit == {}
