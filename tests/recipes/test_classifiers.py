"""Reviews with stars, and longer than the model: recipes and the command line take them as they are."""

import json

import datasets
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

from peft_gradinit import LoraGAConfig
from peft_gradinit.errors import ConfigError, DataError
from peft_gradinit.recipes import Reader, finetune, load_rows
from peft_gradinit.recipes.collation import collator
from peft_gradinit.recipes.schema import Recipe
from peft_gradinit_cli.work.jobs import RECORD_NAME
from tests.cli.conftest import run as command  # noqa: F401
from tests.recipes.classifiers import N_POSITIONS, SIZES, save_classifier, tokenizer

pytestmark = [
    # Older datasets leave it to the garbage collector to close a CSV.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
    ),
    # The query of a single layer sees one input, that of the first token.
    pytest.mark.filterwarnings("ignore:the calibration found fewer directions"),
]

KINDS = ("bert", "roberta", "gpt2-classifier")

LAYERS = r".*\.(query|value|c_attn)"


def reviews(folder, labels, name="reviews.csv"):
    """Every second one is longer than the model."""
    texts = ["it was a good film", "a bad film " * N_POSITIONS] * len(labels)
    rows = {"review": texts[: 2 * len(labels)], "stars": [label for label in labels for _ in "ab"]}
    path = str(folder / name)
    datasets.Dataset.from_dict(rows).to_csv(path)
    return path


def recipe(tmp_path, model, data, **sections):
    values = {
        "version": 1,
        "title": "reviews",
        "output": str(tmp_path / "out"),
        "model": {"name": model},
        "data": {"text": "review", "label": "stars", **data},
        "method": {"name": "lora_ga", "r": 2, "target_modules": LAYERS},
        "training": {"learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": 4},
    }
    return Recipe.model_validate(values | sections)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe(kind, tmp_path):
    path = reviews(tmp_path, [5, 1, 2] * 3)
    folder = save_classifier(tmp_path / "model", kind)
    asked = recipe(
        tmp_path,
        folder,
        {"path": path, "n_eval": 6},
        evaluation={"metrics": ["accuracy"]},
        export={"targets": ["merged"]},
    )
    results = finetune(asked)
    assert results["labels"] == ["1", "2", "5"]
    assert results["recipe"]["data"]["max_length"] == N_POSITIONS
    assert 0 <= results["metrics"]["metric_accuracy"] <= 1
    merged = AutoConfig.from_pretrained(tmp_path / "out" / "merged")
    assert merged.id2label == {0: "1", 1: "2", 2: "5"}
    assert merged.label2id == {"1": 0, "2": 1, "5": 2}


BEST = {
    "learning_rate": 1e-3,
    "max_steps": 2,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "logging_steps": 1,
}


@pytest.mark.parametrize("name", ["accuracy", "eval_macro_f1", "loss"])
def test_the_best_checkpoint_is_chosen_by_a_metric_of_the_evaluation(name, tmp_path):
    folder = save_classifier(tmp_path / "model")
    data = {"path": reviews(tmp_path, [5, 1, 2] * 3), "n_eval": 6}
    metrics = {"metrics": ["accuracy", "macro_f1"], "steps": 1}
    training = {**BEST, "metric_for_best_model": name}
    results = finetune(recipe(tmp_path, folder, data, training=training, evaluation=metrics))
    assert results["metrics"].keys() == {"loss", "metric_accuracy", "metric_macro_f1"}
    state = json.loads(
        (tmp_path / "out" / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text()
    )
    logged = [entry for entry in state["log_history"] if "eval_loss" in entry]
    key = f"eval_{name.removeprefix('eval_')}"
    best = (min if name == "loss" else max)(entry[key] for entry in logged)
    assert state["best_metric"] == best


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ({}, [1, 2]),
        ({"load_best_model_at_end": False}, [1, 2]),
        ({"max_steps": 3, "save_steps": 2, "load_best_model_at_end": False}, [2, 3]),
    ],
)
def test_a_step_has_the_one_evaluation_loss_of_its_model(more, steps, tmp_path):
    folder = save_classifier(tmp_path / "model")
    data = {"path": reviews(tmp_path, [5, 1, 2] * 3), "n_eval": 6}
    training = {**BEST, **more}
    evaluation = {"metrics": [], "steps": training["save_steps"]}
    results = finetune(recipe(tmp_path, folder, data, training=training, evaluation=evaluation))
    assert [step for step, _ in results["eval_losses"]] == steps
    last = tmp_path / "out" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    logged = json.loads(last.read_text())["log_history"]
    in_training = [[e["step"], e["eval_loss"]] for e in logged if "eval_loss" in e]
    assert results["eval_losses"][: len(in_training)] == in_training


