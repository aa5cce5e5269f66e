"""An SVFit adapter on disk: plain LoRA or compact, loaded elsewhere, and trained on."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_gradinit import SVFitConfig, load_for_training
from peft_gradinit.errors import DataError, FingerprintError, ShapeError, TargetError
from tests.helpers import (
    logits,
    pico_gpt2,
    pico_llama,
    relative_error,
    rows_of,
    token_batches,
    train_steps,
)
from tests.tuners.svfits import EXPORT, layers_of, svfit, svfitted

COMPACT = {"save_format": "compact"}


def trained(model, name="default", **options):
    peft_model = svfitted(model, name, **options)
    train_steps(peft_model, lr=0.1)
    return peft_model


def delta_of(peft_model, name="default"):
    return {n: layer.svfit_delta[name].detach() for n, layer in layers_of(peft_model).items()}


def same_adapters(one, other):
    """Whether all numbers of both adapters, bases included, agree bit for bit."""
    ours, theirs = (
        {n: p for n, p in model.named_parameters() if ".svfit_" in n} for model in (one, other)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# Plain LoRA -----------------------------------------------------------------------------------

WITHOUT_PLUGIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    base = AutoModelForCausalLM.from_pretrained(folder + "/base")
    model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, folder + "/logits")
assert not any(name.startswith("peft_gradinit") for name in sys.modules)
"""


