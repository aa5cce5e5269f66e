"""`load_for_training` continues the same function on the same base, or says why not."""

import json
import math
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from peft_gradinit import (
    EvaConfig,
    LoraOneConfig,
    SVFitConfig,
    calibrate,
    init_report,
    load_for_training,
    pairs,
)
from peft_gradinit.errors import AdapterError, ConfigError, DataError, FingerprintError, ShapeError
from peft_gradinit.records import read_adapter
from tests.helpers import (
    adapted,
    logits,
    lora_ga,
    pico_llama,
    quiet,
    relative_error,
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


def test_a_model_that_takes_no_such_adapter_is_named_not_the_file(tmp_path):
    peft_model = trained()
    peft_model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has an adapter 'default' already; pass another"):
        load_for_training(peft_model, tmp_path)
    plain = get_peft_model(pico_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="takes no LoRA-GA adapter beside them"):
        load_for_training(plain, tmp_path, "second")
    assert list(plain.peft_config) == ["default"]


def test_a_float16_copy_is_another_base_and_the_error_says_so(tmp_path):
    trained().save_pretrained(tmp_path / "adapter")
    with pytest.raises(FingerprintError, match="A float16 copy of a base counts as another one"):
        load_for_training(pico_llama().to(torch.float16), tmp_path / "adapter")
    calibrate(pico_llama(), lora_ga(), quiet(token_batches())).save(tmp_path / "calibration")
    with pytest.raises(FingerprintError, match="A float16 copy of a base counts as another one"):
        adapted(pico_llama().to(torch.float16), lora_ga(calibration=tmp_path / "calibration"))


@pytest.mark.parametrize("autocast", [True, False])
def test_the_dtype_of_an_adapter_on_a_bfloat16_base_is_as_in_get_peft_model(autocast, tmp_path):
    def base():
        return pico_llama().to(torch.bfloat16)

    live = get_peft_model(base(), lora_ga(), autocast_adapter_dtype=autocast)
    train_steps(live)
    live.save_pretrained(tmp_path)
    options = {} if autocast else {"autocast_adapter_dtype": False}
    first = load_for_training(base(), tmp_path, **options)
    second = load_for_training(adapted(base()), tmp_path, "second", **options)
    for model, name in ((first, "default"), (second, "second")):
        dtypes = {f.dtype for pair in pairs(model, name) for f in (pair.A, pair.B)}
        assert dtypes == {torch.float32 if autocast else torch.bfloat16}
        assert torch.equal(logits(model), logits(live))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no gradinit\.json"),
        ("{", r"cannot read .*gradinit\.json"),
        ("[]", "holds a list where a dict is expected"),
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


def forget_digests(folder):
    """Make a `gradinit.json` as earlier versions wrote it."""
    content = json.loads((folder / "gradinit.json").read_text())
    del content["files"], content["sha256"]
    (folder / "gradinit.json").write_text(json.dumps(content))


def rewrite(folder, change):
    forget_digests(folder)
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
        (
            without_a_layer,
            DataError,
            r"lack 8 entries .*layers\.1\.self_attn\.k_proj\.lora_A, …\); restore",
        ),
        (narrowed, DataError, r"have other shapes than .* size mismatch for .*q_proj"),
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


# Damage ---------------------------------------------------------------------------------------------

KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


def weights_with(change):
    def damage(folder):
        file = folder / "adapter_model.safetensors"
        entries = {key: value.clone() for key, value in load_file(file).items()}
        change(entries)
        save_file(entries, file, metadata={"format": "pt"})

    return damage


def json_with(name, **changes):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return damage


DAMAGE = {
    "one factor lacking": (
        weights_with(lambda t: t.pop(KEY)),
        r"lack 1 entries .*down_proj\.lora_B",
    ),
    "unknown key": (
        weights_with(lambda t: t.update({KEY.replace("_B", "_C"): t[KEY].clone()})),
        r"have 1 entries that are unknown .*down_proj\.lora_C",
    ),
    "NaN": (weights_with(lambda t: t[KEY][0].fill_(torch.nan)), "down_proj.* not finite"),
    "infinity": (weights_with(lambda t: t[KEY][0].fill_(torch.inf)), "down_proj.* not finite"),
    "shape": (weights_with(lambda t: t.update({KEY: t[KEY][:-1].clone()})), "size mismatch"),
    "other rank": (json_with("adapter_config.json", r=9), r"has r=9, but .* needs"),
    "other alpha": (json_with("adapter_config.json", lora_alpha=9), "has lora_alpha=9, but"),
    "other pattern": (
        json_with("adapter_config.json", alpha_pattern={"q_proj": 3}),
        r"has alpha_pattern=\{'q_proj': 3\}, but",
    ),
    "other scaling": (
        json_with("adapter_config.json", use_rslora=True),
        "has use_rslora=True, but",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("method", ["lora_ga", "eva"])
def test_damage_is_refused_with_digests_and_without(name, method, tmp_path):
    damage, message = DAMAGE[name]
    config = lora_ga() if method == "lora_ga" else eva()
    trained(config=config).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=r"is damaged or of another save than .* its SHA-256"):
        load_for_training(pico_llama(), tmp_path)
    with pytest.raises(AdapterError, match=r"is damaged or of another save than"):
        read_adapter(tmp_path)
    forget_digests(tmp_path)
    base = pico_llama()
    with pytest.raises(DataError, match=message):
        load_for_training(base, tmp_path)
    assert not any("lora" in key for key in base.state_dict())


def eva():
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return EvaConfig(**options, calibration=lora_ga().calibration)


@pytest.mark.parametrize(
    "file", ["gradinit.json", "adapter_config.json", "adapter_model.safetensors"]
)
def test_files_of_two_saves_are_refused(file, tmp_path):
    trained().save_pretrained(tmp_path / "one")
    trained(config=lora_ga(lora_alpha=3)).save_pretrained(tmp_path / "two")
    shutil.copy(tmp_path / "one" / file, tmp_path / "two" / file)
    with pytest.raises(DataError, match=r"of another save than the gradinit\.json"):
        load_for_training(pico_llama(), tmp_path / "two")
    with pytest.raises(AdapterError, match=r"of another save than the gradinit\.json"):
        read_adapter(tmp_path / "two")


def test_a_plain_adapter_over_one_of_ours_is_told(tmp_path):
    trained().save_pretrained(tmp_path)
    plain = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(pico_llama(), plain).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"saves over one of this package.* remove the gradinit"):
        read_adapter(tmp_path)
    (tmp_path / "gradinit.json").unlink()
    assert read_adapter(tmp_path).layers


def test_changed_gradinit_json_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    json_with("gradinit.json", fingerprint=None)(tmp_path)
    with pytest.raises(DataError, match=r"gradinit\.json' is damaged or was changed"):
        load_for_training(pico_llama(), tmp_path)


@pytest.mark.parametrize("method", ["lora_ga", "eva", "svfit", "compact"])
def test_every_kind_has_digests_and_loads(method, tmp_path):
    svfit = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    config = {
        "lora_ga": lora_ga,
        "eva": eva,
        "svfit": lambda: SVFitConfig(**svfit),
        "compact": lambda: SVFitConfig(**svfit, save_format="compact"),
    }[method]()
    peft_model = trained(config=config)
    peft_model.save_pretrained(tmp_path)
    files = json.loads((tmp_path / "gradinit.json").read_text())["files"]
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    live = load_for_training(pico_llama(), tmp_path)
    assert torch.allclose(logits(live), logits(peft_model), atol=1e-5)


def test_weights_written_after_the_config_have_no_digest_and_load(tmp_path):
    older, peft_model = trained(), trained(config=lora_ga(lora_alpha=3))
    older.save_pretrained(tmp_path)  # an earlier save lies there
    entries = get_peft_model_state_dict(peft_model)
    peft_model.peft_config["default"].save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous() for k, v in entries.items()}, tmp_path / "adapter_model.safetensors"
    )
    assert json.loads((tmp_path / "gradinit.json").read_text())["files"] == {}
    assert torch.equal(logits(load_for_training(pico_llama(), tmp_path)), logits(peft_model))


