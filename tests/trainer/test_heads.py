"""The learning rate of a head that is trained in full: from the sizes of its inputs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer

from peft_gradinit import CalibrationCallback, LoraOneConfig, init_report, suggest_learning_rate
from peft_gradinit.errors import ConfigError, DataError
from peft_gradinit.optim import optimizer
from tests.helpers import VOCABULARY, pico_llama
from tests.trainer.runs import same_state, trainer_of
from tests.trainer.trl_runs import config_of as trl_config_of
from tests.trainer.trl_runs import trainer_of as trl_trainer_of

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
N_CLASSES = 5


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 13, (n,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(1, VOCABULARY, (length,), generator=generator),
            "labels": torch.randint(N_CLASSES, (1,), generator=generator),
        }
        for length in lengths
    ]


def collate(some, padding=0):
    width = max(len(row["input_ids"]) for row in some) + padding
    ids = torch.zeros(len(some), width, dtype=torch.long)
    for i, row in enumerate(some):
        ids[i, : len(row["input_ids"])] = row["input_ids"]
    labels = torch.cat([row["labels"] for row in some])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def classifier(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_labels=N_CLASSES,
        pad_token_id=0,
        **{**sizes, "attention_dropout": 0.1, **options},
    )
    return LlamaForSequenceClassification(config)


def lora(model=None, **options):
    config = LoraConfig(**{**LORA, "task_type": "SEQ_CLS", **options})
    return get_peft_model(classifier() if model is None else model, config)


def sizes_of_inputs(model, data):
    """The sums of the absolute inputs of the head, at the last token of every row alone."""
    found = []
    model.eval()
    for row in data:
        with torch.no_grad():
            hidden = model.get_base_model().model(row["input_ids"][None]).last_hidden_state
        found.append(hidden[0, -1].abs().sum())
    return torch.stack(found)


def run(tmp_path, model, data, rate="suggested", **options):
    options = {"cls": Trainer, "collator": collate, "learning_rate": 1e-3, **options}
    trainer = trainer_of(tmp_path, model=model, data=data, **options)
    trainer.add_callback(CalibrationCallback(trainer, head_learning_rate=rate))
    trainer.train()
    return trainer


def rates_of(trainer):
    """The initial rates of the head and of the rest."""
    heads = {id(p) for n, p in trainer.model.named_parameters() if "modules_to_save" in n}
    of = {True: set(), False: set()}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            of[id(p) in heads].add(group["initial_lr"])
    return sorted(of[True]), sorted(of[False])


@pytest.mark.parametrize("padding", [0, 7])
def test_the_rate_is_one_over_the_size_of_the_inputs_in_the_loss(padding, tmp_path):
    model, data = lora(), rows(16)
    want = 1 / sizes_of_inputs(model, data).mean().item()  # 4 batches of 4: all rows
    trainer = run(tmp_path, model, data, collator=lambda some: collate(some, padding))
    assert 5e-3 < want < 1e-1
    assert rates_of(trainer) == ([pytest.approx(want, rel=1e-4)], [1e-3])
    logged = [e for e in trainer.state.log_history if "calibration/head_learning_rate" in e]
    assert [e["calibration/head_learning_rate"] for e in logged] == [pytest.approx(want, rel=1e-4)]


def test_the_first_step_of_adam_moves_every_output_by_one(tmp_path):
    model = lora(classifier(attention_dropout=0.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "modules_to_save" in name  # so that only the head moves it
    row = rows(1)
    model.eval()
    with torch.no_grad():
        before = model(**collate(row)).logits
    run(tmp_path, model, row, max_steps=1, lr_scheduler_type="constant")
    model.eval()
    with torch.no_grad():
        moved = model(**collate(row)).logits - before
    assert moved.abs().squeeze() == pytest.approx(torch.ones(N_CLASSES), rel=1e-3)


def test_the_rate_is_not_below_that_of_the_adapter(tmp_path):
    trainer = run(tmp_path, lora(), rows(16), learning_rate=0.5, max_steps=1)
    assert rates_of(trainer) == ([0.5], [0.5])


@pytest.mark.parametrize("kind", ["plain", "deferred"])
def test_both_rates_can_be_suggested(kind, tmp_path):
    config = LoraOneConfig(**LORA, task_type="SEQ_CLS", calibration="deferred")
    model = lora() if kind == "plain" else get_peft_model(classifier(), config)
    trainer = trainer_of(tmp_path, model=model, cls=Trainer, data=rows(16), collator=collate)
    rates = {"learning_rate": "suggested", "head_learning_rate": "suggested"}
    trainer.add_callback(CalibrationCallback(trainer, **rates))
    trainer.train()
    report = init_report(model)
    want = (report.learning_rate if report else suggest_learning_rate(model)).suggested
    head, rest = rates_of(trainer)
    assert rest == [want]
    assert len(head) == 1
    assert head[0] > want


def test_a_deferred_adapter_has_its_start_before_the_head_is_looked_at(tmp_path):
    config = LoraOneConfig(**LORA, task_type="SEQ_CLS", calibration="deferred")
    trainer = run(tmp_path, get_peft_model(classifier(), config), rows(16), learning_rate=1e-2)
    assert init_report(trainer.model) is not None
    assert rates_of(trainer)[1] == [1e-2]


def test_the_search_for_the_rate_leaves_no_trace(tmp_path):
    found = run(tmp_path, lora(lora_dropout=0.1), rows(16))
    (rate,) = rates_of(found)[0]
    given = run(tmp_path, lora(lora_dropout=0.1), rows(16), rate)
    assert same_state(found.model.state_dict(), given.model.state_dict())
    assert not any(m._forward_hooks for m in found.model.modules())


def test_of_several_layers_the_lowest_rate_counts(tmp_path):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(48, 48), nn.Linear(48, N_CLASSES, bias=False)

        def forward(self, hidden):
            return self.out(torch.tanh(self.first(hidden)) / 10)

    model = classifier()
    model.score = Deep()
    model = lora(model)
    data = rows(16)
    want = 1 / sizes_of_inputs(model, data).mean().item()  # the first layer's inputs are larger
    assert rates_of(run(tmp_path, model, data))[0] == [pytest.approx(want, rel=1e-4)]


def test_what_is_no_linear_layer_has_no_suggested_rate(tmp_path):
    model = lora(modules_to_save=["score", "embed_tokens"])
    with pytest.raises(
        ConfigError, match=r"new heads of linear layers, but .*embed_tokens has none"
    ):
        run(tmp_path, model, rows(16))
    nothing = lora(task_type=None)
    with pytest.raises(
        ConfigError, match=r"head_learning_rate=suggested is for modules .*has none"
    ):
        run(tmp_path, nothing, rows(16))


def test_a_head_that_the_loss_does_not_depend_on_is_named(tmp_path):
    class Elsewhere(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs) * 0

    with pytest.raises(
        DataError, match=r"no input of a head takes part in the loss of the first 4"
    ):
        run(tmp_path, lora(), rows(16), cls=Elsewhere)


def test_a_head_whose_weight_alone_is_read_is_not_blamed_on_the_labels(tmp_path):
    class FromTheWeight(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            plain = model.get_base_model()
            labels = inputs.pop("labels")
            hidden = plain.model(**inputs).last_hidden_state[:, 0]
            weight = plain.score.modules_to_save["default"].weight
            return nn.functional.cross_entropy(hidden @ weight.T, labels)

    with pytest.raises(ConfigError, match=r"FromTheWeight computes its loss from their weights"):
        run(tmp_path, lora(), rows(16), cls=FromTheWeight)


def test_trainings_without_a_suggested_rate_are_refused_at_once(tmp_path):
    trainer = trl_trainer_of("dpo", tmp_path, peft_config=trl_config_of("LoRA-One"))
    with pytest.raises(ConfigError, match="is for supervised training, not for DPOTrainer"):
        CalibrationCallback(trainer, head_learning_rate="suggested")
    trainer = trainer_of(tmp_path, model=lora(), cls=Trainer, data=rows(4), collator=collate)
    trainer.optimizer_cls_and_kwargs = optimizer("lora_muon", lr=0.03, head_lr=1e-2)
    with pytest.raises(ConfigError, match=r"for Adam and its kin, but the trainer makes .*head_lr"):
        CalibrationCallback(trainer, head_learning_rate="suggested")
    trainer = trainer_of(tmp_path, model=lora(), cls=Trainer, data=rows(4), collator=collate)
    with pytest.raises(ConfigError, match="positive number or 'suggested', got 'best'"):
        CalibrationCallback(trainer, head_learning_rate="best")
    trainer.is_fsdp_enabled = True
    with pytest.raises(ConfigError, match="and FSDP shards it; give a number"):
        CalibrationCallback(trainer, head_learning_rate="suggested")


def test_an_output_layer_in_full_counts_tokens_with_loss(tmp_path):
    model = get_peft_model(pico_llama(), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    trainer = trainer_of(tmp_path, model=model, cls=Trainer, learning_rate=1e-4)
    trainer.add_callback(CalibrationCallback(trainer, head_learning_rate="suggested"))
    trainer.train()
    (rate,) = rates_of(trainer)[0]
    assert 1e-2 < rate < 1e-1  # 48 inputs of a size near one


@pytest.mark.parametrize("rate", [0.3, "suggested"])
def test_trained_tokens_are_no_head(rate, tmp_path):
    """Their rows train at the adapter's rate."""
    config = LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    trainer = trainer_of(tmp_path, model=get_peft_model(pico_llama(), config), cls=Trainer)
    trainer.add_callback(CalibrationCallback(trainer, head_learning_rate=rate))
    trainer.train()
    tokens = {p.data_ptr() for n, p in trainer.model.named_parameters() if "token_adapter" in n}
    assert tokens
    heads = trainer.optimizer.param_groups[-1]["params"]
    assert [tuple(p.shape) for p in heads] == [(VOCABULARY, 48)]
    assert not tokens & {p.data_ptr() for p in heads}
