"""Adapters on expert parameters: start, report, saving, loading, and PEFT's own rules."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

from peft_gradinit import (
    CalibrationResult,
    CorDAConfig,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    MiLoRAConfig,
    OLoRAConfig,
    PiSSAConfig,
    SVFitConfig,
    calibrate,
    initialize,
    load_for_training,
)
from peft_gradinit.errors import CalibrationError, ConfigError, NotInitializedError, TargetError
from peft_gradinit.linalg import truncated_svd
from peft_gradinit.methods.lora_ga import lora_ga_factors
from peft_gradinit.methods.lora_one import lora_one_factors
from peft_gradinit.records import by_parameter
from tests.helpers import (
    base_weights,
    logits,
    quiet,
    relative_error,
    same_weights,
    token_batches,
    train_steps,
)
from tests.moe.models import (
    BOTH,
    as_out_in,
    dense_gradients,
    expert_weights,
    gpt_oss,
    llama4,
    mixtral,
    qwen3_moe,
    starve,
)

MODELS = (qwen3_moe, mixtral, gpt_oss)
ALLOCATING = (LoraGAConfig, LoraOneConfig, EvaConfig)
WITH_DATA = (*ALLOCATING, CorDAConfig)
WITHOUT_DATA = (PiSSAConfig, MiLoRAConfig, OLoRAConfig)
R = 3


def config(config_cls=LoraGAConfig, data=None, **options):
    values = {"r": R, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": BOTH}
    if config_cls is EvaConfig:
        values["rho"] = 1
    if config_cls not in WITHOUT_DATA:
        values["calibration"] = quiet(token_batches() if data is None else data)
    return config_cls(**values | options)


def started(make=qwen3_moe, config_cls=LoraGAConfig, name="gold", **options):
    return get_peft_model(make(), config(config_cls, **options), name)


def wrappers(peft_model) -> dict[str, ParamWrapper]:
    """PEFT's wrappers by the full name of their parameter in the base model."""
    return {
        f"{path.replace('.base_layer', '')}.{layer.parameter_name}": layer
        for path, layer in peft_model.base_model.model.named_modules()
        if isinstance(layer, ParamWrapper)
    }


def halves(layer: ParamWrapper, expert: int, name: str = "gold"):
    """`A, A0, B, B0` of one expert, cut out of PEFT's layout by PEFT's rule."""
    n = layer.num_experts
    A = layer.lora_A[name].weight.reshape(n, -1, layer.in_features)[expert]
    B = layer.lora_B[name].weight.reshape(layer.out_features, -1, n)[:, :, expert]
    r = A.shape[0] // 2
    return A[:r], A[r:], B[:, :r], -B[:, r:]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_ga_starts_every_expert_from_its_own_gradient(make, use_rslora):
    model = make()
    base, before = logits(model), base_weights(model)
    weights = expert_weights(model)
    names = sorted({n.rpartition("[")[0] for n in weights})
    whole = dense_gradients(model, token_batches(), names)
    estimator = quiet(token_batches(), estimator="dense")
    peft_model = get_peft_model(model, config(use_rslora=use_rslora, calibration=estimator), "gold")
    assert relative_error(logits(peft_model), base) < 1e-5
    assert same_weights(before, base_weights(peft_model))
    layers = wrappers(peft_model)
    assert layers.keys() == set(names)
    for name, weight in weights.items():
        parameter = name.rpartition("[")[0]
        svd = truncated_svd(as_out_in(whole[parameter], weight), 2 * R)
        length = svd.U.shape[0] ** 0.25 / 4
        want_A, want_B = lora_ga_factors(svd, lengths=(length, length))
        A, A0, B, B0 = halves(layers[parameter], weight.index)
        assert torch.equal(A, A0)
        assert torch.equal(B, B0)
        assert relative_error(B0 @ A0, want_B @ want_A) < 2e-3, name


@pytest.mark.parametrize("make", MODELS)
def test_lora_one_takes_a_step_in_every_expert_that_lowers_the_loss(make):
    model = make()
    weights = expert_weights(model)
    names = sorted({n.rpartition("[")[0] for n in weights})
    whole = dense_gradients(model, token_batches(), names)
    before = base_weights(model)
    estimator = quiet(token_batches(), estimator="dense")
    peft_model = get_peft_model(model, config(LoraOneConfig, calibration=estimator), "gold")
    step = peft_model.base_model.init_report["gold"].step
    assert step.loss_after < step.loss_before
    layers = wrappers(peft_model)
    for name, weight in weights.items():
        layer = layers[name.rpartition("[")[0]]
        svd = truncated_svd(as_out_in(whole[name.rpartition("[")[0]], weight), R)
        A0, B0 = lora_one_factors(svd, gamma=128.0)
        delta = as_out_in(layer.get_delta_weight("gold"), weight)
        assert relative_error(delta, 2 * step.scale * B0 @ A0) < 2e-3, name
    assert same_weights(before, base_weights(peft_model))


