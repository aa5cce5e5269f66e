"""The config that the user passed is the one that the model has; live state is beside it."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
)

from peft_gradinit import (
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    PiSSAConfig,
    SVFitConfig,
    export_adapter,
    init_report,
    initialize,
    load_for_training,
    suggest_learning_rate,
)
from peft_gradinit.records import records_of
from tests.helpers import (
    logits,
    lora_ga,
    pico_llama,
    quiet,
    relative_error,
    token_batches,
    train_steps,
)

TYPES = [LoraGAConfig, LoraOneConfig, EvaConfig, PiSSAConfig, SVFitConfig]
every_type = pytest.mark.parametrize("config_cls", TYPES)
IDS = torch.randint(4, 60, (4, 10), generator=torch.Generator().manual_seed(0))
TASKS = {
    "TOKEN_CLS": (BertForTokenClassification, 5, {"input_ids": IDS, "labels": IDS % 5}),
    "QUESTION_ANS": (
        BertForQuestionAnswering,
        2,
        {"input_ids": IDS, "start_positions": IDS[:, 0] % 10, "end_positions": IDS[:, 1] % 10},
    ),
}


def config_of(config_cls, data, **options):
    needs_data = config_cls not in (PiSSAConfig, SVFitConfig)
    more = {"calibration": quiet(data)} if needs_data else {}
    return config_cls(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options}, **more)


def options_of(config):
    return {f.name: copy.copy(getattr(config, f.name)) for f in dataclasses.fields(config)}


@every_type
def test_the_users_object_is_the_one_in_the_model(config_cls):
    config = config_of(config_cls, token_batches())
    model = get_peft_model(pico_llama(), config)
    assert model.peft_config["default"] is config
    assert model.base_model.peft_config["default"] is config
    assert model.base_model.model.peft_config["default"] is config


@every_type
def test_an_injection_changes_only_what_peft_changes_in_a_lora_config(config_cls):
    config = config_of(config_cls, token_batches(), target_modules="all-linear")
    before = options_of(config)
    get_peft_model(pico_llama(), config)
    changed = {n for n, v in options_of(config).items() if v != before[n]}
    assert changed <= {"target_modules", "base_model_name_or_path"}


@every_type
@pytest.mark.parametrize("task", TASKS)
def test_task_models_write_to_it_and_their_heads_train_and_save(config_cls, task, tmp_path):
    """PEFT sets `modules_to_save` on the user's object after the injection."""
    cls, n_labels, batch = TASKS[task]

    def base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = BertConfig(vocab_size=64, intermediate_size=64, num_labels=n_labels, **sizes)
        return cls(config).eval()

    options = {"target_modules": ["query", "value"], "task_type": task}
    model = get_peft_model(base(), config_of(config_cls, [batch], **options)).eval()
    heads = [n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert heads
    with torch.no_grad():
        for name in heads:
            model.get_parameter(name).add_(0.1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model(input_ids=IDS)[0]
        for loaded in (
            PeftModel.from_pretrained(base(), tmp_path),
            load_for_training(base(), tmp_path),
        ):
            assert relative_error(loaded.eval()(input_ids=IDS)[0], want) <= 1e-5


def test_one_config_serves_two_models_whose_layers_get_different_ranks(tmp_path):
    options = {"rank_allocation": "gradient_energy", "rho": 2, "target_modules": "all-linear"}
    config = config_of(LoraGAConfig, token_batches(), **options)
    models = [get_peft_model(pico_llama(seed), config) for seed in (0, 1)]
    reports = [init_report(model).ranks() for model in models]
    assert reports[0] != reports[1]
    for seed, model in enumerate(models):  # the one that was made first is saved first
        train_steps(model)
        model.save_pretrained(tmp_path / str(seed))
        loaded = PeftModel.from_pretrained(pico_llama(seed), tmp_path / str(seed))
        for name, r in reports[seed].items():
            assert loaded.base_model.model.get_submodule(name).r["default"] == 2 * r


@pytest.mark.parametrize("targets", ["auto", "auto+output", "all-linear"])
@pytest.mark.parametrize("order", [(1, 3), (3, 1)])
def test_a_word_for_targets_means_the_layers_of_every_model(targets, order, tmp_path):
    """Though PEFT writes names for it into the config; each adapter is saved with its own."""
    options = {"task_type": "CAUSAL_LM", "target_modules": targets}
    config = config_of(LoraOneConfig, token_batches(), **options)
    models = [get_peft_model(pico_llama(num_hidden_layers=n), config) for n in order]
    for n, model in zip(order, models, strict=True):
        fresh = config_of(LoraOneConfig, token_batches(), **options)
        want = get_peft_model(pico_llama(num_hidden_layers=n), fresh)
        assert init_report(model).ranks() == init_report(want).ranks()
        model.save_pretrained(tmp_path / str(n), save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(pico_llama(num_hidden_layers=n), tmp_path / str(n))
        assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    names = ["q_proj", "v_proj"]
    config.target_modules = names
    again = get_peft_model(pico_llama(num_hidden_layers=2), config)
    assert {name.rpartition(".")[2] for name in init_report(again).ranks()} == set(names)


def test_a_word_for_targets_of_svfit_means_the_layers_of_every_model():
    config = config_of(SVFitConfig, None, target_modules="all-linear", task_type="CAUSAL_LM")
    for n in (1, 2):
        model = get_peft_model(pico_llama(num_hidden_layers=n), config)
        assert len(records_of(model)["default"].ranks) == 7 * n


@every_type
def test_a_config_that_was_never_injected_is_saved_as_it_is(config_cls, tmp_path):
    config = config_of(config_cls, token_batches())
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is config_cls
    assert again.r == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json"]


def test_a_deferred_adapter_has_a_record_without_a_report_until_it_starts():
    model = get_peft_model(pico_llama(), lora_ga(calibration="deferred"))
    record = records_of(model)["default"]
    assert (record.report, record.fingerprint) == (None, None)
    assert init_report(model) is None
    report = initialize(model, quiet(token_batches()))
    assert init_report(model) is record.report is report
    assert set(record.ranks.values()) == {4}


def test_a_deleted_or_failed_adapter_leaves_no_record():
    model = get_peft_model(pico_llama(), lora_ga())
    model.add_adapter("second", lora_ga())
    assert set(records_of(model)) == {"default", "second"}
    model.delete_adapter("second")
    assert set(records_of(model)) == {"default"}
    with pytest.raises(RuntimeError, match="mine"):
        model.add_adapter("third", lora_ga(calibration=quiet(token_batches(), loss_fn=failing)))
    assert set(records_of(model)) == set(model.peft_config) == {"default"}


def test_an_adapter_that_transformers_deletes_leaves_nothing_to_one_of_its_name():
    model, fresh = pico_llama(), pico_llama()
    model.add_adapter(config_of(PiSSAConfig, None), "first")
    assert init_report(model, "first")
    model.delete_adapter("first")
    assert init_report(model, "first") is None
    for host in (model, fresh):
        host.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=["k_proj"]), "first")
    assert init_report(model, "first") is None
    rates = [suggest_learning_rate(host, "first") for host in (model, fresh)]
    assert rates[0] == rates[1]


def failing(model, batch):
    raise RuntimeError("mine")


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("config_cls", [PiSSAConfig, SVFitConfig])
def test_nothing_is_known_of_an_adapter_that_was_taken_out(config_cls, how, tmp_path):
    first = get_peft_model(pico_llama(), config_of(config_cls, None))
    base = getattr(first, how)()
    assert records_of(base) == {}
    plain = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"])
    second = get_peft_model(base, plain)
    fresh = get_peft_model(pico_llama(), copy.copy(plain))
    assert init_report(second) is None
    assert suggest_learning_rate(second) == suggest_learning_rate(fresh)
    assert len(export_adapter(second, tmp_path / "out").layers) == 2


def test_records_are_copied_with_the_model():
    model = get_peft_model(pico_llama(), lora_ga())
    twin = copy.deepcopy(model)
    assert records_of(twin)["default"] is not records_of(model)["default"]
    assert init_report(twin).ranks() == init_report(model).ranks()
