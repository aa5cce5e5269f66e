"""`with_output_layer`: the output layer among the targets, for as many trained numbers."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_gradinit import (
    EvaConfig,
    LoraOneConfig,
    SVFitConfig,
    suggest_learning_rate,
    with_output_layer,
)
from peft_gradinit.errors import ConfigError
from tests.helpers import logits, pico_gpt2, pico_llama, quiet, token_batches
from tests.moe.models import mixtral

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # Conv1D beside nn.Linear
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys"),  # they match parameters
]
PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "names": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "expression": {"target_modules": r".*\.(up|down)_proj"},
}


def n_trained(model):
    return model.get_nb_trainable_parameters()[0]


def scalings(model):
    modules = model.get_base_model().named_modules()
    return {n: m.scaling["default"] for n, m in modules if isinstance(m, BaseTunerLayer)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_output_layer_is_adapted_for_the_same_numbers(options):
    config = LoraConfig(**{**PLAIN, **options})
    without = get_peft_model(pico_llama(), config)
    model = pico_llama()
    changed = with_output_layer(model, config)
    adapted = get_peft_model(model, changed)
    dearest = sum(model.lm_head.weight.shape)
    limit = changed.rank_pattern["lm_head"] == 4 * config.r
    assert n_trained(adapted) <= n_trained(without)
    assert limit or n_trained(adapted) > n_trained(without) - dearest
    assert scalings(adapted) == pytest.approx(
        scalings(without) | {"lm_head": next(iter(scalings(without).values()))}
    )
    assert config.r == 8  # the config that was given is as it was
    assert not config.rank_pattern


@pytest.mark.parametrize("make", [pico_gpt2, mixtral], ids=["gpt2-tied-conv1d", "mixtral"])
def test_layers_of_every_kind_keep_their_adapters(make, tmp_path):
    without = get_peft_model(make(), LoraConfig(**PLAIN))  # PEFT may write patterns into it
    model = make()
    adapted = get_peft_model(model, with_output_layer(model, LoraConfig(**PLAIN)))
    assert scalings(adapted).keys() == scalings(without).keys() | {"lm_head"}
    assert n_trained(adapted) <= n_trained(without)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))


def test_a_type_with_a_calibration_takes_it_too():
    model = pico_llama()
    config = LoraOneConfig(**PLAIN, calibration=quiet(token_batches()))
    adapted = get_peft_model(model, with_output_layer(model, config))
    assert "lm_head" in scalings(adapted)
    assert suggest_learning_rate(adapted).suggested > 0
    assert adapted.get_base_model().lm_head.lora_B["default"].weight.any()  # its own start


def test_a_dear_output_layer_takes_more_than_one_rank():
    model = pico_llama(vocab_size=4096)
    config = LoraConfig(**{**PLAIN, "target_modules": ["q_proj"]})
    changed = with_output_layer(model, LoraConfig(**PLAIN))
    assert 1 <= changed.r < 7
    assert changed.lora_alpha == 2 * changed.r
    with pytest.raises(ConfigError, match=r"cannot pay for it.*raise r, or name more layers"):
        with_output_layer(model, config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),  # PEFT compares ends of names
        ({"exclude_modules": ["lm_head"]}, r"exclude_modules=.* keeps lm_head without an adapter"),
        ({"exclude_modules": "lm_h.*"}, "exclude_modules='lm_h.*' keeps lm_head without"),
        ({"target_modules": ["q_proj", "lm_head"]}, "name lm_head already"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ],
)
def test_what_it_cannot_share_out_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        with_output_layer(pico_llama(), LoraConfig(**{**PLAIN, **options}))


@pytest.mark.parametrize(
    "options", [{"target_modules": "auto"}, {"rank_allocation": "gradient_energy"}]
)
def test_ranks_of_a_calibration_are_refused(options):
    config = LoraOneConfig(**{**PLAIN, **options}, calibration=quiet(token_batches()))
    with pytest.raises(ConfigError, match="target_modules='auto\\+output'"):
        with_output_layer(pico_llama(), config)


@pytest.mark.parametrize(
    "config", [SVFitConfig(), IA3Config(), pico_llama()], ids=lambda c: type(c).__name__
)
def test_a_config_without_ranks_is_refused(config):
    with pytest.raises(ConfigError, match=f"expects a LoraConfig.*got {type(config).__name__}"):
        with_output_layer(pico_llama(), config)


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(ConfigError, match="no linear output layer"):
        with_output_layer(pico_llama().model, LoraConfig(**PLAIN))


def test_a_second_layer_of_that_name_gets_no_adapter():
    """In a list, PEFT takes a name for the end of others."""

    def with_draft():
        model = pico_llama()
        model.draft = nn.Module()
        model.draft.lm_head = nn.Linear(*model.lm_head.weight.shape[::-1], bias=False)
        return model

    config = LoraConfig(**{**PLAIN, "target_modules": ["q_proj", "v_proj"]})
    model = with_draft()
    adapted = get_peft_model(model, with_output_layer(model, config))
    assert "lm_head" in scalings(adapted)
    assert "draft.lm_head" not in scalings(adapted)
    assert n_trained(adapted) <= n_trained(get_peft_model(with_draft(), config))


def test_a_second_adapter_adapts_the_output_layer_as_well():
    config = LoraConfig(**PLAIN)
    model = get_peft_model(pico_llama(), LoraConfig(**PLAIN))
    second, want = with_output_layer(model, config), with_output_layer(pico_llama(), config)
    assert second.rank_pattern == want.rank_pattern
    model.add_adapter("second", second)
    model.set_adapter("second")
    alone = get_peft_model(pico_llama(), want)
    assert n_trained(model) == n_trained(alone)


def test_a_start_whose_output_is_not_finite_is_told():
    """PEFT's DoRA divides by the norm of a row of the weight, and padded vocabularies have rows of zeros."""
    model = pico_llama()
    with torch.no_grad():
        model.lm_head.weight[-1] = 0
    options = {"r": 2, "target_modules": ["lm_head"], "use_dora": True}
    with pytest.warns(UserWarning, match="with the start of the adapter it is not.*row of zeros"):
        get_peft_model(model, EvaConfig(**options, calibration=quiet(token_batches())))
