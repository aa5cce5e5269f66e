"""What is saved is plain LoRA, right wherever PEFT is; what is loaded for training continues."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_gradinit import load_for_training
from tests.helpers import (
    adapted,
    logits,
    lora_ga,
    pico_gpt2,
    pico_llama,
    relative_error,
    token_batches,
    train_steps,
)

PATTERNS = {
    "rank_pattern": {"k_proj": 2, "layers.0.mlp.up_proj": 30},  # 30 is lowered to 24
    "alpha_pattern": {"k_proj": 5, "down_proj": 3},
}


def trained(model=None, config=None, name="default"):
    peft_model = adapted(model or pico_llama(), config, name)
    train_steps(peft_model)
    return peft_model


def saved_config(directory):
    return json.loads((directory / "adapter_config.json").read_text())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.filterwarnings("ignore:LoRA-GA needs")
def test_saved_config_is_a_plain_lora_config_of_twice_the_rank(use_rslora, tmp_path):
    config = lora_ga(use_rslora=use_rslora, **PATTERNS)
    trained(config=config).save_pretrained(tmp_path / "ours")
    get_peft_model(pico_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "plain"
    )
    saved = saved_config(tmp_path / "ours")
    assert set(saved) <= set(saved_config(tmp_path / "plain"))
    assert (saved["peft_type"], saved["init_lora_weights"], saved["r"]) == ("LORA", True, 8)
    growth = math.sqrt(2) if use_rslora else 2
    assert saved["lora_alpha"] == pytest.approx(8 * growth)
    lowered = "model.layers.0.mlp.up_proj"
    keys = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    downs = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    # A rank was lowered, so the patterns name every layer: PEFT sorts them on saving.
    assert saved["rank_pattern"] == {lowered: 48, **dict.fromkeys(keys, 4)}
    scale = math.sqrt(24 / 30) if use_rslora else 24 / 30
    assert saved["alpha_pattern"] == pytest.approx({
        lowered: growth * 8 * scale,
        **dict.fromkeys(keys, growth * 5),
        **dict.fromkeys(downs, growth * 3),
    })
    assert config.r == 4
    assert config.rank_pattern == PATTERNS["rank_pattern"]


ORDERED = {
    "rank_pattern": {"q_proj": 3, ".*_proj": 2},
    "alpha_pattern": {"q_proj": 32, "layers.0.self_attn.q_proj": 4, ".*_proj": 6},
}
"""The first key that matches counts. Files have them sorted, and then others come first."""

OPTIONS = {
    "plain": {},
    "ordered": ORDERED,
    "rslora-ordered": {"use_rslora": True, **ORDERED},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora-patterns": {"use_rslora": True, **PATTERNS},
    "lowered": {"r": 40, "use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "modules-to-save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.filterwarnings("ignore:LoRA-GA needs")
def test_every_option_starts_at_the_base_and_reloads_plain_and_live(options, tmp_path):
    peft_model = adapted(pico_llama(), lora_ga(**options))
    # 1e-4: at r = 40 the two cancelling halves are far larger than the base weight.
    assert relative_error(logits(peft_model), logits(pico_llama())) <= 1e-4
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert relative_error(logits(peft_model), logits(pico_llama())) > 1e-3
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path)
    assert relative_error(logits(plain), logits(peft_model)) <= 1e-5
    live = load_for_training(pico_llama(), tmp_path)
    assert torch.equal(logits(live), logits(peft_model))
    shapes = {n: p.shape for n, p in peft_model.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in live.named_parameters() if p.requires_grad} == shapes
    live.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(pico_llama(), tmp_path / "again")
    assert torch.equal(logits(again), logits(plain))


@pytest.mark.parametrize("name", ["default", "german"])
def test_named_parameters_are_enough_to_save(name, tmp_path):
    """Many scripts gather these under ZeRO-3. The anchors are buffers."""
    peft_model = trained(config=lora_ga(), name=name)
    entries = {n: p.detach().clone() for n, p in peft_model.named_parameters() if "lora_" in n}
    peft_model.save_pretrained(tmp_path, state_dict=entries)
    directory = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(pico_llama(), directory)
    assert relative_error(logits(loaded), logits(peft_model)) <= 1e-5


def test_trained_factors_without_their_anchors_are_loaded_with_a_warning():
    peft_model = trained()
    entries = {n: p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad}
    want = logits(peft_model)
    train_steps(peft_model)
    with pytest.warns(UserWarning, match=r"without their anchors.*only if both"):
        peft_model.load_state_dict(entries, strict=False)
    assert torch.equal(logits(peft_model), want)


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"bias": "lora_only"}], ids=str)
def test_trained_biases_start_at_the_base_and_reload(options, tmp_path):
    config = lora_ga(target_modules=["c_attn", "c_fc"], **options)
    peft_model = adapted(pico_gpt2(), config)
    assert relative_error(logits(peft_model), logits(pico_gpt2())) <= 1e-5
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pico_gpt2(), tmp_path)
    assert relative_error(logits(loaded), logits(peft_model)) <= 1e-5
    assert torch.equal(logits(load_for_training(pico_gpt2(), tmp_path)), logits(peft_model))


FRESH_PROCESS = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base, adapter, ids, out = sys.argv[1:]
ids = torch.load(ids)
with torch.no_grad():
    via_peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)(ids).logits
    model = LlamaForCausalLM.from_pretrained(base)
    model.load_adapter(adapter)
    via_transformers = model(ids).logits
assert "peft_gradinit" not in sys.modules
torch.save([via_peft, via_transformers], out)
"""


@pytest.mark.filterwarnings("ignore:LoRA-GA needs")
def test_saved_adapter_loads_in_a_process_without_the_plugin(tmp_path):
    model = pico_llama()
    model.save_pretrained(tmp_path / "base")
    peft_model = trained(model, lora_ga(use_rslora=True, **PATTERNS))
    peft_model.save_pretrained(tmp_path / "adapter")
    ids = token_batches(4, 4)[0]["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "ids.pt", "out.pt")]
    subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *paths], check=True, capture_output=True, cwd=tmp_path
    )
    for output in torch.load(tmp_path / "out.pt"):
        assert relative_error(output, logits(peft_model)) <= 1e-5


def test_pickled_weights_load_like_safetensors(tmp_path):
    peft_model = trained()
    peft_model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path)
    assert relative_error(logits(loaded), logits(peft_model)) <= 1e-5
    assert torch.equal(logits(load_for_training(pico_llama(), tmp_path)), logits(peft_model))


def test_saved_config_copies_every_field_of_lora_config():
    config = lora_ga(lora_dropout=0.1, bias="all", exclude_modules=["k_proj"])
    saved = config.saved_config()
    changed = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type"}
    for field in dataclasses.fields(LoraConfig):
        if field.name not in changed:
            assert getattr(saved, field.name) == getattr(config, field.name), field.name