def test_pickled_weights_load(tmp_path):
    peft_model = trained()
    peft_model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(load_for_training(pico_llama(), tmp_path)), logits(peft_model))
    (tmp_path / "adapter_model.bin").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"adapter_model\.bin' cannot be read"):
        load_for_training(pico_llama(), tmp_path)


@pytest.mark.parametrize(
    "file", ["gradinit.json", "adapter_config.json", "adapter_model.safetensors"]
)
def test_a_fifo_in_place_of_a_file_is_refused(file, tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(DataError, match="is a FIFO"):
        load_for_training(pico_llama(), tmp_path)
    with pytest.raises(AdapterError, match="is a FIFO"):
        read_adapter(tmp_path)


def test_weights_are_read_once(tmp_path, monkeypatch):
    peft_model = trained()
    peft_model.save_pretrained(tmp_path)
    monkeypatch.setattr("peft.peft_model.load_peft_weights", None)
    assert torch.equal(logits(load_for_training(pico_llama(), tmp_path)), logits(peft_model))


def test_options_without_a_meaning_may_change(tmp_path):
    peft_model = trained()
    peft_model.save_pretrained(tmp_path)
    changes = {"base_model_name_or_path": "new/name", "inference_mode": False, "lora_dropout": 0.5}
    json_with("adapter_config.json", **changes)(tmp_path)
    load_for_training(pico_llama(), tmp_path)
    read_adapter(tmp_path)
    PeftModel.from_pretrained(pico_llama(), tmp_path)


def with_new_tokens(seed):
    model = pico_llama(tie_word_embeddings=True)
    torch.manual_seed(seed)  # new rows are drawn at random
    model.resize_token_embeddings(model.config.vocab_size + 8)
    return model


@pytest.mark.parametrize(
    ("trained_tokens", "embeddings"), [(True, False), (True, True), (False, True)]
)
def test_weights_that_the_file_brings_along_may_differ_in_the_base(
    trained_tokens, embeddings, tmp_path
):
    base = with_new_tokens(1)
    new = list(range(base.config.vocab_size - 8, base.config.vocab_size))
    config = lora_ga(target_modules=["q_proj"])
    config.trainable_token_indices = new if trained_tokens else None
    peft_model = trained(base, config)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    live = load_for_training(with_new_tokens(2), tmp_path)
    assert torch.equal(logits(live), logits(peft_model))
    other = with_new_tokens(2)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(FingerprintError, match=r"down_proj\.weight has hash"):
        load_for_training(other, tmp_path)


@pytest.mark.parametrize("config_cls", [LoraOneConfig, EvaConfig])
def test_a_layer_of_zeros_can_be_saved_and_loaded(config_cls, tmp_path):
    """Its start is infinitely long next to it, which JSON cannot say."""

    def base():
        model = pico_llama()
        nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
        return model

    config = config_cls(
        r=4, target_modules=["down_proj"], task_type="CAUSAL_LM", calibration=quiet(token_batches())
    )
    model = get_peft_model(base(), config)
    lines = {line.name: line.start_norm for line in init_report(model).modules}
    length = lines["model.layers.1.mlp.down_proj"]
    assert length == (math.inf if config_cls is LoraOneConfig else 0)
    model.save_pretrained(tmp_path)
    live = load_for_training(base(), tmp_path)
    assert relative_error(logits(live), logits(model)) < 1e-6
    assert {line.name: line.start_norm for line in init_report(live).modules} == lines
    assert str(init_report(live)) == str(init_report(model))
    assert (tmp_path / "README.md").exists()
