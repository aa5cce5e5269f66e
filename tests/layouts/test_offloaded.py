"""Bases whose weights wait on the CPU or on disk: the results are those of the plain base.

Without an accelerator the device on which offloaded layers run is the CPU as well; what is tested is
that values come from Accelerate's maps, never from the meta tensors, and that nothing is written.
"""

import hashlib
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_gradinit import calibrate, initialize, load_for_training
from peft_gradinit.errors import CalibrationError, DataError, TargetError
from peft_gradinit.layouts import execution_device, has_offloaded, model_fingerprint
from peft_gradinit.starts.weights import linear_weight
from tests.calibration.passes import FLOAT32, gradients, linears, worst_error
from tests.helpers import (
    autograd_gradients,
    logits,
    pico_gpt2,
    pico_llama,
    quiet,
    relative_error,
    token_batches,
    train_steps,
)
from tests.methods.rows import config_of, every_method, started, with_data

CPU = torch.device("cpu")
MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1.self_attn": "cpu",
    "model.layers.1.mlp": "disk",
    "model.layers.1.input_layernorm": "disk",
    "model.layers.1.post_attention_layernorm": "cpu",
    "model.norm": "disk",
    "lm_head": "disk",
}


def offloaded_to_cpu(model, folder):
    return cpu_offload(model, CPU)


def offloaded_to_disk(model, folder):
    return disk_offload(model, folder / "weights", CPU)


def mixed(model, folder):
    """To both places: for Accelerate, `torch.device("cpu")` is not the `"cpu"` of a map."""
    return dispatch_model(model, MAP, CPU, offload_dir=folder / "weights", force_hooks=True)


def automatic(model, folder):
    model.save_pretrained(folder / "checkpoint")
    sizes = {"cpu": 2 * sum(p.nbytes for p in model.model.layers[0].parameters())}
    options = {"device_map": "auto", "max_memory": sizes, "offload_folder": folder / "weights"}
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoint", **options).eval()


def in_blocks(model, folder):
    return cpu_offload(model, CPU, preload_module_classes=["LlamaMLP"])


LAYOUTS = {
    "cpu": offloaded_to_cpu,
    "disk": offloaded_to_disk,
    "mixed": mixed,
    "auto": automatic,
    "preloaded": in_blocks,
}
every_layout = pytest.mark.parametrize("layout", [k for k in LAYOUTS if k != "preloaded"])
fully_offloaded = pytest.mark.parametrize("layout", ["cpu", "disk"])


def offloaded(layout, folder, model=None):
    folder.mkdir(exist_ok=True)
    model = LAYOUTS[layout](model or pico_llama(), folder)
    assert any(p.is_meta for p in model.parameters())
    return model


def waiting(model):
    """Map and value of every offloaded weight, by name: what must stay as it is."""
    held = {}
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.offload:
            plain = path.replace("base_model.model.", "").replace(".base_layer", "")
            for name in module._parameters:
                value = (
                    hook.weights_map[name].clone() if module._parameters[name] is not None else 0
                )
                held[f"{plain}.{name}"] = (id(hook.weights_map), value)
    return held


def assert_same(before, after):
    assert before
    assert before.keys() == after.keys()
    for name, (map_, value) in before.items():
        assert map_ == after[name][0], name
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name][1])), name


