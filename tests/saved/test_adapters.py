"""Reading adapters: the update is PEFT's, and what cannot be read is refused by name."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from peft_gradinit import SVFitConfig
from peft_gradinit.errors import AdapterError
from peft_gradinit.records import read_adapter, relative_norm, write_adapter
from tests.helpers import adapted, lora_ga, pico_llama, relative_error, train_steps
from tests.moe.models import mixtral
from tests.saved.adapters import logits_on_fresh_base, lora_config, saved_lora


@pytest.mark.parametrize("use_rslora", [False, True])
def test_updates_are_those_that_peft_computes(tmp_path, use_rslora):
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    saved_lora(tmp_path / "lora", use_rslora=use_rslora, **patterns)
    model = PeftModel.from_pretrained(pico_llama(), tmp_path / "lora")
    adapter = read_adapter(tmp_path / "lora")
    modules = dict(model.base_model.model.named_modules())
    assert len(adapter.layers) == 6
    for name, update in adapter.layers.items():
        want = modules[name].get_delta_weight("default")
        assert relative_error(update.matrix(), want) < 1e-6
        assert adapter.scaling(name) == modules[name].scaling["default"]
        norm = relative_norm(update, modules[name].weight)
        assert norm == pytest.approx((want.norm() / modules[name].weight.norm()).item(), rel=1e-4)


def test_writing_folds_the_scaling_and_keeps_the_function(tmp_path):
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    saved_lora(tmp_path / "lora", use_rslora=True, **patterns)
    adapter = read_adapter(tmp_path / "lora")
    write_adapter(tmp_path / "plain", adapter, adapter.layers)
    want, got = (logits_on_fresh_base(tmp_path / name) for name in ("lora", "plain"))
    assert relative_error(got, want) < 1e-5
    again = read_adapter(tmp_path / "plain")
    assert {again.scaling(name) for name in again.layers} == {1.0}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_file_without_peft_s_prefix_is_written_with_it_throughout(tmp_path):
    """Such a file is saved from a model that PEFT's functions adapted in place."""
    saved_lora(tmp_path / "lora", modules_to_save=["lm_head"])
    adapter, file = read_adapter(tmp_path / "lora"), tmp_path / "bare" / SAFETENSORS_WEIGHTS_NAME
    shutil.copytree(tmp_path / "lora", tmp_path / "bare")
    tensors = load_file(tmp_path / "lora" / SAFETENSORS_WEIGHTS_NAME)
    save_file({key.removeprefix("base_model.model."): t for key, t in tensors.items()}, file)
    bare = read_adapter(tmp_path / "bare")
    assert bare.layers.keys() == adapter.layers.keys()
    assert bare.others
    write_adapter(tmp_path / "new", bare, bare.layers)
    written = load_file(tmp_path / "new" / SAFETENSORS_WEIGHTS_NAME)
    assert all(key.startswith("base_model.model.") for key in written)
    head = "base_model.model.lm_head.weight"
    assert torch.equal(written[head], adapter.others[head])


def test_adapters_of_this_package_are_plain_lora(tmp_path):
    model = adapted(pico_llama(), lora_ga(r=2))
    train_steps(model, 2)
    model.save_pretrained(tmp_path / "ga")
    adapter = read_adapter(tmp_path / "ga")
    assert {update.r for update in adapter.layers.values()} == {4}
    assert adapter.overwritten_by is None


def test_one_on_the_hub_is_checked_as_one_in_a_folder(tmp_path, monkeypatch):
    model = adapted(pico_llama(), lora_ga(r=2))
    model.save_pretrained(tmp_path / "ga")
    monkeypatch.setattr(
        "peft_gradinit.records.hub.snapshot_download", lambda *_, **__: tmp_path / "ga"
    )
    adapter = read_adapter("me/ga")
    assert adapter.directory == "me/ga"
    assert len(adapter.layers) == len(read_adapter(tmp_path / "ga").layers)
    path = tmp_path / "ga" / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="damaged or of another save than the gradinit"):
        read_adapter("me/ga")


def test_one_that_the_hub_does_not_have_is_named(tmp_path):
    with pytest.raises(
        AdapterError, match="'me/nothing' is no folder here, and cannot be downloaded"
    ):
        read_adapter("me/nothing")


def test_adapters_in_folders_of_their_own_are_named(tmp_path):
    model = get_peft_model(pico_llama(), LoraConfig(target_modules=["q_proj"]), "german")
    model.add_adapter("french", LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(AdapterError, match=r"give one of .*out.french, .*out.german"):
        read_adapter(tmp_path / "out")
    assert read_adapter(tmp_path / "out" / "german").layers


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="there is no adapter at"):
        read_adapter(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"no readable adapter_config\.json"):
        read_adapter(tmp_path / "empty")


def test_other_types_are_refused(tmp_path):
    model = get_peft_model(pico_llama(), IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(AdapterError, match="is a IA3 adapter"):
        read_adapter(tmp_path / "ia3")
    saved_lora(tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterError, match="DoRA"):
        read_adapter(tmp_path / "dora")
    config = SVFitConfig(r=4, target_modules=["q_proj"], save_format="compact")
    get_peft_model(pico_llama(), config).save_pretrained(tmp_path / "compact")
    with pytest.raises(AdapterError, match="save_format='lora'"):
        read_adapter(tmp_path / "compact")


def test_damage_is_named(tmp_path):
    folder = saved_lora(tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    whole = load_file(weights)
    key = next(key for key in whole if key.endswith("lora_B.weight"))
    save_file({k: v for k, v in whole.items() if k != key}, weights)
    with pytest.raises(AdapterError, match=r"is damaged: .* lora_B of shape None"):
        read_adapter(folder)
    save_file({**whole, key: torch.ones(3, 9)}, weights)
    with pytest.raises(AdapterError, match=r"lora_B of shape \(3, 9\)"):
        read_adapter(folder)
    save_file(whole, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 9}))
    with pytest.raises(AdapterError, match=r"rank 4 in the weights and 9 in adapter_config\.json"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(AdapterError, match="cannot read the weights"):
        read_adapter(folder)


def test_pissa_is_no_update_of_the_original(tmp_path):
    get_peft_model(pico_llama(), lora_config("pissa")).save_pretrained(tmp_path / "pissa")
    adapter = read_adapter(tmp_path / "pissa")
    assert adapter.overwritten_by == "pissa"
    with pytest.raises(AdapterError, match="peft-gradinit convert"):
        adapter.check_untouched_base()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"lora_bias": True}, r"lora_B\.bias"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:`lora_bias=True` was passed",
    "ignore:.* LoRA tensor.* have invalid shape",  # PEFT's, of the biases
)
def test_what_a_new_scaling_would_change_is_not_written(options, key, tmp_path):
    adapter = read_adapter(saved_lora(tmp_path / "lora", **options))
    with pytest.raises(AdapterError, match=rf"adapts more than linear layers: .*{key} cannot be"):
        write_adapter(tmp_path / "new", adapter, adapter.layers)
    assert not (tmp_path / "new").exists()


def test_factors_of_experts_are_no_linear_layers(tmp_path):
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    get_peft_model(mixtral(), config).save_pretrained(tmp_path / "moe")
    adapter = read_adapter(tmp_path / "moe")
    assert {name.rpartition(".")[2] for name in adapter.layers} == {"q_proj"}
    assert len([key for key in adapter.others if ".experts." in key]) == 4 * len(adapter.layers)
    with pytest.raises(AdapterError, match="adapts more than linear layers"):
        write_adapter(tmp_path / "new", adapter, adapter.layers)
