"""What hosts do with an adapter beside PEFT's own calls: diffusers, Accelerate, Lightning, Llama 4.

The laws hold for every method, so that a new one has them too.
"""

import warnings

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_gradinit import (
    EvaConfig,
    LoraGAConfig,
    SVFitConfig,
    init_report,
    initialize,
    load_for_training,
)
from peft_gradinit.errors import ConfigError, NotInitializedError, TargetError
from peft_gradinit.records import records_of
from tests.helpers import (
    VOCABULARY,
    logits,
    pico_llama,
    quiet,
    relative_error,
    token_batches,
    train_steps,
)
from tests.methods.rows import (
    FLOAT32,
    INFO,
    WITH_DATA,
    config_of,
    every_method,
    started,
    with_data,
)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x):
        return self.b(self.a(x).relu())


def of_layers(method, targets, **others):
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    data = quiet([{"x": x}], loss_fn=lambda model, batch: model(**batch).square().mean())
    options = {"calibration": data} if method in WITH_DATA else {}
    return INFO[method](r=2, target_modules=targets, **options, **others)


def fixed_ranks(method, **options):
    """An adapter without ranks from data, which a deferred one cannot have."""
    return started(method, **({"rho": 1} if method == "eva" else {}), **options)


def deferred(method, **options):
    return fixed_ranks(method, data="deferred", **options)


# Loading without PEFT ------------------------------------------------------------------------


@with_data
def test_state_dict_with_every_factor_starts_a_deferred_adapter(method, tmp_path):
    trained = fixed_ranks(method)
    train_steps(trained)
    resumed = deferred(method)
    resumed.load_state_dict(trained.state_dict())
    assert torch.equal(logits(resumed), logits(trained))
    train_steps(resumed)
    resumed.save_pretrained(tmp_path)


@with_data
def test_state_dict_without_one_factor_starts_nothing(method, tmp_path):
    entries = fixed_ranks(method).state_dict()
    gone = next(k for k in entries if ".lora_B.default" in k)
    resumed = deferred(method)
    resumed.load_state_dict({k: v for k, v in entries.items() if k != gone}, strict=False)
    with pytest.raises(NotInitializedError):
        resumed.save_pretrained(tmp_path)


@with_data
def test_state_dict_of_another_adapter_does_not_start_this_one(method, tmp_path):
    resumed = deferred(method, name="german")
    resumed.load_state_dict(started(method).state_dict(), strict=False)
    with pytest.raises(NotInitializedError):
        train_steps(resumed)


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@every_method
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_state_dict_of_a_model_wrapped_by_fsdp1_has_the_names_of_the_file(method):
    options = {"check_step": False} if method == "lora_one" else {}
    options |= {"rho": 1} if method == "eva" else {}
    model = get_peft_model(TwoLayers(), of_layers(method, ["a"], **options))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05)
    x = torch.randn(3, 12)
    want, plain = model(x).detach(), get_peft_model_state_dict(model)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    state_dict = get_peft_model_state_dict(wrapped)
    assert state_dict.keys() == plain.keys()
    fresh = get_peft_model(TwoLayers(), of_layers(method, ["a"], **options))
    set_peft_model_state_dict(fresh, state_dict)
    assert relative_error(fresh(x), want) < FLOAT32


# Injecting by the names in a state dict ----------------------------------------------------------


@every_method
@pytest.mark.parametrize(
    ("named", "held"),
    [(["a", "b"], "a"), (["a"], "ab")],
    ids=["fewer-than-named", "more-than-named"],
)
def test_injection_from_a_state_dict_follows_its_keys(method, named, held):
    full = get_peft_model_state_dict(
        inject_adapter_in_model(of_layers(method, ["a", "b"]), TwoLayers())
    )
    state_dict = {k: v for k, v in full.items() if k[0] in held}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = inject_adapter_in_model(
            of_layers(method, named), TwoLayers(), state_dict=state_dict
        )
    assert get_peft_model_state_dict(model).keys() == state_dict.keys()


# The dict of a live config -----------------------------------------------------------------------


@every_method
def test_dict_of_a_live_config_fits_the_state_dict_that_peft_gives(method):
    model = inject_adapter_in_model(of_layers(method, ["a", "b"]), TwoLayers())
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05)
    values = model.peft_config["default"].to_dict()
    values.pop("peft_type")
    fresh = inject_adapter_in_model(LoraConfig(**values), TwoLayers())
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    x = torch.randn(3, 12)
    assert relative_error(fresh(x), model(x)) < FLOAT32


def changed_with_transformers(method):
    model = pico_llama()
    model.add_adapter(config_of(method))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05)
    return model