@pytest.mark.parametrize("make", MODELS)
def test_eva_starts_every_expert_from_its_own_inputs(make):
    model = make()
    base = logits(model)
    result = calibrate(model, config(EvaConfig), quiet(token_batches()))
    peft_model = get_peft_model(model, config(EvaConfig, calibration=result), "gold")
    assert torch.equal(logits(peft_model), base)
    layers = wrappers(peft_model)
    for name, weight in expert_weights(make()).items():
        layer = layers[name.rpartition("[")[0]]
        A = layer.lora_A["gold"].weight.reshape(layer.num_experts, -1, layer.in_features)
        if name in result.triplets:
            assert torch.equal(A[weight.index], result.triplets[name].Vh[:R])


@pytest.mark.parametrize(
    ("make", "config_cls"),
    [
        *((make, config_cls) for make in MODELS for config_cls in (*WITH_DATA, *WITHOUT_DATA)),
        *((llama4, config_cls) for config_cls in (LoraGAConfig, LoraOneConfig, *WITHOUT_DATA)),
    ],
)
@pytest.mark.filterwarnings("ignore:(EVA|CorDA) gives .* a plain LoRA start")
def test_life_of_an_adapter(make, config_cls, tmp_path):
    options = {}
    if make is llama4:
        options = {"target_parameters": [f"feed_forward.{name}" for name in BOTH]}
    model = make()
    base, before = logits(model), base_weights(model)
    peft_model = get_peft_model(model, config(config_cls, **options), "gold")
    started_at = logits(peft_model)
    train_steps(peft_model, lr=1e-3)
    trained = logits(peft_model)
    assert relative_error(trained, started_at) > 1e-3
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), base)
    peft_model.save_pretrained(tmp_path)
    assert same_weights(before, base_weights(peft_model))
    plain = PeftModel.from_pretrained(make(), tmp_path / "gold")
    assert relative_error(logits(plain), trained) < 1e-6
    live = load_for_training(make(), tmp_path / "gold", "gold")
    assert torch.equal(logits(live), trained)
    assert train_steps(live, 3) == train_steps(peft_model, 3)
    trained = logits(peft_model)
    peft_model.merge_adapter()
    assert relative_error(logits(peft_model), trained) < 1e-5
    peft_model.unmerge_adapter()
    assert relative_error(logits(peft_model), trained) < 1e-5
    assert relative_error(logits(live.merge_and_unload()), trained) < 1e-5


def test_saved_config_is_plain_lora_of_twice_the_rank(tmp_path):
    started().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "gold" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"]) == ("LORA", 2 * R, 12)
    assert sorted(saved["target_parameters"]) == sorted(BOTH)


FRESH_PROCESS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, by = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
if by == "peft":
    model = PeftModel.from_pretrained(model, adapter)
else:
    model.load_adapter(adapter)
with torch.no_grad():
    output = model(torch.arange(40).view(2, 20)).logits
