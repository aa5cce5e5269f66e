"""What holds for every start that depends on the weight: PiSSA, MiLoRA, OLoRA and CorDA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_gradinit import calibrate, init_report, initialize
from peft_gradinit.errors import CalibrationError, ConfigError, TargetError
from tests.helpers import (
    logits,
    pico_gpt2,
    pico_llama,
    relative_error,
    token_batches,
    train_steps,
)
from tests.methods.rows import FLOAT32
from tests.methods.weight_starts import (
    ALL,
    ALPHA,
    WITHOUT_DATA,
    CorDAConfig,
    MiLoRAConfig,
    OLoRAConfig,
    PiSSAConfig,
    R,
    config_of,
    expected,
    products,
    started,
    weights,
)
from tests.moe.models import as_out_in, expert_weights, gpt_oss, mixtral, starve

every_method = pytest.mark.parametrize("config_cls", ALL)
without_data = pytest.mark.parametrize("config_cls", WITHOUT_DATA)
SINGULAR = (PiSSAConfig, MiLoRAConfig, CorDAConfig)
"""Whose product is a sum of singular components, so that it is zero where the weight is."""

# Step 0 ------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 9, "c_fc": 2}, "alpha_pattern": {"q_proj": 30}},
    "dora": {"use_dora": True},
}


@without_data
@pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_the_function_at_step_zero_is_the_bases(config_cls, make, options):
    peft_model = started(config_cls, make(), **options)
    assert all(p.norm() > 0 for p in products(peft_model).values())
    assert relative_error(logits(peft_model), logits(make())) <= FLOAT32
    assert init_report(peft_model).drift is None, "there are no data to measure it on"


@without_data
def test_the_function_of_a_bfloat16_base_is_kept_to_the_last_bit(config_cls):
    """The float32 product cancels to far less than a unit of bfloat16; PEFT rounds the residual."""
    base = logits(pico_llama().bfloat16())
    assert torch.equal(logits(started(config_cls, pico_llama().bfloat16())), base)
    init = {PiSSAConfig: "pissa", OLoRAConfig: "olora"}.get(config_cls)
    if init is not None:
        theirs = get_peft_model(pico_llama().bfloat16(), LoraConfig(init_lora_weights=init))
        assert relative_error(logits(theirs), base) > 1e-3


def outputs_in_train_mode(model):
    with torch.no_grad():
        return model.train()(input_ids=token_batches(4, 4)[0]["input_ids"]).logits


@every_method
def test_dropout_does_not_change_the_function_at_step_zero(config_cls):
    """What is taken out is dropped together with what is trained; in PEFT's layout it is not."""
    base = logits(pico_llama())
    ours = outputs_in_train_mode(started(config_cls, pico_llama(), lora_dropout=0.5))
    assert relative_error(ours, base) <= FLOAT32
    config = LoraConfig(r=R, init_lora_weights="pissa", lora_dropout=0.5, task_type="CAUSAL_LM")
    theirs = outputs_in_train_mode(get_peft_model(pico_llama(), config))
    assert relative_error(theirs, base) > 0.1


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config_cls", "init"), [(PiSSAConfig, "pissa"), (OLoRAConfig, "olora")])
def test_the_losses_of_a_run_are_those_of_peft(config_cls, init):
    """Adam turns with the signs of the factors, so that those do not matter."""
    values = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    theirs = get_peft_model(pico_llama(), LoraConfig(init_lora_weights=init, **values))
    ours = train_steps(started(config_cls, pico_llama()), 8, lr=1e-3)
    assert ours == pytest.approx(train_steps(theirs, 8, lr=1e-3), rel=FLOAT32)


@every_method
def test_the_scaling_changes_what_is_taken_out_by_olora_alone(config_cls):
    one, other = (products(started(config_cls, pico_llama(), lora_alpha=a)) for a in (8, 2))
    for name, product in one.items():
        times = 4 if config_cls is OLoRAConfig else 1
        assert relative_error(product, times * other[name]) <= 1e-6  # float32


def test_adapters_of_different_methods_are_used_together_as_plain_lora(tmp_path):
    """Live, PEFT allows one type on a model; each file is a LoRA for the same, unchanged base."""
    found = {}
    for config_cls in ALL:
        peft_model = started(config_cls, pico_llama())
        train_steps(peft_model, 3)
        found[config_cls.name] = logits(peft_model)
        peft_model.save_pretrained(tmp_path / config_cls.name)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        peft_model.add_adapter("other", config_of(PiSSAConfig))
    assert torch.equal(logits(peft_model), found["corda"])

    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path / "pissa", "pissa")
    for name in ("milora", "olora", "corda"):
        loaded.load_adapter(tmp_path / name, name)
    for name, want in found.items():
        loaded.set_adapter(name)
        assert relative_error(logits(loaded), want) <= FLOAT32, name
        assert relative_error(want, logits(pico_llama())) > 1e-3, name
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(pico_llama()))


