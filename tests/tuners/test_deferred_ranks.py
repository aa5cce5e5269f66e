"""Ranks and targets from data in a deferred adapter: the same start as by every other way in."""

import gc

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_gradinit import (
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    init_report,
    initialize,
    load_for_training,
    pairs,
)
from peft_gradinit.errors import ConfigError, NotInitializedError
from peft_gradinit.records import records_of
from peft_gradinit.starts import resized
from peft_gradinit.tuners import deferred_adapters
from peft_gradinit.tuners.lora.pairs import live_targets
from peft_gradinit.tuners.lora.reshaping import reshaped
from tests.helpers import logits, pico_llama, quiet, relative_error, token_batches, train_steps
from tests.moe.models import BOTH, qwen3_moe

METHODS = (LoraGAConfig, LoraOneConfig, EvaConfig)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
SETTINGS = {
    "auto+output": {"target_modules": "auto+output"},
    "some-lost": {"rank_allocation": "explained_variance", "rho": 3, "min_rank": 0, "r": 2},
    "none-lost": {"rank_allocation": "explained_variance", "min_rank": 1},
    "auto-dora-rslora": {"target_modules": "auto", "use_dora": True, "use_rslora": True},
}


def config_of(method, calibration, **options):
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return method(**{**values, **options}, calibration=calibration)


def data():
    return quiet(token_batches())


def started_later(method, model=None, **options):
    peft_model = get_peft_model(model or pico_llama(), config_of(method, "deferred", **options))
    initialize(peft_model, data())
    return peft_model


def entries(peft_model, name="default"):
    return get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)