assert not any(name.startswith("peft_gradinit") for name in sys.modules)
torch.save(output, out)
"""
BY_TRANSFORMERS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.4"),
    reason="load_adapter of Transformers before 5.4 takes two expert parameters in another order "
    "than PEFT, and refuses them",
)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["peft", pytest.param("transformers", marks=BY_TRANSFORMERS)])
def test_saved_adapter_loads_in_a_process_without_the_package(by, tmp_path):
    peft_model = started()
    qwen3_moe().save_pretrained(tmp_path / "base")
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    paths = [str(tmp_path / name) for name in ("base", "gold", "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *paths, by],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        want = peft_model(torch.arange(40).view(2, 20)).logits
    assert relative_error(torch.load(tmp_path / "out.pt"), want) <= 1e-5


# Experts without tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("config_cls", WITH_DATA)
def test_an_expert_without_tokens_is_named_and_starts_plain(config_cls):
    model = qwen3_moe()
    block = starve(model, 4)
    routed_base = logits(model)
    names = [f"{block}.{name}[4]" for name in ("gate_up_proj", "down_proj")]
    with pytest.warns(UserWarning, match=r"gives 2 targets a plain LoRA start") as caught:
        peft_model = get_peft_model(model, config(config_cls), "gold")
    (text,) = [str(w.message) for w in caught if "plain LoRA start" in str(w.message)]
    report = peft_model.base_model.init_report["gold"]
    lines = {line.name: line for line in report.modules}
    for name in names:
        assert f"{name}: no token was routed to it in 3 batches" in text
        assert (lines[name].method, lines[name].r, lines[name].start_norm) == ("lora", R, 0)
        assert "no token was routed to it" in lines[name].fallback
        assert "[4]: no token was routed to it" in str(report)
    assert sum(line.method == "lora" for line in report.modules) == 2
    if config_cls is not LoraOneConfig:
        assert relative_error(logits(peft_model), routed_base) < 1e-5
    for name in names:
        layer = wrappers(peft_model)[name.removesuffix("[4]")]
        n = layer.num_experts
        A = layer.lora_A["gold"].weight.reshape(n, -1, layer.in_features)[4]
        assert A.norm(dim=1).min() > 0
        assert layer.get_delta_weight("gold")[4].norm() == 0


def test_a_plain_start_trains_like_any_other(tmp_path):
    model = qwen3_moe()
    starve(model, 4)
    with pytest.warns(UserWarning, match="plain LoRA start"):
        peft_model = get_peft_model(model, config(), "gold")
    layer = wrappers(peft_model)["model.layers.0.mlp.experts.gate_up_proj"]
    model.model.layers[0].mlp.gate._forward_hooks.clear()  # later data reach the expert
    train_steps(peft_model, 3)
    assert layer.get_delta_weight("gold")[4].norm() > 0
    trained = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(qwen3_moe(), tmp_path / "gold")
    assert relative_error(logits(plain), trained) < 1e-6


def test_a_parameter_without_any_token_is_an_error_unless_asked_otherwise():
    def unused():
        model = qwen3_moe()
        mlp = model.model.layers[1].mlp
        mlp.experts.forward = lambda hidden, *_: hidden  # a kernel that hides its products
        return model

    before = base_weights(model := unused())
    with pytest.raises(
        CalibrationError, match=r"could not calibrate 12 of .*layers\.1.*'eager'\) before"
    ):
        get_peft_model(model, config(), "gold")
    assert same_weights(before, base_weights(model))
    with pytest.warns(UserWarning, match="gives 12 targets a plain LoRA start"):
        peft_model = get_peft_model(unused(), config(uncalibrated="lora"), "gold")
    lines = {line.name: line for line in peft_model.base_model.init_report["gold"].modules}
    assert lines["model.layers.1.mlp.experts.down_proj[0]"].method == "lora"
    assert lines["model.layers.0.mlp.experts.down_proj[0]"].method == "LoRA-GA"


# Ways in, options, and PEFT's own rules -----------------------------------------------------------


def test_a_saved_calibration_gives_the_same_start(tmp_path):
    saved = calibrate(qwen3_moe(), config(), quiet(token_batches())).save(tmp_path)
    names = CalibrationResult.load(saved).triplets
    assert "model.layers.1.mlp.experts.down_proj[5]" in names
    direct, loaded = started(), started(calibration=str(saved))
    assert torch.equal(logits(direct), logits(loaded))
    with pytest.raises(ValueError, match=r"down_proj\[0\] has \[out, in, rank\] "):
        started(calibration=str(saved), r=2)


def test_a_deferred_adapter_refuses_to_train_and_takes_its_start_in_place():
    peft_model = started(calibration="deferred").train()
    base = logits(qwen3_moe())
    with pytest.raises(NotInitializedError, match="calibration='deferred'"):
        train_steps(peft_model, 1)
    only_experts = started(calibration="deferred", target_modules=[]).train()
    with pytest.raises(NotInitializedError, match="calibration='deferred'"):
        train_steps(only_experts, 1)
    with only_experts.disable_adapter():
        only_experts(**token_batches()[0])
    assert torch.equal(logits(only_experts), base)
    router = started(mixtral, calibration="deferred", target_parameters=["gate.weight"], r=2)
    with pytest.raises(NotInitializedError, match="calibration='deferred'"):
        router.eval()(**token_batches()[0]).loss.backward()
    parameters = {n: id(p) for n, p in peft_model.named_parameters()}
    initialize(peft_model, quiet(token_batches()), "gold")
    assert {n: id(p) for n, p in peft_model.named_parameters()} == parameters
    assert torch.equal(logits(peft_model), logits(started()))
    train_steps(peft_model, 1)


def test_a_deleted_deferred_adapter_does_not_hold_one_of_its_name():
    peft_model = started(calibration="deferred")
    peft_model.add_adapter("other", config())
    peft_model.set_adapter("other")
    peft_model.delete_adapter("gold")
    peft_model.add_adapter("gold", config())
    peft_model.set_adapter("gold")
    train_steps(peft_model, 1)
    peft_model.set_adapter("other")
    peft_model.delete_adapter("gold")
    peft_model.add_adapter("gold", config(calibration="deferred"))
    peft_model.set_adapter("gold")
    with pytest.raises(NotInitializedError, match="calibration='deferred'"):
        train_steps(peft_model, 1)


@pytest.mark.parametrize(
    ("config_cls", "allocation"),
    [
        *((config_cls, "explained_variance") for config_cls in ALLOCATING),
        *((config_cls, "gradient_energy") for config_cls in (LoraGAConfig, LoraOneConfig)),
    ],
)
def test_experts_of_a_parameter_share_the_rank_that_an_allocation_gives(
    config_cls, allocation, tmp_path
):
    options = {
        "rank_allocation": allocation,
        "rho": 2,
        "min_rank": 1,
        "target_modules": "all-linear",
    }
    peft_model = started(mixtral, config_cls, r=2, **options)
    report = peft_model.base_model.init_report["gold"]
    ranks = {}
    for line in report.modules:
        ranks.setdefault(line.name.partition("[")[0], set()).add(line.r)
    assert all(len(of_experts) == 1 for of_experts in ranks.values())
    assert len({min(r) for r in ranks.values()}) > 1, "nothing was allocated"
    for name, layer in wrappers(peft_model).items():
        assert {layer.r["gold"]} == ranks[name]
    train_steps(peft_model, 2)
    trained = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_for_training(mixtral(), tmp_path / "gold", "gold")), trained)


def test_a_budget_of_parameters_counts_every_expert():
    def n_trained(**options):
        peft_model = started(mixtral, LoraOneConfig, r=2, target_modules="all-linear", **options)
        return sum(p.numel() for p in peft_model.parameters() if p.requires_grad), peft_model

    uniform, peft_model = n_trained()
    dearest = max((p.numel() for p in peft_model.parameters() if p.requires_grad), default=0)
    by_gain, _ = n_trained(rank_allocation="gradient_energy", budget="parameters")
    assert uniform - dearest < by_gain <= uniform


def test_a_parameter_may_lose_its_adapter():
    options = {"rank_allocation": "gradient_energy", "rho": 4, "min_rank": 0, "r": 1}
    with torch.no_grad():
        model = qwen3_moe()
        model.model.layers[0].mlp.experts.down_proj *= 1e-4  # and so the gradient of gate_up_proj
    peft_model = get_peft_model(model, config(**options), "gold")
    gone = "model.layers.0.mlp.experts.gate_up_proj"
    assert gone not in wrappers(peft_model)
    ranks = peft_model.base_model.init_report["gold"].ranks()
    assert {r for name, r in ranks.items() if name.startswith(gone)} == {0}
    kept = {n.partition("[")[0] for n, r in ranks.items() if r and n.endswith("]")}
    assert wrappers(peft_model).keys() == kept
    train_steps(peft_model, 1)


def test_all_linear_means_what_it_means_for_lora(tmp_path):
    """PEFT turns the linear layers that experts were in Transformers 4 into parameters."""
    with pytest.warns(RuntimeWarning, match="_pattern keys did not match"):  # PEFT's, of parameters
        lora = get_peft_model(mixtral(), LoraConfig(r=2, target_modules="all-linear"), "gold")
    with pytest.warns(UserWarning, match=r"LoRA-GA needs .*mlp\.gate\.weight \(2 of 3\)"):
        ours = started(mixtral, target_modules="all-linear", target_parameters=None)
    assert wrappers(ours).keys() == wrappers(lora).keys()
    assert {n.rpartition(".")[2] for n in wrappers(ours)} == {"gate_up_proj", "down_proj", "weight"}
    ranks = {n: layer.r["gold"] for n, layer in wrappers(ours).items()}
    assert ranks["model.layers.0.mlp.experts.gate_up_proj"] == 2 * R, "two fused layers"
    train_steps(ours, 2)
    trained = logits(ours)
    ours.save_pretrained(tmp_path)
    with pytest.warns(RuntimeWarning, match="_pattern keys did not match"):
        plain = PeftModel.from_pretrained(mixtral(), tmp_path / "gold")
    assert relative_error(logits(plain), trained) < 1e-6


def test_bfloat16_experts_start_and_train():
    model = mixtral().to(torch.bfloat16)
    base = logits(model)
    peft_model = get_peft_model(model, config(), "gold")
    layer = next(iter(wrappers(peft_model).values()))
    assert layer.lora_A["gold"].weight.dtype == torch.float32
    assert relative_error(logits(peft_model), base) < 2e-2
    losses = train_steps(peft_model, 6, lr=1e-3)
    assert losses[-1] < losses[2]


def test_a_second_adapter_has_experts_of_its_own():
    peft_model = started(name="first")
    first = logits(peft_model)
    peft_model.add_adapter("second", config(r=2))
    assert torch.equal(logits(peft_model), first)
    peft_model.set_adapter("second")
    assert {layer.r["second"] for layer in wrappers(peft_model).values()} == {2}
    train_steps(peft_model, 2)
    peft_model.set_adapter("first")
    assert torch.equal(logits(peft_model), first)
    peft_model.delete_adapter("second")
    assert torch.equal(logits(peft_model), first)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lora_dropout": 0.1}, ConfigError, r"lora_dropout=0\.1 does not work on parameters"),
        ({"use_dora": True}, ConfigError, "use_dora=True does not work on parameters"),
        ({"lora_bias": True}, ConfigError, "lora_bias=True does not work on parameters"),
        ({"target_parameters": ["input_layernorm.weight"]}, TargetError, r"of shape \(48,\)"),
        ({"target_parameters": ["no.such"], "target_modules": []}, ValueError, "o "),
    ],
)
def test_what_cannot_work_is_refused_before_any_data_are_read(options, error, message):
    def never():
        raise AssertionError("the data were read")
        yield

    model = qwen3_moe()
    before = base_weights(model)
    with pytest.raises(error, match=message):
        get_peft_model(model, config(data=never(), **options), "gold")
    assert same_weights(before, base_weights(model))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_lowered_ranks_name_each_parameter_once():
    with pytest.warns(UserWarning, match=r"LoRA-GA needs 20 .*: model.*\(8 of 10\)") as caught:
        peft_model = started(r=10)
    texts = [str(w.message) for w in caught]
    (text,) = [t for t in texts if "LoRA-GA needs" in t]
    assert text.count("layers.0.mlp.experts.down_proj") == 1
    assert not any("pattern keys did not match" in t for t in texts)
    ranks = {n: layer.r["gold"] for n, layer in wrappers(peft_model).items()}
    assert ranks["model.layers.0.mlp.experts.down_proj"] == 8
    assert ranks["model.layers.0.mlp.experts.gate_up_proj"] == 10


def test_patterns_that_match_nothing_are_still_told():
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*'no_such'"):
        started(rank_pattern={"no_such": 2})


def test_combining_is_refused_as_peft_does():
    peft_model = started(config_cls=EvaConfig)
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        peft_model.add_weighted_adapter(["gold"], [1.0], "both", "linear")
    assert list(peft_model.peft_config) == ["gold"]


def test_svfit_says_what_to_use_instead():
    with pytest.raises(ConfigError, match=r"target_parameters=\['experts.down_proj'\]. Use"):
        SVFitConfig(target_parameters=["experts.down_proj"])


def test_report_gives_the_experts_of_a_parameter_one_line():
    report = started().base_model.init_report["gold"]
    table = str(report)
    assert table.count("model.layers.0.mlp.experts.down_proj[0-5]") == 1
    assert len(report.modules) == 2 + 2 * 2 * 6
    assert report.ranks()["model.layers.0.mlp.experts.down_proj[3]"] == R


def test_saved_adapter_has_a_card_with_a_line_for_each_parameter(tmp_path):
    started().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "captured energy by layer" in card
    lines = by_parameter(started().base_model.init_report["gold"].modules)
    assert len(lines) == 2 + 2 * 2


def test_a_copy_such_as_trls_reference_has_the_same_experts():
    peft_model = started(name="default")
    train_steps(peft_model, 2)
    trained = logits(peft_model)
    peft_model.add_adapter("ref", peft_model.peft_config["default"])
    peft_model.set_adapter("ref")
    assert torch.equal(logits(peft_model), trained)