def test_a_best_checkpoint_by_what_is_not_measured_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)
    folder = save_classifier(tmp_path / "model")
    data = {"path": reviews(tmp_path, [5, 1, 2] * 3), "n_eval": 6}
    metrics = {"metrics": ["accuracy"], "steps": 1}
    training = {**BEST, "metric_for_best_model": "acuracy"}
    with pytest.raises(
        ConfigError,
        match=r"metric_for_best_model='acuracy' is not measured in training, but \['loss', 'accuracy'\] "
        "are, did you mean 'accuracy'.*add it to evaluation.metrics",
    ):
        finetune(recipe(tmp_path, folder, data, training=training, evaluation=metrics))


def test_a_label_of_the_evaluation_alone_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)
    folder = save_classifier(tmp_path / "model")
    data = {"path": reviews(tmp_path, ["good", "bad"]), "eval_split": "test"}
    data["eval_path"] = reviews(tmp_path, ["bad", "awful"], "more.csv")
    with pytest.raises(
        DataError, match=r"the label 'awful' in column 'stars' is none .* bad, good"
    ):
        finetune(recipe(tmp_path, folder, data))


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_all_that_a_checkpoint_lacks_is_trained(kind, tmp_path, command):  # noqa: F811
    """Language models lack the layer before the head, too: BERT's pooler, say."""
    folder, path = tmp_path / "model", reviews(tmp_path, [5, 1, 2] * 3)
    tokenizer().save_pretrained(folder)
    if kind == "bert":
        BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder)
        before = "bert.pooler.dense"
    else:
        small = DistilBertConfig(vocab_size=9, dim=16, hidden_dim=16, n_layers=1, n_heads=2)
        DistilBertForMaskedLM(small).save_pretrained(folder)
        before = "pre_classifier"
    method = {"name": "lora_ga", "r": 2}  # of all linear layers
    asked = recipe(tmp_path, str(folder), {"path": path, "n_eval": 6}, method=method)
    model = asked.model.model_copy(update={"task": "SEQ_CLS"})
    finetune(asked.model_copy(update={"model": model}))
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    new = {f"base_model.model.{n}.{p}" for n in (before, "classifier") for p in ("weight", "bias")}
    assert {key for key in saved if "classifier" in key or "pooler" in key} == new
    line = [str(folder), path, str(tmp_path / "c"), "--task", "SEQ_CLS", "--text", "review"]
    said = command("calibrate", *line, "--label", "stars", "--json").json["config"]
    assert said["modules_to_save"] == [before]  # PEFT adds the other one
    load = AutoModelForSequenceClassification.from_pretrained
    config = LoraGAConfig(**said)  # as it is printed
    torch.manual_seed(0)  # that of recipes: the calibration is of one head
    assert get_peft_model(load(folder, num_labels=3), config).peft_config["default"].r == 8