@pytest.mark.parametrize("method", [m for m in INFO if m != "svfit"])
def test_transformers_loads_a_state_dict_with_the_live_config(method):
    model = changed_with_transformers(method)
    fresh = pico_llama()
    config, state_dict = model.peft_config["default"], get_peft_model_state_dict(model)
    fresh.load_adapter(adapter_state_dict=state_dict, peft_config=config)
    x = token_batches()[0]
    assert relative_error(fresh.eval()(**x).logits, model.eval()(**x).logits) < FLOAT32


def test_transformers_loads_a_state_dict_of_svfit_with_the_config_that_is_named():
    model, fresh = changed_with_transformers("svfit"), pico_llama()
    config, state_dict = model.peft_config["default"], get_peft_model_state_dict(model)
    with pytest.raises(ConfigError, match=r"peft_config=LoraConfig\(\*\*values\)"):
        fresh.load_adapter(adapter_state_dict=state_dict, peft_config=config)
    values = {k: v for k, v in config.to_dict().items() if k != "peft_type"}
    fresh = pico_llama()
    fresh.load_adapter(adapter_state_dict=state_dict, peft_config=LoraConfig(**values))
    x = token_batches()[0]
    assert relative_error(fresh.eval()(**x).logits, model.eval()(**x).logits) < FLOAT32


@with_data
def test_deferred_adapter_that_transformers_added_starts_and_trains(method):
    model = pico_llama()
    model.add_adapter(config_of(method, data="deferred"), "german")
    with pytest.raises(NotInitializedError):
        train_steps(model, 1)
    with pytest.raises(ConfigError, match=r"no adapter 'default'; the model has \['german'\]"):
        initialize(model, quiet(token_batches()))
    report = initialize(model, quiet(token_batches()), "german")
    want = started(method)
    assert report.ranks() == init_report(model, "german").ranks() == init_report(want).ranks()
    assert torch.equal(logits(model), logits(want))
    train_steps(model, 1)


def test_initialize_names_the_configs_where_nothing_can_be_deferred():
    model = pico_llama()
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM \(configs of its adapters: None\)"):
        initialize(model, Unread())
    model.add_adapter(config_of("svfit"))
    with pytest.raises(ConfigError, match=r"adapters: \['SVFitConfig'\]"):
        initialize(model, Unread())


@every_method
def test_state_dict_that_holds_nothing_of_the_adapter_is_not_saved(method, tmp_path):
    model = started(method)
    foreign = {
        f"unit.{k.replace('lora_', '').replace('svfit_', '')}": v
        for k, v in model.state_dict().items()
    }
    with pytest.raises(ConfigError, match="would be saved empty"):
        model.save_pretrained(tmp_path, state_dict=foreign)


@every_method
def test_dict_of_a_config_without_an_adapter_holds_its_own_options(method):
    config = config_of(method)
    assert config.to_dict()["peft_type"] == config.peft_type
    assert config.to_dict()["r"] == config.r


# NumPy's numbers ---------------------------------------------------------------------------------


@every_method
def test_numbers_of_numpy_are_numbers(method, tmp_path):
    numbers = {"r": np.int64(4), "rank_pattern": {"q_proj": np.int32(2)}}
    if method != "svfit":
        numbers["lora_alpha"] = np.float32(8)
    data = quiet(token_batches(), max_tokens=np.int64(200), seed=np.int32(3))
    options = {"data": data} if method in WITH_DATA else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a small budget
        model = started(method, **options, **numbers)
    assert type(model.peft_config["default"].r) is int
    model.save_pretrained(tmp_path)
    assert relative_error(logits(load_for_training(pico_llama(), tmp_path)), logits(model)) == 0


# Names of adapters -------------------------------------------------------------------------------


class Unread:
    def __iter__(self):
        raise AssertionError("the data were read")


@every_method
@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained in the prefix")
@pytest.mark.parametrize("name", ["", "a.b", "train", "keys", "/tmp/x", "lora_A", "svfit_U"])
def test_names_that_cannot_be_injected_saved_and_loaded_are_refused_before_data_are_read(
    method, name
):
    if name[:5] in ("lora_", "svfit") and name[:4] != started(method).base_model.prefix[:4]:
        return  # a name is free in the types that do not use its prefix
    base = pico_llama()
    options = {"data": Unread()} if method in WITH_DATA else {}
    with pytest.raises(ConfigError, match="cannot be called") as caught:
        get_peft_model(base, config_of(method, **options), adapter_name=name)
    assert repr(name) in str(caught.value)
    assert not records_of(base)
    assert not any("lora_" in n or "svfit_" in n for n, _ in base.named_parameters())


