"""Heads that are trained in full beside the adapter: left out of the targets, and put back by `unload`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from peft_gradinit import LoraGAConfig, LoraOneConfig, initialize, load_for_training
from peft_gradinit.errors import ConfigError, DataError, TargetError
from tests.helpers import base_weights, quiet, same_weights
from tests.methods.rows import config_of, every_method, started

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 20}


def bert(kind, **options):
    torch.manual_seed(0)
    return kind(BertConfig(**SMALL, **options)).eval()


def roberta(n_labels=3):
    torch.manual_seed(0)
    config = RobertaConfig(**SMALL, num_labels=n_labels, pad_token_id=0)
    return RobertaForSequenceClassification(config).eval()


def distilbert():
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3
    )
    return DistilBertForSequenceClassification(config).eval()


def batches(**labels):
    torch.manual_seed(1)
    ids = [torch.randint(1, 50, (4, 6)) for _ in range(3)]
    return [
        {"input_ids": x, "attention_mask": torch.ones_like(x)}
        | {name: label(x) for name, label in labels.items()}
        for x in ids
    ]


BY_ROW = batches(labels=lambda x: x[:, 0] % 3)
BY_TOKEN = batches(labels=lambda x: x % 3)
SPANS = batches(start_positions=lambda x: x[:, 0] % 6, end_positions=lambda x: x[:, 1] % 6)
TASKS = {
    "TOKEN_CLS": (lambda: bert(BertForTokenClassification, num_labels=3), BY_TOKEN, "classifier"),
    "QUESTION_ANS": (lambda: bert(BertForQuestionAnswering), SPANS, "qa_outputs"),
    "SEQ_CLS": (distilbert, BY_ROW, "pre_classifier"),
}
every_task = pytest.mark.parametrize("task", TASKS)


def classifier(method, model=None):
    """A classifier of rows whose head has two layers, with an adapter."""
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    data = {"data": quiet(BY_ROW)}
    return started(method, model or roberta(), **options, **data)


def trained(peft_model):
    """Every trained number moved."""
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)
    return peft_model.eval()


@every_method
def test_unload_gives_the_base_with_the_head_that_it_had(method):
    model = roberta()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    unloaded = trained(classifier(method, model)).unload()
    assert unloaded is model
    after = unloaded.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    again = classifier(method, unloaded)
    with again.disable_adapter(), torch.no_grad():
        got, want = again(**BY_ROW[0]).logits, roberta()(**BY_ROW[0]).logits
    assert torch.equal(got, want)


@every_method
def test_merging_keeps_the_head_that_was_trained(method):
    peft_model = trained(classifier(method))
    with torch.no_grad():
        want = peft_model(**BY_ROW[0]).logits
        got = peft_model.merge_and_unload()(**BY_ROW[0]).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@every_method
def test_loading_that_fails_leaves_the_base_as_it_was(method, tmp_path):
    trained(classifier(method)).save_pretrained(tmp_path)
    model = roberta(n_labels=2)
    before = base_weights(model)
    with pytest.raises(DataError, match=r"have other shapes than .*classifier"):
        load_for_training(model, tmp_path)
    assert base_weights(model).keys() == before.keys()
    assert same_weights(before, base_weights(model))
    assert not any(isinstance(m, ModulesToSaveWrapper) for m in model.modules())


def deferred(method):
    """A deferred adapter of a classifier whose head is not the base's any more."""
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    peft_model = get_peft_model(roberta(), method(**options, calibration="deferred"))
    head = next(m for m in peft_model.modules() if isinstance(m, ModulesToSaveWrapper))
    with torch.no_grad():
        for p in head.modules_to_save["default"].parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return peft_model


@torch.no_grad()
def loss_of(model):
    return sum(model(**batch).loss.item() for batch in BY_ROW) / len(BY_ROW)


@pytest.mark.parametrize("method", [LoraGAConfig, LoraOneConfig])
def test_a_deferred_start_is_measured_with_the_adapters_own_head(method):
    peft_model = deferred(method)
    before = loss_of(peft_model)
    report = initialize(peft_model, quiet(BY_ROW))
    assert abs(before - loss_of(roberta())) > 0.1
    assert report.facts.loss == pytest.approx(before, rel=1e-5)
    if report.step is not None:
        assert report.step.loss_before == pytest.approx(before, rel=1e-5)
        assert report.step.loss_after == pytest.approx(loss_of(peft_model), rel=1e-5)


@every_task
@pytest.mark.parametrize("method", [LoraGAConfig, LoraOneConfig])
def test_automatic_targets_leave_the_head_out(task, method):
    make, data, head = TASKS[task]
    options = {"r": 2, "lora_alpha": 4, "task_type": task}
    config = method(**options, target_modules="auto", calibration=quiet(data))
    peft_model = get_peft_model(make(), config)
    assert isinstance(peft_model.base_model.model.get_submodule(head), ModulesToSaveWrapper)
    plain = LoraConfig(**options, target_modules="all-linear", exclude_modules=[head])
    n_trained = peft_model.get_nb_trainable_parameters()[0]
    n_of_lora = get_peft_model(make(), plain).get_nb_trainable_parameters()[0]
    assert 0.8 * n_of_lora <= n_trained <= n_of_lora


class Counted:
    """Data that know how many batches were read."""

    def __init__(self, data):
        self.data, self.n_read = data, 0

    def __iter__(self):
        for batch in self.data:
            self.n_read += 1
            yield batch


@every_task
@every_method
def test_targets_that_are_trained_in_full_are_refused_before_data_are_read(task, method):
    make, data, head = TASKS[task]
    counted = Counted(data)
    config = config_of(method, quiet(counted), r=2, task_type=task)
    with pytest.raises(TargetError, match=rf"trains {head} in full.*add '{head}' to exclude"):
        get_peft_model(make(), config)
    assert counted.n_read == 0


@every_method
@pytest.mark.parametrize("by_name", [True, False])
def test_nothing_is_converted_for_an_initial_model(method, by_name, tmp_path):
    peft_model = classifier(method)
    initial = tmp_path / "initial"
    peft_model.save_pretrained(initial)
    before = {path.name: path.read_bytes() for path in initial.iterdir()}
    given = {"path_initial_model_for_weight_conversion": str(initial)}
    positional = () if by_name else (True, None, "auto", True, str(initial))
    with pytest.raises(ConfigError, match="its file is plain LoRA for that model already"):
        peft_model.save_pretrained(tmp_path / "out", *positional, **(given if by_name else {}))
    if by_name:
        assert {path.name: path.read_bytes() for path in initial.iterdir()} == before
        assert not (tmp_path / "out").exists()
