"""The serving form against the rules that vLLM, SGLang and TGI apply when they load an adapter."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_gradinit import export_adapter, load_for_training
from peft_gradinit.errors import DataError, ExportError
from peft_gradinit.export.serving import SERVED_RANKS
from peft_gradinit.methods import METHODS
from tests.exports import (
    EXACT,
    PATTERNS,
    RANKS_AND_SCALES,
    config,
    emptied,
    peft_lora,
    read,
    served,
    trained,
)
from tests.helpers import logits, pico_gpt2, pico_llama, relative_error

EVERY = [*(m.name for m in METHODS), "lora"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An adapter whose layers differ in everything that a layer may differ in."""
    directory = tmp_path_factory.mktemp("serving") / "adapter"
    peft_model = emptied()
    ranks = set(peft_model.base_model.init_report["default"].ranks().values())
    assert 0 in ranks
    assert len(ranks) > 2
    export_adapter(peft_model, directory, "serving")
    return (*read(directory), logits(peft_model), directory)


# Each rule as the server states it, on the config and the entries: (server and place, check).
RULES = {
    "vllm-peft-helper-required-keys": lambda c, t: {"r", "lora_alpha", "target_modules"} <= set(c),
    "vllm-peft-helper-no-modules-to-save": lambda c, t: not c.get("modules_to_save"),
    "vllm-peft-helper-no-dora": lambda c, t: not c.get("use_dora"),
    "vllm-peft-helper-bias-is-none": lambda c, t: c.get("bias", "none") == "none",
    "vllm-config-rank-is-a-max-lora-rank": lambda c, t: c["r"] in SERVED_RANKS,
    "vllm-peft-helper-one-scale-of-1": lambda c, t: (
        c["lora_alpha"] / c["r"] == 1 and type(c["lora_alpha"]) is int
    ),
    "vllm-utils-every-entry-is-a-factor": lambda c, t: all(
        re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key) for key in t
    ),
    "vllm-utils-factors-come-in-pairs": lambda c, t: all(
        key.translate(str.maketrans("AB", "BA")) in t for key in t
    ),
    "vllm-models-targets-end-in-linear-layers": lambda c, t: (
        {name.split(".")[-1] for name in c["target_modules"]}
        <= {n.split(".")[-1] for n, m in pico_llama().named_modules() if hasattr(m, "in_features")}
    ),
    "sglang-lora-utils-targets-are-a-list": lambda c, t: isinstance(c["target_modules"], list),
    "sglang-mem-pool-one-rank-for-all": lambda c, t: all(
        tensor.shape["lora_B" in key] == c["r"] for key, tensor in t.items()
    ),
    "tgi-lora-config-keys": lambda c, t: (
        {"r", "target_modules", "fan_in_fan_out", "lora_alpha", "use_rslora"} <= set(c)
    ),
    # prepare_weights returns None for a whole type of layer if one of its layers is missing.
    "tgi-prepare-weights-all-layers-of-a-type": lambda c, t: all(
        f"base_model.model.model.layers.{i}.{name}.lora_A.weight" in t
        for name in {re.search(r"layers\.\d+\.(.+)\.lora_A", k)[1] for k in t if "lora_A" in k}
        for i in range(2)
    ),
    "tgi-prepare-weights-no-patterns": lambda c, t: not c["rank_pattern"] | c["alpha_pattern"],
    "all-rslora-is-folded": lambda c, t: c["use_rslora"] is False,
    "all-factors-in-the-layout-of-linear": lambda c, t: all(
        tensor.shape["lora_A" in key]
        == getattr(
            pico_llama().get_submodule(key[len("base_model.model.") : -len(".lora_A.weight")]),
            "in_features" if "lora_A" in key else "out_features",
        )
        for key, tensor in t.items()
        if "lora_A" in key
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_rule_of_a_server_holds(rule, exported):
    content, tensors, _, _ = exported
    assert rule(content, tensors)


def test_rules_can_fail(tmp_path):
    # What save_pretrained writes of the same kind of adapter breaks those that matter.
    trained("eva", use_rslora=True, **PATTERNS).save_pretrained(tmp_path)
    content, tensors = read(tmp_path)
    broken = {name for name, rule in RULES.items() if not rule(content, tensors)}
    assert {
        "vllm-config-rank-is-a-max-lora-rank",
        "vllm-peft-helper-one-scale-of-1",
        "sglang-mem-pool-one-rank-for-all",
        "tgi-prepare-weights-no-patterns",
        "all-rslora-is-folded",
    } <= broken


def test_layers_that_lost_their_adapter_are_zero_and_the_function_stays(exported):
    content, tensors, want, directory = exported
    assert sum(not tensor.any() for tensor in tensors.values()) >= 2
    assert relative_error(logits(served(pico_llama(), directory)), want) <= EXACT
    plain = PeftModel.from_pretrained(pico_llama(), directory)
    assert relative_error(logits(plain), want) <= EXACT
    assert LoraConfig.from_pretrained(directory).r == content["r"]


@pytest.mark.parametrize("options", RANKS_AND_SCALES.values(), ids=RANKS_AND_SCALES.keys())
@pytest.mark.parametrize("method", EVERY)
def test_one_scale_gives_the_function_of_every_method(method, options, tmp_path):
    peft_model = trained(method, name="german", **options)
    want = logits(peft_model)
    report = export_adapter(peft_model, tmp_path / "out", "serving", adapter_name="german")
    assert torch.equal(logits(peft_model), want)
    assert relative_error(want, logits(pico_llama())) > 1e-3
    assert relative_error(logits(served(pico_llama(), tmp_path / "out")), want) <= EXACT
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path / "out")
    assert relative_error(logits(plain), want) <= EXACT
    assert report.rank in SERVED_RANKS
    assert report.largest_error == 0