def files_in(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The pass ----------------------------------------------------------------------------------------


@every_layout
def test_captured_gradients_are_those_of_autograd(layout, tmp_path):
    names = [n for n in linears(pico_llama()) if n != "lm_head"]
    want = autograd_gradients(pico_llama(), token_batches(), names)
    model = offloaded(layout, tmp_path)
    modules = {n: m for n, m in linears(model).items() if n in names}
    assert worst_error(gradients(model, token_batches(), modules), want) < FLOAT32


def test_gradients_are_exact_under_checkpointing(tmp_path):
    model = offloaded("disk", tmp_path)
    model.gradient_checkpointing_enable()
    want = gradients(pico_llama(), token_batches())
    assert worst_error(gradients(model, token_batches()), want) < FLOAT32


@every_layout
def test_fingerprints_and_weights_are_those_of_the_plain_model(layout, tmp_path):
    model, plain = offloaded(layout, tmp_path), pico_llama()
    for _ in range(2):  # before and after a forward, which makes new meta tensors
        assert model_fingerprint(model, ()) == model_fingerprint(plain, ())
        for name, module in linears(model).items():
            assert torch.equal(linear_weight(module), linears(plain)[name].weight)
        logits(model)


def test_tied_weights_have_the_same_fingerprint_although_offloading_unties_them(tmp_path):
    model = offloaded("cpu", tmp_path, pico_gpt2())
    logits(model)
    assert model_fingerprint(model, ()) == model_fingerprint(pico_gpt2(), ())


def test_the_device_is_that_on_which_the_first_layer_runs(tmp_path):
    model = offloaded("disk", tmp_path)
    assert next(model.parameters()).device.type == "meta"
    assert execution_device(model) == CPU
    assert has_offloaded(model)
    assert not has_offloaded(pico_llama())


# The start ---------------------------------------------------------------------------------------


@every_layout
@every_method
def test_every_method_starts_as_on_the_plain_base(method, layout, tmp_path):
    """Then trains, is saved, and comes back on a plain base; nothing is written."""
    model = offloaded(layout, tmp_path / "base")
    before, files = waiting(model), files_in(tmp_path / "base")
    want = started(method)
    got = started(method, model)
    adapter = [p for p in got.parameters() if p.requires_grad]
    assert {p.device for p in adapter} == {CPU}
    assert relative_error(logits(got), logits(want)) < FLOAT32
    assert train_steps(got) == pytest.approx(train_steps(want), rel=FLOAT32)
    got.save_pretrained(tmp_path / "saved")
    for fresh in (PeftModel.from_pretrained, load_for_training):
        again = fresh(pico_llama(), tmp_path / "saved")
        assert relative_error(logits(again), logits(got)) < FLOAT32
    with got.disable_adapter():
        assert torch.equal(logits(got), logits(pico_llama()))
    assert_same(before, waiting(got))
    assert files_in(tmp_path / "base") == files


@with_data
def test_the_report_is_that_of_the_plain_base(method, tmp_path):
    plain = started(method).base_model.init_report["default"]
    report = started(method, offloaded("disk", tmp_path)).base_model.init_report["default"]
    for line, want in zip(report.modules, plain.modules, strict=True):
        assert (line.name, line.r, line.method) == (want.name, want.r, want.method)
        assert line.start_norm == pytest.approx(want.start_norm, rel=FLOAT32)
        assert (line.captured_energy is None) == (method == "corda")
        if want.captured_energy is not None:
            assert line.captured_energy == pytest.approx(want.captured_energy, rel=FLOAT32)


@every_method
def test_with_another_name_rslora_and_bfloat16(method, tmp_path):
    options = {} if method == "svfit" else {"use_rslora": True}
    model = offloaded("mixed", tmp_path / "base", pico_llama().to(torch.bfloat16))
    got = started(method, model, "other", **options)
    want = started(method, pico_llama().to(torch.bfloat16), "other", **options)
    assert torch.equal(logits(got), logits(want))
    got.save_pretrained(tmp_path / "saved")
    again = load_for_training(pico_llama().to(torch.bfloat16), tmp_path / "saved" / "other")
    assert torch.equal(logits(again), logits(got))


@with_data
def test_dora_is_refused_where_its_weights_are_offloaded(method, tmp_path):
    # With "cpu" as the device, what MAP leaves there is not offloaded.
    model = dispatch_model(pico_llama(), MAP, "cpu", offload_dir=tmp_path)
    with pytest.raises(
        TargetError, match=r"use_dora=True reads the base weight.*targets \(model\.layers\.0"
    ):
        started(method, model, use_dora=True, target_modules=r".*layers\.0.*_proj")
    assert not any("lora" in n for n, _ in model.named_modules())
    on_the_device = r".*layers\.1\.self_attn.*_proj"
    peft_model = started(method, model, use_dora=True, target_modules=on_the_device)
    want = started(method, use_dora=True, target_modules=on_the_device)
    assert relative_error(logits(peft_model), logits(want)) < FLOAT32


@with_data
def test_a_calibration_serves_plain_and_offloaded_bases(method, tmp_path):
    model = offloaded("mixed", tmp_path / "base")
    path = calibrate(model, config_of(method), quiet(token_batches())).save(tmp_path / "saved")
    plain = started(method, calibration=str(path))
    again = started(method, offloaded("disk", tmp_path / "other"), calibration=str(path))
    assert relative_error(logits(again), logits(plain)) < FLOAT32


def test_a_deferred_adapter_is_initialised(tmp_path):
    peft_model = started("lora_ga", offloaded("mixed", tmp_path), calibration="deferred")
    initialize(peft_model, quiet(token_batches()))
    want, got = train_steps(started("lora_ga")), train_steps(peft_model)
    assert got == pytest.approx(want, rel=FLOAT32)


@fully_offloaded
@every_method
def test_training_continues_on_an_offloaded_base(method, layout, tmp_path):
    first = started(method)
    train_steps(first)
    first.save_pretrained(tmp_path / "saved")
    model = load_for_training(offloaded(layout, tmp_path / "base"), tmp_path / "saved")
    assert relative_error(logits(model), logits(first)) < FLOAT32
    losses = train_steps(model, n=7)
    assert losses[-1] < losses[0]  # three batches: the last is the first


def test_a_compact_svfit_adapter_comes_back_on_a_plain_base(tmp_path):
    peft_model = started("svfit", offloaded("disk", tmp_path / "base"), save_format="compact")
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path / "saved")
    again = load_for_training(pico_llama(), tmp_path / "saved")
    assert relative_error(logits(again), logits(peft_model)) < FLOAT32


