"""`load_for_training` continues the same function on the same base, or says why not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_gradinit import load_for_training
from peft_gradinit.errors import DataError, FingerprintError, ShapeError
from tests.helpers import (
    adapted,
    logits,
    lora_ga,
    pico_llama,
    token_batches,
    train_steps,
)


def trained(model=None, config=None, name="default"):
    peft_model = adapted(model or pico_llama(), config, name)
    train_steps(peft_model)
    return peft_model


def test_training_continues_after_load_for_training_as_if_never_interrupted(tmp_path):
    def optimizer_of(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def steps(model, optimizer, n):
        losses = []
        for batch in (token_batches() * n)[:n]:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    uninterrupted = adapted(pico_llama())
    optimizer = optimizer_of(uninterrupted)
    steps(uninterrupted, optimizer, 3)
    uninterrupted.save_pretrained(tmp_path)
    state = optimizer.state_dict()
    resumed = load_for_training(pico_llama(), tmp_path)
    other = optimizer_of(resumed)
    other.load_state_dict(torch.load(_written(state, tmp_path / "optimizer.pt")))
    # The order of arithmetic is the same, so the curves are, bit for bit.
    assert steps(resumed, other, 4) == steps(uninterrupted, optimizer, 4)


def _written(state, path):
    torch.save(state, path)
    return path


def test_report_and_fingerprint_survive_saving_and_loading(tmp_path):
    peft_model = trained()
    peft_model.save_pretrained(tmp_path)
    live = load_for_training(pico_llama(), tmp_path, "again")
    assert live.base_model.init_report["again"] == peft_model.base_model.init_report["default"]
    live.save_pretrained(tmp_path / "second")
    one, two = (
        (d / "gradinit.json").read_text() for d in (tmp_path, tmp_path / "second" / "again")
    )
    assert one == two


def test_load_for_training_adds_to_a_peft_model_and_activates(tmp_path):
    peft_model = trained()
    peft_model.save_pretrained(tmp_path)
    other = adapted(pico_llama(), lora_ga(r=2))
    live = load_for_training(other, tmp_path, "loaded")
    assert live is other
    assert torch.equal(logits(live), logits(peft_model))
    names = {n for n, p in live.named_parameters() if p.requires_grad}
    assert names
    assert all(".loaded." in n for n in names)


def test_wrong_base_is_refused_by_the_name_of_the_tensor(tmp_path):
    trained().save_pretrained(tmp_path)
    base = pico_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(FingerprintError, match=r"layers\.1\.mlp\.down_proj\.weight has hash"):
        load_for_training(base, tmp_path)
    assert not hasattr(base, "peft_config")
    load_for_training(base, tmp_path, allow_mismatch=True)


def test_adapter_made_in_float32_is_accepted_on_the_bfloat16_copy_of_its_base(tmp_path):
    trained().save_pretrained(tmp_path)
    load_for_training(pico_llama().to(torch.bfloat16), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no gradinit\.json"),
        ("{", r"cannot read .*gradinit\.json"),
        ("[]", "has format 'list'"),
        ('{"format": "other/9"}', "has format 'other/9', expected 'peft_gradinit.adapter/1'"),
        ('{"format": "peft_gradinit.adapter/1"}', r"cannot be restored: KeyError\('config'\)"),
        (
            '{"format": "peft_gradinit.adapter/1", "config": {"peft_type": "LORA_GA", "new": 1}}',
            r"^the gradinit.json of .* has options .*\['new'\]; they were written by .* \?: update",
        ),
        (
            '{"format": "peft_gradinit.adapter/1", "config": {"peft_type": "NEW"}}',
            "cannot be restored: ValueError.*'NEW'",
        ),
    ],
    ids=["missing", "cut", "list", "format", "no-config", "unknown-field", "unknown-type"],
)
def test_damaged_gradinit_json_is_refused(content, message, tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / "gradinit.json").unlink()
    if content is not None:
        (tmp_path / "gradinit.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_for_training(pico_llama(), tmp_path)


def test_plain_lora_of_another_rank_does_not_load_into_the_live_adapter(tmp_path):
    plain = get_peft_model(
        pico_llama(), LoraConfig(r=6, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    plain.save_pretrained(tmp_path)
    peft_model = trained()
    before = logits(peft_model)
    with pytest.raises(
        ShapeError, match=r"has rank 6, but the live adapter has r=4 and loads files"
    ):
        peft_model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(peft_model), before)


def test_checkpoint_loads_into_a_deferred_adapter_which_then_trains(tmp_path):
    peft_model = trained()
    peft_model.save_pretrained(tmp_path)
    fresh = adapted(pico_llama(), lora_ga(calibration="deferred"))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(fresh), logits(peft_model))
    assert train_steps(fresh) == train_steps(peft_model)


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    kept = {key: change(key, value) for key, value in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in kept.items() if v is not None}, file)


def without_a_layer(key, value):
    return None if "layers.1.self_attn" in key else value


def narrowed(key, value):
    return value[:, :-1] if "lora_A" in key else value


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_a_layer, DataError, r"lack 4 layers .*layers\.1\.self_attn\.q_proj, …\); restore"),
        (narrowed, RuntimeError, "size mismatch"),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_as_it_was(change, error, message, tmp_path):
    trained().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    live = trained(config=lora_ga(r=2))
    before, output = {n: p.requires_grad for n, p in live.named_parameters()}, logits(live)
    with pytest.raises(error, match=message):
        load_for_training(live, tmp_path, "loaded")
    assert list(live.peft_config) == live.active_adapters == ["default"]
    assert {n: p.requires_grad for n, p in live.named_parameters()} == before
    assert torch.equal(logits(live), output)
    bare = pico_llama()
    with pytest.raises(error, match=message):
        load_for_training(bare, tmp_path)
    assert not any("lora" in name for name, _ in bare.named_modules())


def test_file_lacking_a_layer_leaves_that_layer_waiting(tmp_path):
    trained().save_pretrained(tmp_path)
    rewrite(tmp_path, without_a_layer)
    fresh = adapted(pico_llama(), lora_ga(calibration="deferred"))
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(RuntimeError, match="has no start yet"):
        train_steps(fresh)