def same_entries(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def kinds(peft_model):
    return {name: type(module).__qualname__ for name, module in peft_model.named_modules()}


@every_method
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_deferred_start_is_that_of_a_config_with_data(method, setting, tmp_path):
    options = SETTINGS[setting]
    want = get_peft_model(pico_llama(), config_of(method, data(), **options))
    got = started_later(method, **options)
    assert len(set(init_report(got).ranks().values())) > 1
    assert same_entries(entries(got), entries(want))
    assert kinds(got) == kinds(want)
    assert deferred_adapters(got) == []
    configs = [m.peft_config["default"] for m in (got, want)]
    assert configs[0].to_dict() == configs[1].to_dict()
    records = [records_of(m)["default"] for m in (got, want)]
    assert records[0].requested_ranks == records[1].requested_ranks
    assert (
        records[0].ranks
        == records[1].ranks
        == {n: r for n, r in init_report(want).ranks().items() if r}
    )
    if (
        setting == "auto+output"
    ):  # lives on: trains, is saved, loads without this package and to train
        assert train_steps(got)[-1] < train_steps(got)[0] + 1
        got.save_pretrained(tmp_path, save_embedding_layers=False)
        plain = PeftModel.from_pretrained(pico_llama(), tmp_path)
        assert relative_error(logits(plain), logits(got)) < 1e-5
        again = load_for_training(pico_llama(), tmp_path)
        assert same_entries(entries(again), entries(got))


@pytest.mark.filterwarnings("ignore:LoRA-One gives .* targets a plain LoRA start")
@pytest.mark.filterwarnings("ignore:the calibration found fewer directions")
def test_experts_that_no_token_reaches_can_train_after_their_rank_has_changed():
    options = {"target_parameters": BOTH, "target_modules": ["q_proj", "o_proj"], "r": 2}
    options |= {"rank_allocation": "gradient_energy", "rho": 4, "min_rank": 0}
    few = quiet([{k: v[:1, :4] for k, v in token_batches()[0].items()}])
    want = get_peft_model(qwen3_moe(), config_of(LoraOneConfig, few, **options))
    got = get_peft_model(qwen3_moe(), config_of(LoraOneConfig, "deferred", **options))
    initialize(got, few)
    ranks = init_report(got).ranks()
    assert ranks == init_report(want).ranks()
    assert len(set(ranks.values())) > 1
    assert kinds(got) == kinds(want)
    plain = {m.name for m in init_report(got).modules if m.method == "lora"}
    assert plain
    for mine, theirs in zip(pairs(got), pairs(want), strict=True):
        assert (mine.name, mine.A.shape, mine.B.shape) == (
            theirs.name,
            theirs.A.shape,
            theirs.B.shape,
        )
        for i, (A, B) in enumerate(mine.matrices()):
            if f"{mine.name}[{i}]" in plain:
                assert A.abs().sum() > 0
                assert not B.any()
            else:
                assert torch.equal(A, theirs.matrices()[i][0])
                assert torch.equal(B, theirs.matrices()[i][1])


def test_other_adapters_of_a_layer_stay_when_one_loses_it():
    model = get_peft_model(pico_llama(), config_of(LoraOneConfig, data()))
    first = {k: v.clone() for k, v in entries(model).items()}
    alone = logits(model)
    options = {"rank_allocation": "explained_variance", "rho": 3, "min_rank": 0, "r": 1}
    model.add_adapter("second", config_of(LoraOneConfig, "deferred", **options))
    model.set_adapter("second")
    initialize(model, data(), "second")
    assert 0 in init_report(model, "second").ranks().values()
    assert model.active_adapters == ["second"]
    want = get_peft_model(pico_llama(), config_of(LoraOneConfig, data(), **options))
    assert same_entries(entries(model, "second"), entries(want))
    assert relative_error(logits(model), logits(want)) < 1e-6
    model.set_adapter("default")
    assert same_entries(entries(model), first)
    assert torch.equal(logits(model), alone)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_an_optimiser_that_was_made_before_is_refused_and_nothing_has_changed():
    model = get_peft_model(pico_llama(), config_of(EvaConfig, "deferred"))
    before = kinds(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with pytest.raises(
        ConfigError, match=r"'default' gets its ranks .*SGD was made before.*calibrate first"
    ):
        initialize(model, data())
    assert deferred_adapters(model) == ["default"]
    assert kinds(model) == before
    del optimizer
    gc.collect()
    initialize(model, data())
    assert len(set(init_report(model).ranks().values())) > 1


def test_an_optimiser_of_other_parameters_is_none_of_its_business():
    other = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(other.parameters())
    model = started_later(EvaConfig)
    assert deferred_adapters(model) == []
    assert optimizer.param_groups


def test_data_parallelism_that_was_wrapped_around_it_before_is_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = get_peft_model(pico_llama(), config_of(EvaConfig, "deferred"))
        wrapped = DistributedDataParallel(model)
        with pytest.raises(ConfigError, match="DistributedDataParallel was made before"):
            initialize(wrapped, data())
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", [LoraGAConfig, LoraOneConfig], ids=lambda m: m.method)
def test_a_start_that_fails_gives_the_layers_their_ranks_back(method, monkeypatch):
    model = get_peft_model(pico_llama(), config_of(method, "deferred", target_modules="auto"))
    shapes, before = {n: p.shape for n, p in model.named_parameters()}, kinds(model)
    monkeypatch.setattr("peft_gradinit.tuners.lora.model.drift", interrupt)
    with pytest.raises(KeyboardInterrupt):
        initialize(model, data())
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert kinds(model) == before
    assert deferred_adapters(model) == ["default"]
    with pytest.raises(NotInitializedError):
        train_steps(model)
    monkeypatch.undo()
    initialize(model, data())
    want = get_peft_model(pico_llama(), config_of(method, data(), target_modules="auto"))
    assert same_entries(entries(model), entries(want))


def interrupt(*_):
    raise KeyboardInterrupt


@every_method
def test_a_deferred_adapter_takes_the_shapes_of_the_weights_that_are_loaded(method):
    trained = started_later(method, target_modules="auto")
    train_steps(trained)
    saved = get_peft_model_state_dict(trained, save_embedding_layers=False)
    fresh = get_peft_model(pico_llama(), config_of(method, "deferred", target_modules="auto"))
    set_peft_model_state_dict(fresh, saved)
    assert deferred_adapters(fresh) == []
    assert same_entries(entries(fresh), saved)
    assert kinds(fresh) == kinds(trained)
    assert torch.equal(logits(fresh), logits(trained))
    one, other = (m.peft_config["default"].to_dict() for m in (fresh, trained))
    assert one == other


def test_weights_that_lack_a_layer_do_not_start_an_adapter_whose_layers_all_have_ranks():
    options = {"rank_allocation": "explained_variance", "min_rank": 1}
    trained = started_later(LoraOneConfig, **options)
    saved = {k: v for k, v in entries(trained).items() if ".layers.1.self_attn.q_proj" not in k}
    fresh = get_peft_model(pico_llama(), config_of(LoraOneConfig, "deferred", **options))
    set_peft_model_state_dict(fresh, saved)
    assert deferred_adapters(fresh) == ["default"]


def fail_after(model, targets, left):
    """Change the ranks, note which parameters of the first layer's experts are adapted, and fail."""
    with reshaped(model, "default", targets):
        for path, module in model.named_modules():
            if isinstance(module, ParamWrapper) and ".layers.0." in path:
                left.add(f"{path.replace('.base_layer', '')}.{module.parameter_name}")
        raise KeyError


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 2), (2, 0)])
def test_experts_whose_wrappers_lie_in_one_another_lose_the_right_one(first, second):
    """The wrapper of one parameter lies in that of the other."""
    ranks = {f"model.layers.0.mlp.{name}": r for name, r in zip(BOTH, (first, second), strict=True)}
    options = {"target_modules": ["q_proj"], "target_parameters": list(BOTH), "r": 2}
    model = get_peft_model(qwen3_moe(), config_of(LoraGAConfig, "deferred", **options))
    before, were = kinds(model), dict(model.named_modules())
    targets = live_targets(model.base_model.model, "default")
    wanted = {
        name: resized(t, ranks.get(t.adapted, t.r), model.peft_config["default"])
        for name, t in targets.items()
    }
    assert set(ranks) <= {t.adapted for t in targets.values()}

    left = set()
    with pytest.raises(KeyError):
        fail_after(model.base_model.model, wanted, left)

    assert left == {name for name, r in ranks.items() if r}
    assert kinds(model) == before
    assert all(module is were[name] for name, module in model.named_modules())