@every_method
@pytest.mark.parametrize("name", ["weight", "base_layer", "a/b", "0", "ünï"])
def test_any_other_name_saves_and_loads(method, name, tmp_path):
    model = started(method, name=name)
    train_steps(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path / name)
    assert relative_error(logits(plain), logits(model)) < FLOAT32
    live = load_for_training(pico_llama(), tmp_path / name)
    assert relative_error(logits(live), logits(model)) < FLOAT32


# Layers ------------------------------------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.lin(self.emb(x))


@pytest.mark.parametrize("method", [m for m in INFO if m != "svfit"])
def test_targets_that_all_start_plain_need_no_pass(method):
    options = {"calibration": quiet(Unread())} if method in WITH_DATA else {}

    def config():
        return INFO[method](r=2, target_modules=["emb"], uncalibrated="lora", **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Embedded(), config())
        model.add_adapter("other", config())
    for name in ("default", "other"):
        report = model.base_model.init_report[name]
        assert [(m.name, m.method) for m in report.modules] == [("emb", "lora")]


class OneOutput(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head = nn.Linear(12, 10), nn.Linear(10, 1)

    def forward(self, x):
        return self.head(self.a(x).relu())


@pytest.mark.parametrize("way", ["data", "deferred"])
@pytest.mark.parametrize("method", ["lora_ga", "lora_one"])
@pytest.mark.filterwarnings("ignore:LoRA-One needs 2 singular directions")
@pytest.mark.filterwarnings("ignore:LoRA-GA gives .'head'. 'Linear'. a plain LoRA start")
def test_head_too_narrow_for_a_start_is_refused_or_starts_plain(method, way, tmp_path):
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    data = quiet([{"x": x}], loss_fn=lambda model, batch: model(**batch).square().mean())
    options = {"r": 2, "target_modules": ["a", "head"]}
    if method == "lora_ga":  # it needs two directions a rank
        with pytest.raises(TargetError, match=r"cannot start head: .*uncalibrated='lora'"):
            get_peft_model(OneOutput(), INFO[method](calibration=data, **options))
    calibration = data if way == "data" else "deferred"
    config = INFO[method](calibration=calibration, uncalibrated="lora", **options)
    model = get_peft_model(OneOutput(), config)
    if way == "deferred":
        initialize(model, data)
    methods = {m.name: m.method for m in model.base_model.init_report["default"].modules}
    assert methods["a"] == config.method
    assert methods["head"] == ("lora" if method == "lora_ga" else config.method)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05)
    model.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(OneOutput(), tmp_path),
        load_for_training(OneOutput(), tmp_path),
    ):
        assert relative_error(loaded(x), model(x)) < FLOAT32


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def dense_beside_experts():
    """A block with experts and a dense one, whose linear layers have the names of experts."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, mlp_only_layers=[0])).eval()


def test_svfit_on_all_linear_leaves_out_what_peft_would_load_as_experts(tmp_path):
    config = SVFitConfig(r=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match="share their names with experts"):
        model = get_peft_model(dense_beside_experts(), config)
    adapted = {n for n, m in model.named_modules() if hasattr(m, "svfit_delta")}
    assert any("q_proj" in n for n in adapted)
    assert not any(".mlp." in n for n in adapted)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(dense_beside_experts(), tmp_path)
    assert relative_error(logits(plain), logits(model)) < FLOAT32


def test_svfit_on_named_layers_that_peft_would_load_as_experts_is_refused_or_compact():
    targets = {"r": 2, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    base = dense_beside_experts()
    with pytest.raises(TargetError, match=r"mlp\.up_proj.*save_format='compact'"):
        get_peft_model(base, SVFitConfig(**targets))
    assert not any(hasattr(m, "svfit_delta") for m in base.modules())
    model = get_peft_model(base, SVFitConfig(save_format="compact", **targets))
    assert any("mlp.up_proj.svfit_delta" in n for n, _ in model.named_parameters())


@every_method
def test_layers_that_plain_lora_refuses_are_refused(method):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    options = {"data": Unread()} if method in WITH_DATA else {}
    config = config_of(method, target_modules=["out_proj"], **options)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(MambaForCausalLM(MambaConfig(**sizes)), config)


@pytest.mark.parametrize("config", [LoraGAConfig, EvaConfig, SVFitConfig])
def test_linear_layer_that_returns_a_tuple_is_named(config):
    router = {"num_local_experts": 2, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 24}
    model = Llama4ForCausalLM(Llama4TextConfig(**SIZES, **router, pad_token_id=0))
    data = {} if config is SVFitConfig else {"calibration": quiet(token_batches())}
    with pytest.raises((TargetError, RuntimeError), match=r"Router.* returns a tuple"):
        get_peft_model(model, config(r=2, target_modules=["router"], **data))(**token_batches()[0])