@every_layout
@every_method
def test_merging_keeps_the_function_and_the_files(method, layout, tmp_path):
    peft_model = started(method, offloaded(layout, tmp_path))
    train_steps(peft_model)
    before, files = logits(peft_model), files_in(tmp_path)
    peft_model.merge_adapter()
    assert relative_error(logits(peft_model), before) < FLOAT32
    peft_model.unmerge_adapter()
    assert relative_error(logits(peft_model), before) < FLOAT32
    assert files_in(tmp_path) == files


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("tied", [True, False])
@fully_offloaded
@every_method
def test_a_targeted_head_is_saved_with_its_weight(method, layout, tied, tmp_path):
    """As PEFT does for embeddings; the entries are on the meta device."""

    def make():
        return pico_llama(tie_word_embeddings=tied)

    targets = {"target_modules": ["q_proj", "lm_head"]}
    peft_model = started(method, offloaded(layout, tmp_path / "base", make()), **targets)
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path / "saved")
    plain = started(method, make(), **targets)
    plain.save_pretrained(tmp_path / "plain")
    got, want = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("saved", "plain"))
    assert got.keys() == want.keys()
    weight = "base_model.model.lm_head.base_layer.weight"
    assert torch.equal(got[weight], want[weight])
    for load in (PeftModel.from_pretrained, load_for_training):
        again = load(make(), tmp_path / "saved")
        assert relative_error(logits(again), logits(peft_model)) < FLOAT32


# Failures ----------------------------------------------------------------------------------------


@fully_offloaded
@every_method
def test_unloading_gives_the_offloaded_base_back(method, layout, tmp_path):
    model = offloaded(layout, tmp_path / "base")
    before, files = waiting(model), files_in(tmp_path / "base")
    base = started(method, model).unload()
    assert base is model
    assert not any("lora" in n or "svfit" in n for n, _ in base.named_modules())
    assert torch.equal(logits(base), logits(pico_llama()))
    assert_same(before, waiting(base))
    assert files_in(tmp_path / "base") == files


@fully_offloaded
@every_method
def test_a_failed_start_leaves_the_offloaded_base_as_it_was(method, layout, tmp_path, monkeypatch):
    model = offloaded(layout, tmp_path)
    before, trainable = waiting(model), [p.requires_grad for p in model.parameters()]
    config = config_of(method)

    def fail(*args, **kwargs):
        raise DataError("late")

    late = "basis" if method == "svfit" else "saved_config"
    monkeypatch.setattr(type(config), late, fail)
    if method != "svfit":
        monkeypatch.setattr("peft_gradinit.tuners.lora.model.GradInitModel.fill", fail)
    with pytest.raises(DataError, match="late"):
        started(method, model)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any("lora" in n or "svfit" in n for n, _ in model.named_modules())
    assert_same(before, waiting(model))
    monkeypatch.undo()
    assert torch.equal(logits(model), logits(pico_llama()))


@every_method
def test_weights_that_are_really_missing_are_refused(method, tmp_path):
    model = offloaded("cpu", tmp_path)
    hook = model.model.layers[1].mlp.up_proj._hf_hook
    hook.weights_map = {}
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.up_proj.* the weights first"):
        started(method, model)


@every_method
def test_a_lost_offload_folder_is_named(method, tmp_path):
    model = offloaded("disk", tmp_path)
    for file in (tmp_path / "weights").glob("*up_proj*"):
        file.unlink()
    with pytest.raises(CalibrationError, match=r"weight of a Linear is offloaded.*offload folder"):
        started(method, model)


@every_method
def test_blocks_offloaded_as_one_piece_are_refused(method, tmp_path):
    model = offloaded("preloaded", tmp_path)
    message = r"layers\.0\.mlp is offloaded with all.*without preload_module_classes"
    with pytest.raises(CalibrationError, match=message):
        started(method, model)


@every_method
def test_a_copy_of_an_offloaded_module_is_not_trained(method, tmp_path):
    model = offloaded("cpu", tmp_path)
    for end in ("lm_head", "head"):
        with pytest.raises(TargetError, match=r"modules_to_save has lm_head, which is offloaded"):
            started(method, model, modules_to_save=[end])
    assert torch.equal(logits(model), logits(pico_llama()))