@pytest.mark.slow
def test_saved_adapter_is_plain_lora_where_the_package_is_not(tmp_path):
    made = {"full": trained(pico_llama(), r="full"), "conv1d": trained(pico_gpt2(), r=5)}
    for name, peft_model in made.items():
        peft_model.save_pretrained(tmp_path / name / "adapter")
        base = {"full": pico_llama, "conv1d": pico_gpt2}[name]()
        base.save_pretrained(tmp_path / name / "base")
    torch.save(token_batches(4, 4)[0]["input_ids"], tmp_path / "ids")
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path / "ids")]
    folders = [str(tmp_path / name) for name in made]
    done = subprocess.run(command + folders, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, peft_model in made.items():
        got = torch.load(tmp_path / name / "logits")
        assert relative_error(got, logits(peft_model)) <= EXPORT


@pytest.mark.parametrize("name", ["default", "german"])
def test_file_holds_lora_only_and_both_ways_of_loading_give_the_function(name, tmp_path):
    peft_model = trained(pico_llama(), name)
    peft_model.save_pretrained(tmp_path)
    directory = tmp_path if name == "default" else tmp_path / name
    keys = load_file(directory / "adapter_model.safetensors").keys()
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    loaded = PeftModel.from_pretrained(pico_llama(), directory)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert relative_error(logits(loaded), logits(peft_model)) <= EXPORT
    live = load_for_training(pico_llama(), directory, name)
    assert same_adapters(live, peft_model)


@pytest.mark.parametrize("options", [{}, COMPACT], ids=["lora", "compact"])
def test_loading_with_low_cpu_memory_gives_the_same_float32_adapter(options, tmp_path):
    peft_model = trained(pico_llama().bfloat16(), **options)
    peft_model.save_pretrained(tmp_path)
    live = svfitted(pico_llama().bfloat16(), **options)
    live.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=True)
    assert same_adapters(live, peft_model)
    whole = PeftModel.from_pretrained(pico_llama().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    assert relative_error(logits(whole).float(), logits(peft_model).float()) < 1e-2
    assert {n for n, p in live.named_parameters() if p.requires_grad} == {
        n for n, p in peft_model.named_parameters() if p.requires_grad
    }
    assert torch.equal(logits(live), logits(peft_model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_compact_adapter_that_was_cast_loads_again(dtype, tmp_path):
    """As before an evaluation with `bf16_full_eval`; its vectors are rounded, those of the base not."""
    peft_model = trained(pico_llama(), **COMPACT)
    want = logits(peft_model)
    peft_model.to(dtype).save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, load_for_training):
        assert relative_error(logits(load(pico_llama(), tmp_path)), want) <= 1e-3


def test_fresh_adapter_is_saved_and_loaded_too(tmp_path):
    peft_model = svfitted(pico_llama())
    peft_model.save_pretrained(tmp_path)
    assert same_adapters(load_for_training(pico_llama(), tmp_path), peft_model)
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(pico_llama()))


def test_modules_to_save_are_saved_in_both_forms(tmp_path):
    for options in ({}, COMPACT):
        peft_model = trained(pico_llama(), modules_to_save=["lm_head"], **options)
        assert relative_error(logits(peft_model), logits(pico_llama())) > 1e-3
        peft_model.save_pretrained(tmp_path)
        live = load_for_training(pico_llama(), tmp_path)
        assert same_adapters(live, peft_model)
        assert torch.equal(logits(live), logits(peft_model))


def test_second_adapter_is_loaded_beside_the_first(tmp_path):
    peft_model = trained(pico_llama(), "first", target_modules=["q_proj", "v_proj"])
    want = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    other = svfitted(pico_llama())
    other = load_for_training(other, tmp_path / "first", "first")
    assert other.active_adapter == "first"
    assert torch.equal(logits(other), want)
    other.set_adapter("default")
    assert torch.equal(logits(other), logits(pico_llama()))


# Training on ----------------------------------------------------------------------------------


def curve(peft_model, optimizer, steps):
    losses = []
    for step in steps:
        loss = peft_model(**token_batches()[step % 3]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(peft_model):
    return torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.05)


def flipped(basis):
    """A basis of the same weight as another library would give it: every third pair negated."""

    def compute(self, weight, r, name):
        U, Vh = basis(self, weight, r, name)
        signs = torch.where(torch.arange(r) % 3 == 0, -1.0, 1.0)
        return U * signs, Vh * signs[:, None]

    return compute


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same-library", "other-library"])
@pytest.mark.parametrize("r", [4, "full"])
def test_resumed_training_is_the_uninterrupted_one(r, elsewhere, tmp_path, monkeypatch):
    peft_model = svfitted(pico_llama(), r=r)
    optimizer = adam(peft_model)
    curve(peft_model, optimizer, range(3))
    peft_model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    want = curve(peft_model, optimizer, range(3, 9))
    if elsewhere:
        monkeypatch.setattr(SVFitConfig, "basis", flipped(SVFitConfig.basis))
    resumed = load_for_training(pico_llama(), tmp_path)
    optimizer = adam(resumed)
    optimizer.load_state_dict(state)
    got = curve(resumed, optimizer, range(3, 9))
    assert got == (pytest.approx(want, rel=1e-5) if elsewhere else want)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("options", [{}, COMPACT], ids=["lora", "compact"])
def test_trainer_resumes_from_its_checkpoint(options, tmp_path):
    rows = [{"input_ids": row[:10], "labels": row[:10]} for row in rows_of(token_batches())]

    def trainer(folder, max_steps):
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=max_steps,
            save_steps=3,
            logging_steps=1,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(svfitted(pico_llama(), **options), arguments, train_dataset=rows)

    def losses(trainer):
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    straight = trainer("straight", 6)
    straight.train()
    trainer("resumed", 3).train()
    resumed = trainer("resumed", 6)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert same_adapters(resumed.model, straight.model)


# Compact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2"])
def test_compact_file_holds_r_numbers_a_layer(make, svd, tmp_path):
    peft_model = trained(make(), svd=svd, seed=5, **COMPACT)
    peft_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    deltas = {k: t for k, t in tensors.items() if k.endswith(".svfit_delta")}
    assert {len(t) for t in deltas.values()} == {4}
    assert len(deltas) == len(layers_of(peft_model))
    others = sum(t.numel() * t.element_size() for t in tensors.values()) - 16 * len(deltas)
    assert others == len(deltas) * (8 + 32)  # a hash and a probe
    assert same_adapters(load_for_training(make(), tmp_path), peft_model)
    assert same_adapters(PeftModel.from_pretrained(make(), tmp_path), peft_model)


def test_compact_file_of_another_base_is_refused_by_name(tmp_path):
    trained(pico_llama(), **COMPACT).save_pretrained(tmp_path)
    other = pico_llama()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.5
    message = r"another base model: model\.layers\.1\.mlp\.up_proj\.weight has hash \w+ there and"
    with pytest.raises(FingerprintError, match=message):
        load_for_training(other, tmp_path)
    other = other.__class__(other.config)
    with pytest.raises(FingerprintError, match="belongs to another base model"):
        PeftModel.from_pretrained(other, tmp_path)


def test_compact_file_with_another_basis_is_refused(tmp_path, monkeypatch):
    def rotated(self, weight, r, name):
        U, Vh = basis(self, weight, r, name)
        return U.flip(1), Vh.flip(0)

    trained(pico_llama(), **COMPACT).save_pretrained(tmp_path)
    basis = SVFitConfig.basis
    monkeypatch.setattr(SVFitConfig, "basis", flipped(basis))
    PeftModel.from_pretrained(pico_llama(), tmp_path)  # signs do not matter
    monkeypatch.setattr(SVFitConfig, "basis", rotated)
    with pytest.raises(FingerprintError, match=r"q_proj\.weight came out differently .*'lora'"):
        PeftModel.from_pretrained(pico_llama(), tmp_path)


# Files that do not fit ------------------------------------------------------------------------


def test_lora_file_of_another_base_is_refused_unless_allowed(tmp_path):
    peft_model = trained(pico_llama())
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(FingerprintError, match=r"embed_tokens\.weight has hash"):
        load_for_training(pico_llama(seed=3), tmp_path)
    live = load_for_training(pico_llama(seed=3), tmp_path, allow_mismatch=True)
    plain = PeftModel.from_pretrained(pico_llama(seed=3), tmp_path)
    assert relative_error(logits(live), logits(plain)) <= EXPORT


@pytest.mark.parametrize("options", [{}, COMPACT], ids=["lora", "compact"])
def test_file_of_another_rank_or_of_other_layers_is_refused(options, tmp_path):
    trained(pico_llama(), **options).save_pretrained(tmp_path)
    with pytest.raises(ShapeError, match=r"q_proj has .* in the file, expected .* live rank"):
        svfitted(pico_llama(), r=3).load_adapter(tmp_path, "default", is_trainable=True)
    live = svfitted(pico_llama(), target_modules=["q_proj", "lm_head"])
    message = r"only the saved one has \['model.layers.0.mlp.down_proj'.*the live one \['lm_head'\]"
    with pytest.raises(TargetError, match=message):
        live.load_adapter(tmp_path, "default", is_trainable=True)


def test_plain_lora_file_is_refused(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(pico_llama(), lora).save_pretrained(tmp_path)
    live = svfitted(pico_llama())
    with pytest.raises(ShapeError, match=r"q_proj: the factors are not those of an SVFit adapter"):
        live.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(DataError, match=r"holds no gradinit\.json"):
        load_for_training(pico_llama(), tmp_path)


def test_transformers_own_integration_saves_and_loads(tmp_path):
    model = pico_llama()
    model.add_adapter(svfit(task_type=None))
    for layer in layers_of(model).values():
        layer.svfit_delta["default"].data += 0.3
    model.save_pretrained(tmp_path)
    fresh = pico_llama()
    fresh.load_adapter(str(tmp_path))
    assert relative_error(logits(fresh), logits(model)) <= EXPORT


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
@pytest.mark.parametrize("save_format", ["lora", "compact"])
def test_an_adapter_with_lora_of_transformers_around_it_saves_and_loads(save_format, tmp_path):
    model = pico_llama()
    model.add_adapter(svfit(task_type=None, save_format=save_format), "first")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "second")
    for layer in layers_of(model).values():
        layer.svfit_delta["first"].data += 0.3
    model.set_adapter("first")
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert not any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(load_for_training(pico_llama(), tmp_path)), trained)
    saved = {
        k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name="first").items()
    }
    for layer in layers_of(model).values():
        layer.svfit_delta["first"].data.zero_()
    set_peft_model_state_dict(model, saved, "first")
    assert relative_error(logits(model), trained) <= EXPORT


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_an_adapter_around_lora_of_transformers_is_refused_and_leaves_the_model_as_it_was():
    model = pico_llama()
    model.add_adapter(LoraConfig(target_modules=["v_proj"]), "first")
    kinds = {name: type(module) for name, module in model.named_modules()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(
        TargetError, match=r"v_proj, .* another kind already \(peft.*lora.*Linear\)"
    ):
        model.add_adapter(svfit(task_type=None, target_modules=["q_proj", "v_proj"]), "second")
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert list(model.peft_config) == ["first"]
    model.add_adapter(svfit(task_type=None, target_modules=["q_proj"]), "second")


@pytest.mark.parametrize("save_format", ["lora", "compact"])
def test_a_narrow_layer_whose_name_ends_anothers_keeps_its_rank(save_format, tmp_path):
    def make():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))  # "0.2" is wide
        return nn.Sequential(inner, nn.ReLU(), nn.Linear(32, 4))

    config = SVFitConfig(r=8, target_modules="all-linear", save_format=save_format)
    with pytest.warns(match=r"lower rank: 2 \(4 of 8\)"):
        model = get_peft_model(make(), config)
    model.save_pretrained(tmp_path)
    loaded = load_for_training(make(), tmp_path)
    ranks = {name: layer.r["default"] for name, layer in layers_of(loaded.get_base_model()).items()}
    assert ranks == {"0.0": 8, "0.2": 8, "2": 4}


@pytest.mark.parametrize("save_format", ["lora", "compact"])
def test_patterns_of_which_the_first_counts_are_saved_by_layer(save_format, tmp_path):
    pattern = {"q_proj": 3, "layers.0.mlp.up_proj": "full", ".*_proj": 5}
    model = trained(pico_llama(), save_format=save_format, rank_pattern=pattern)
    model.save_pretrained(tmp_path)
    ranks = {name: layer.r["default"] for name, layer in layers_of(model).items()}
    assert set(ranks.values()) == {3, 5, 48}

    for loaded in (
        load_for_training(pico_llama(), tmp_path),
        PeftModel.from_pretrained(pico_llama(), tmp_path),
    ):
        assert relative_error(logits(loaded), logits(model)) < EXPORT
    again = load_for_training(pico_llama(), tmp_path)
    assert {name: layer.r["default"] for name, layer in layers_of(again).items()} == ranks
    assert model.peft_config["default"].rank_pattern == pattern