def test_conv1d_layers(tmp_path):
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"]}
    peft_model = trained("lora_one", pico_gpt2(), use_rslora=True, **options)
    export_adapter(peft_model, tmp_path / "out", "serving")
    assert read(tmp_path / "out")[0]["fan_in_fan_out"] is True
    got = logits(served(pico_gpt2(), tmp_path / "out"))
    assert relative_error(got, logits(peft_model)) <= EXACT


def test_half_precision_factors_stay_half_precision(tmp_path):
    peft_model = get_peft_model(
        pico_llama().bfloat16(), peft_lora(use_rslora=True), autocast_adapter_dtype=False
    )
    export_adapter(peft_model, tmp_path / "out", "serving")
    _, tensors = read(tmp_path / "out")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    for name, layer in peft_model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            stem = f"base_model.model.{name}.lora_"
            got = tensors[f"{stem}B.weight"].float() @ tensors[f"{stem}A.weight"].float()
            A, B = (getattr(layer, f"lora_{side}").default.weight.float() for side in "AB")
            want = layer.scaling["default"] * B @ A  # 8 / sqrt(4): a power of two, so exact
            assert relative_error(got, want) <= 1e-6


def test_names_are_short_where_they_are_unambiguous_and_full_where_not(tmp_path):
    export_adapter(trained("eva"), tmp_path / "short", "serving")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(read(tmp_path / "short")[0]["target_modules"]) == sorted(names)
    peft_model = trained("eva", pico_gpt2(), target_modules=["attn.c_proj", "c_fc"])
    export_adapter(peft_model, tmp_path / "full", "serving")
    targets = read(tmp_path / "full")[0]["target_modules"]  # mlp.c_proj has the same last part
    assert sorted(targets) == sorted(
        f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_proj", "mlp.c_fc")
    )
    plain = PeftModel.from_pretrained(pico_gpt2(), tmp_path / "full")
    assert relative_error(logits(plain), logits(peft_model)) <= EXACT


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapted_head_is_served_without_its_base_weight(tmp_path):
    peft_model = trained("lora_one", target_modules=["q_proj", "lm_head"])
    export_adapter(peft_model, tmp_path / "out", "serving")
    assert "base_model.model.lm_head.lora_A.weight" in read(tmp_path / "out")[1]
    got = logits(served(pico_llama(), tmp_path / "out"))
    assert relative_error(got, logits(peft_model)) <= EXACT


def test_truncation_comes_before_padding(tmp_path):
    peft_model = trained("lora_ga")
    report = export_adapter(peft_model, tmp_path / "out", "serving", rank=3)
    content, tensors = read(tmp_path / "out")
    assert content["r"] == report.rank == 8
    A = next(t for key, t in tensors.items() if "lora_A" in key)
    assert not A[3:].any()
    assert A[:3].any()
    assert {(x.r, x.exported_r) for x in report.layers} == {(8, 3)}


REFUSED = {
    "dora": ({"use_dora": True}, r"use_dora=True \(servers do not know DoRA\)"),
    "modules_to_save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        r"modules_to_save=\['lm_head'\] \(servers load no whole modules\)",
    ),
    "bias": (
        {"target_modules": ["q_proj"], "bias": "all"},
        r"bias='all' \(servers load no biases\)",
    ),
    "lora_bias": ({"lora_bias": True}, r"lora_bias=True"),
    "tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
        r"trainable_token_indices=\[3\] \(servers load no changed tokens\)",
    ),
    "embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        r"the entries model\.embed_tokens\..*lora_embedding_A, .* \(servers load factors of linear",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:`lora_bias=True`",
    "ignore:.* LoRA tensor.s. have invalid shape",  # PEFT takes biases for broken factors
)
def test_what_servers_cannot_hold_is_refused(options, message, tmp_path):
    peft_model = get_peft_model(pico_llama(), peft_lora(**options))
    with pytest.raises(
        ExportError, match=f"target='serving' cannot hold this adapter: .*{message}"
    ):
        export_adapter(peft_model, tmp_path / "out", "serving")
    assert list(tmp_path.iterdir()) == []


def test_all_reasons_are_given_at_once(tmp_path):
    peft_model = trained("lora_ga", use_dora=True, modules_to_save=["embed_tokens"])
    with pytest.raises(
        ExportError, match=r"modules_to_save=.*; use_dora=True.* Use target='merged'"
    ):
        export_adapter(peft_model, tmp_path / "out", "serving")


def test_adapter_that_changed_the_base_is_refused(tmp_path):
    peft_model = get_peft_model(pico_llama(), config("lora", init_lora_weights="pissa"))
    with pytest.raises(
        ExportError, match=r"init_lora_weights='pissa' has changed the base weights"
    ):
        export_adapter(peft_model, tmp_path / "out", "serving")


def test_ranks_above_all_limits_are_refused(tmp_path, monkeypatch):
    peft_model = get_peft_model(pico_llama(), peft_lora(r=600, target_modules=["q_proj"]))
    message = r"q_proj has rank 600, and servers take at most 512; pass rank=512 or less"
    with pytest.raises(ExportError, match=message):
        export_adapter(peft_model, tmp_path / "out", "serving")


def test_what_was_exported_is_not_resumed_by_mistake(exported):
    with pytest.raises(
        DataError, match=r"written by export_adapter and holds no state to train on"
    ):
        load_for_training(pico_llama(), exported[3])