# Experts -----------------------------------------------------------------------------------------


@without_data
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_every_expert_starts_from_its_own_matrix(config_cls, make):
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"target_modules": ["q_proj"], "target_parameters": targets}
    peft_model = started(config_cls, make(), **options)
    assert relative_error(logits(peft_model), logits(make())) <= FLOAT32
    found = products(peft_model)
    for name, weight in expert_weights(make()).items():
        matrix = as_out_in(getattr(weight.module, weight.parameter), weight).detach()
        want = expected(config_cls, matrix, R, scaling=ALPHA / R)
        assert relative_error(found[name], want) <= 1e-4, name  # of float32 SVDs


def test_experts_take_their_own_second_moment_and_plain_lora_where_no_token_comes():
    model = mixtral()
    block = starve(model, expert=2)
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    with pytest.warns(UserWarning, match=r"gives 1 targets a plain LoRA start .*down_proj\[2\]"):
        peft_model = started(CorDAConfig, model, **options)
    found = products(peft_model)
    empty = {n for n, product in found.items() if not product.any()}
    assert empty == {f"{block}.down_proj[2]"}
    assert init_report(peft_model).drift <= FLOAT32


# What cannot work --------------------------------------------------------------------------------


@without_data
@pytest.mark.parametrize("calibration", [token_batches(), "deferred", "somewhere/saved"])
def test_data_are_refused(config_cls, calibration):
    message = rf"{config_cls.__name__} computes its start from the weights .*leave calibration out"
    with pytest.raises(ConfigError, match=message):
        config_cls(r=R, calibration=calibration)
    with pytest.raises(ConfigError, match=r"there is nothing to calibrate; pass the config to get"):
        calibrate(pico_llama(), config_of(config_cls), token_batches())
    with pytest.raises(ConfigError, match="'default' has its start already"):
        initialize(started(config_cls, pico_llama()), token_batches())


@every_method
def test_an_allocation_of_ranks_is_refused(config_cls):
    with pytest.raises(ConfigError, match=r"serves rank_allocation in \('uniform',\)"):
        config_cls(rank_allocation="explained_variance")


@without_data
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(config_cls, value):
    model = pico_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(TargetError, match=r"weight of model\.layers\.1\.mlp\.up_proj has values"):
        started(config_cls, model)
    assert not any("lora" in name for name, _ in model.named_modules())
    started(config_cls, model, exclude_modules=["up_proj"])


def test_a_base_that_is_not_finite_fails_in_the_pass_of_corda():
    model = pico_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(CalibrationError, match=r"inputs of model\.layers\.1\.mlp\.down_proj are"):
        started(CorDAConfig, model)
    with pytest.raises(TargetError, match=r"weight of model\.layers\.1\.mlp\.up_proj has values"):
        started(CorDAConfig, model, target_modules=["up_proj"])


def with_a_zero_weight():
    model = pico_llama()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize("config_cls", SINGULAR)
def test_a_zero_weight_would_never_train_and_is_an_error_or_plain_lora(config_cls):
    name = "model.layers.1.self_attn.o_proj"
    with pytest.raises(TargetError, match=rf"starts 1 of its targets \({name}\) at A = B = 0"):
        started(config_cls, with_a_zero_weight())
    with pytest.warns(UserWarning, match=rf"\({name}\) .* they get a plain LoRA start"):
        peft_model = started(config_cls, with_a_zero_weight(), uncalibrated="lora")
    assert [m.name for m in init_report(peft_model).modules if m.method == "lora"] == [name]
    layer = peft_model.base_model.model.get_submodule(name)
    assert not layer.get_delta_weight("default").any()
    train_steps(peft_model, 2)
    assert layer.get_delta_weight("default").any()


def test_a_zero_weight_trains_with_olora_since_b_is_orthonormal():
    peft_model = started(OLoRAConfig, with_a_zero_weight())
    layer = peft_model.base_model.model.model.layers[1].self_attn.o_proj
    train_steps(peft_model, 2)
    assert layer.get_delta_weight("default").any()


@every_method
def test_too_large_ranks_are_lowered_at_the_same_scaling(config_cls):
    message = rf"{config_cls.method} needs 30 singular directions .*k_proj \(24 of 30\)"
    with pytest.warns(UserWarning, match=message):
        peft_model = started(config_cls, pico_llama(), r=30, lora_alpha=30)
    assert relative_error(logits(peft_model), logits(pico_llama())) <= FLOAT32
    for name, product in products(peft_model).items():
        whole = relative_error(product, weights(pico_llama())[name]) <= 1e-2  # of CorDA's inverse
        assert whole == (name.endswith(("k_proj", "v_proj"))), name
