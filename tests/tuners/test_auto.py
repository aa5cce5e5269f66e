"""`target_modules="auto"`: the calibration chooses the layers, under a budget of trained numbers."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_gradinit import (
    CorDAConfig,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    PiSSAConfig,
    SVFitConfig,
    calibrate,
    init_report,
    initialize,
)
from peft_gradinit.errors import CalibrationError, ConfigError
from tests.helpers import logits, pico_gpt2, pico_llama, quiet, relative_error, token_batches
from tests.moe.models import mixtral

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),  # Conv1D beside nn.Linear
]
METHODS = (LoraGAConfig, LoraOneConfig, EvaConfig)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)


def config_of(method=LoraOneConfig, calibration=None, **options):
    values = {"r": 4, "lora_alpha": 8, "target_modules": "auto+output", "task_type": "CAUSAL_LM"}
    data = quiet(token_batches()) if calibration is None else calibration
    return method(**{**values, **options}, calibration=data)


def chosen(method=LoraOneConfig, model=None, **options):
    return get_peft_model(model or pico_llama(), config_of(method, **options))


def n_trained(peft_model):
    return peft_model.get_nb_trainable_parameters()[0]


@every_method
@pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2-tied-conv1d"])
def test_the_output_layer_is_a_candidate_and_the_numbers_are_those_of_all_linear(method, make):
    model = chosen(method, make())
    plain = chosen(method, make(), target_modules="all-linear", rank_allocation="uniform")
    ranks = init_report(model).ranks()
    assert set(ranks) == {*init_report(plain).ranks(), "lm_head"}
    dearest = sum(model.get_base_model().lm_head.weight.shape)
    assert n_trained(plain) - dearest < n_trained(model) <= n_trained(plain)
    assert max(ranks.values()) <= 16
    adapted = {n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted == {name for name, r in ranks.items() if r}


@every_method
def test_what_is_chosen_gains_most_for_its_numbers(method):
    config = config_of(method)
    result = calibrate(pico_llama(), config, quiet(token_batches()))
    model = get_peft_model(pico_llama(), config_of(method, result))
    kept, left = [], []
    for name, r in init_report(model).ranks().items():
        by = config.rank_allocation
        scores = config.needs().scores(result.readouts[name], result.energy[name], by)
        cost = sum(model.get_base_model().get_submodule(name).weight.shape)
        kept += (scores[:r] / cost).tolist()
        left += (scores[r:16] / cost).tolist()
    spare = n_trained(chosen(method, target_modules="all-linear", rank_allocation="uniform"))
    spare -= n_trained(model)
    cheapest = 48 + 24
    assert spare < cheapest or min(kept) >= max(left)  # nothing better would have fitted
    assert sorted(kept)[5] >= max(left) * 0.5


def test_the_report_says_why_each_layer_got_what_it_got():
    report = init_report(chosen())
    notes = {m.name: (m.r, m.fallback) for m in report.modules}
    r, note = notes["lm_head"]
    assert r
    assert note.startswith("r allocated, 0 asked for: ")
    assert "% of the gain for " in note
    without = [note for r, note in notes.values() if r == 0]
    assert without
    assert all(n.startswith("no rank, 4 asked for: its best gains ") for n in without)


@every_method
def test_a_saved_adapter_is_plain_lora_and_merges(method, tmp_path):
    model = chosen(method)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path)
    assert relative_error(logits(plain), logits(model)) < 1e-5
    assert relative_error(logits(plain.merge_and_unload()), logits(model)) < 1e-4


def test_a_tied_output_layer_leaves_the_embedding_alone():
    base = pico_llama(tie_word_embeddings=True)
    before = base.get_input_embeddings().weight.clone()
    model = chosen(LoraGAConfig, base)
    assert "lm_head" in init_report(model).ranks()
    assert torch.equal(model.get_input_embeddings().weight, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(pico_llama(tie_word_embeddings=True)))


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": "lm_head"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["head"]},  # PEFT compares ends of names
    ],
)
def test_an_output_layer_that_is_excluded_or_trained_in_full_is_no_candidate(options):
    assert "lm_head" not in init_report(chosen(**options)).ranks()


@every_method
def test_without_the_word_the_output_layer_is_none(method):
    model = chosen(method, target_modules="auto")
    plain = chosen(method, target_modules="all-linear", rank_allocation="uniform")
    assert set(init_report(model).ranks()) == set(init_report(plain).ranks())
    assert n_trained(plain) - 160 < n_trained(model) <= n_trained(plain)
    assert 0 in init_report(model).ranks().values()


def test_experts_are_candidates():
    report = init_report(chosen(model=mixtral()))
    names = {name.partition("[")[0] for name in report.ranks()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "lm_head" in names


def test_values_of_the_user_are_kept():
    given = {"budget": "ranks", "rho": 2, "min_rank": 1}  # the values without automatic targets
    config = config_of(**given, rank_allocation="explained_variance")
    assert {name: getattr(config, name) for name in given} == given
    assert config.rank_allocation == "explained_variance"
    usual = config_of()
    assert (usual.budget, usual.rho, usual.min_rank) == ("parameters", 4, 0)
    assert usual.rank_allocation == "gradient_energy"
    model = chosen(budget=3000)
    assert 3000 - 160 < n_trained(model) <= 3000


def test_a_budget_can_be_a_share_of_the_model():
    total = sum(p.numel() for p in pico_llama().parameters())
    model = chosen(budget=0.05)
    assert 0.05 * total - 160 < n_trained(model) <= 0.05 * total
    later = chosen(budget=0.05, calibration="deferred")
    initialize(later, quiet(token_batches()))  # its own numbers are no part of the model's
    assert init_report(later).ranks() == init_report(model).ranks()


@pytest.mark.parametrize("config_cls", [PiSSAConfig, CorDAConfig])
def test_methods_that_measure_nothing_to_choose_by_are_refused(config_cls):
    with pytest.raises(ConfigError, match=r"by which no layers can be chosen.*'all-linear'"):
        config_cls(target_modules="auto")
    with pytest.raises(ConfigError, match="SVFitConfig measures nothing, by which no layers"):
        SVFitConfig(target_modules="auto")


def test_layers_that_the_loss_does_not_reach_get_none():
    def without_head(model, batch):
        return model.model(batch["input_ids"]).last_hidden_state.square().mean()

    calibration = quiet(token_batches(), loss_fn=without_head)
    report = init_report(chosen(LoraGAConfig, calibration=calibration))
    line = next(m for m in report.modules if m.name == "lm_head")
    assert (line.r, line.method) == (0, "none")
    assert line.fallback.startswith("it never ran"), line.fallback

    def constant(model, batch):
        return model(**batch).loss * 0

    with pytest.raises(CalibrationError, match="could not calibrate"):
        chosen(LoraGAConfig, calibration=quiet(token_batches(), loss_fn=constant))