def test_rows_are_padded_with_what_the_model_knows_as_padding(tmp_path):
    """A decoder classifies the last token that is no padding, alone or beside a longer text."""
    folder = tmp_path / "model"
    save_classifier(folder, "gpt2-classifier", pad_token_id=0)  # its tokenizer names none
    path = reviews(tmp_path, [5, 1] * 3)
    asked = recipe(tmp_path, str(folder), {"path": path, "n_eval": 2})
    reader = Reader.of(asked.model, asked.data, load_rows(asked.data))
    assert reader.processor.pad_token_id == 0
    model = reader.load_model(asked.model).eval()
    rows = [{"input_ids": ids, "labels": 0} for ids in ([3, 4], [3, 4, 5, 6])]
    alone, beside = (collator(reader.processor)(part) for part in (rows[:1], rows))
    assert torch.allclose(model(**alone).logits[0], model(**beside).logits[0], atol=1e-5)
    other = tokenizer()  # one that has another padding than the model
    other.pad_token = "</s>"
    other.save_pretrained(folder)
    reader = Reader.of(asked.model, asked.data, load_rows(asked.data))
    assert reader.load_model(asked.model).config.pad_token_id == 2


def test_a_metric_of_texts_is_not_for_classes(tmp_path, monkeypatch):
    folder = save_classifier(tmp_path / "model")
    data = {"path": reviews(tmp_path, [5, 1, 2] * 3), "n_eval": 6}
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)  # told before
    with pytest.raises(ConfigError, match="'exact_match' is not for classes, which are compared"):
        finetune(recipe(tmp_path, folder, data, evaluation={"metrics": ["exact_match"]}))


def test_quantities(tmp_path):
    folder = save_classifier(tmp_path / "model")
    data = {"path": reviews(tmp_path, [0.5, 2.0, 4.5]), "n_eval": 2, "label_kind": "number"}
    results = finetune(recipe(tmp_path, folder, data))
    assert results["labels"] == ["stars"]
    asked = recipe(tmp_path, folder, data, evaluation={"metrics": ["accuracy"]})
    with pytest.raises(ConfigError, match="'accuracy' is not for numbers, which are compared"):
        finetune(asked)


def test_generation_must_fit_into_the_positions(tmp_path):
    folder = save_classifier(tmp_path / "model", "gpt2")
    data = {"path": reviews(tmp_path, [1, 2]), "n_eval": 2, "prompt": "review"}
    data |= {"completion": "stars", "text": None, "label": None, "max_length": 20}
    asked = recipe(
        tmp_path, folder, data, evaluation={"metrics": ["exact_match"], "max_new_tokens": 8}
    )
    said = r"max_length=20 tokens and max_new_tokens=8 do not fit into the 24 positions of .*; set "
    with (
        pytest.raises(ConfigError, match=rf"{said}data\.max_length to 16 or less"),
        pytest.warns(UserWarning, match="no token with loss among the first"),
    ):
        finetune(asked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [["good", "bad"], [5, 1, 3]])
def test_the_command(kind, labels, tmp_path, command):  # noqa: F811
    arguments = (save_classifier(tmp_path / "model", kind), reviews(tmp_path, labels * 4))
    options = ("--text", "review", "--label", "stars", "--r", 2, "--target-modules", LAYERS)
    done = command("calibrate", *arguments, tmp_path / "out", *options)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / RECORD_NAME).read_text())
    assert record["labels"] == sorted(map(str, labels))
    assert record["data"]["max_length"] == N_POSITIONS
    done = command("calibrate", *arguments, "--dry-run", *options, "--json")
    assert done.code == 0, done.err
    done = command("calibrate", *arguments, tmp_path / "two", *options, "--max-length", 600)
    assert done.code == 1
    assert f"max_length=600, but '{arguments[0]}' has positions for 24 tokens" in done.err


def test_the_command_does_not_guess_what_numbers_are(tmp_path, command):  # noqa: F811
    arguments = (save_classifier(tmp_path / "model"), reviews(tmp_path, [1.0, 2.5]))
    options = ("--text", "review", "--label", "stars", "--r", 2, "--target-modules", LAYERS)
    done = command("calibrate", *arguments, tmp_path / "out", *options)
    assert done.code == 1
    assert "label_kind='number' for regression" in done.err
    done = command("calibrate", *arguments, tmp_path / "out", *options, "--label-kind", "number")
    assert done.code == 0, done.err
