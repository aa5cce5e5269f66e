"""Preferences by TRL's DPO: the start, the reference, resuming, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from peft import PeftModel

from peft_gradinit.errors import ConfigError, DataError
from peft_gradinit.recipes import (
    DataSection,
    ModelSection,
    encode,
    finetune,
    load_model,
    load_recipe,
)
from peft_gradinit.recipes.embedded import pico_tokenizer
from peft_gradinit.recipes.encoding import Encoder
from peft_gradinit.recipes.finetuning import _inputs, _trainer
from peft_gradinit.recipes.trainers import _check_left
from peft_gradinit.records import read_adapter
from tests.helpers import logits, relative_error

PICO = Path(__file__).parents[2] / "configs/offline/pico_llama_preferences.yaml"
QUICK = ("training.max_steps=3", "calibration.max_tokens=1024", "data.n_train=32", "data.n_eval=8")
METHODS = ["lora_ga", "lora_one", "eva", "pissa", "svfit", "lora"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pairs of answers are longer than"),  # some docstrings are
    pytest.mark.filterwarnings("ignore:the step that LoRA-One starts with"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


def recipe_of(output, *changes):
    return load_recipe(PICO, [*QUICK, f"output={output}", *changes])


def of_method(name):
    section = {"name": name, "r": 4}
    if name != "svfit":
        section["lora_alpha"] = 8
    if name == "eva":
        section["options"] = {"rank_allocation": "uniform"}
    return f"method={json.dumps(section)}"


def trainer_of(recipe):
    recipe, inputs, arguments = _inputs(recipe.model_copy(update={"data": recipe.read_data()}))
    return _trainer(inputs.reader.load_model(recipe.model), recipe, inputs, arguments, None)


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_is_the_base_model(name, tmp_path):
    """Whatever the start does to the function: TRL's reference is the model without the adapter."""
    rate = ("training.learning_rate=1e-12", "training.max_steps=1")  # the start, and no more
    trainer = trainer_of(recipe_of(tmp_path, of_method(name), *rate))
    base = load_model(ModelSection(name="embedded:pico-llama"))
    ids = torch.arange(3, 43)[None]
    asked, plain = [], trainer.model.get_base_model()

    def watch(module, given, found):
        asked.append([
            layer.disable_adapters
            for layer in trainer.model.modules()
            if hasattr(layer, "disable_adapters")
        ])

    handle = plain.model.register_forward_hook(watch)
    trainer.train()
    handle.remove()
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]
    assert any(all(flags) for flags in asked)  # the reference ran
    model = trainer.model.eval().cpu()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(ids).logits, base(ids).logits)
    margins = [
        entry["rewards/margins"]
        for entry in trainer.state.log_history
        if "rewards/margins" in entry
    ]
    if name == "lora_one":  # its start is a step away from the reference
        assert abs(margins[0]) > 1e-3
    else:
        assert margins[0] == pytest.approx(0.0, abs=2e-5)


@pytest.mark.slow
def test_a_recipe_of_preferences_trains_and_is_measured(tmp_path):
    more = ("training.max_steps=40", "data.n_train=64", "training.learning_rate=2e-2")
    results = finetune(recipe_of(tmp_path / "out", *more))
    losses = [loss for _, loss in results["losses"]]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference agree
    assert sum(losses[-8:]) / 8 < 0.65  # the last time that it sees the 64 pairs
    assert {"loss", "rewards/accuracies", "rewards/margins"} <= results["metrics"].keys()
    assert results["start"]["method"] == "LoRA-GA"
    assert results["start"]["facts"]["n_tokens"] >= 1024
    saved = tmp_path / "out" / "adapter"
    assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not (saved / "ref").exists()
    base = load_model(ModelSection(name="embedded:pico-llama"))
    before = logits(base)
    assert relative_error(logits(PeftModel.from_pretrained(base, saved)), before) > 1e-3


def test_a_start_that_is_computed_in_training_is_exported_after_it(tmp_path):
    """Before, there are no factors that an export could be checked by."""
    finetune(
        recipe_of(tmp_path / "out", "training.max_steps=2", "export.targets=[serving, merged]")
    )
    assert read_adapter(tmp_path / "out" / "serving").layers
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_ga", "lora"])
def test_a_resumed_run_keeps_its_reference(name, tmp_path):
    more = (
        of_method(name),
        "training.save_steps=2",
        "training.max_steps=4",
        "training.learning_rate=1e-2",
    )
    want = finetune(recipe_of(tmp_path / "whole", *more))
    finetune(recipe_of(tmp_path / "out", *more))
    last = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    last.rmdir()
    got = finetune(recipe_of(tmp_path / "out", *more, "training.resume_from_checkpoint=true"))
    assert got["losses"] == want["losses"]
    assert got["metrics"] == pytest.approx(want["metrics"])
    if name == "lora":
        assert got["start"] is None
    else:
        assert got["start"]["modules"] == want["start"]["modules"]


@pytest.mark.slow
def test_an_optimiser_of_pairs_trains_preferences(tmp_path):
    results = finetune(recipe_of(tmp_path, "training.optim=lora_muon"))
    other = finetune(recipe_of(tmp_path / "adam"))
    assert results["losses"][0] == other["losses"][0]
    assert results["losses"][2] != other["losses"][2]


def test_a_saved_calibration_serves_preferences(tmp_path):
    from peft_gradinit import calibrate
    from peft_gradinit.recipes import adapter_config
    from tests.helpers import quiet

    recipe = recipe_of(tmp_path / "out")
    ids = torch.randint(3, 500, (4, 20), generator=torch.Generator().manual_seed(0))
    config = adapter_config(recipe.method, "PREFERENCE", calibration="unused")
    data = quiet([{"input_ids": ids, "labels": ids}])
    calibrate(load_model(recipe.model), config, data).save(tmp_path / "c")
    results = finetune(recipe_of(tmp_path / "out", f"calibration.result={tmp_path / 'c'}"))
    assert results["start"]["facts"]["n_sequences"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("calibration.sketch_size=64", "sketch_size is not for PREFERENCE"),
        ("evaluation.metrics=[accuracy]", "preferences are measured by their loss"),
        ("data.packing=true", "packing is for causal models"),
    ],
)
def test_what_preferences_cannot_have_is_refused(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        finetune(recipe_of(tmp_path / "out", change))


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "keys", "want"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
        ),
        (
            {"q": "a", "y": "b", "n": "c"},
            {"prompt": "Q: {q}", "chosen": "y", "rejected": " {n}"},
            {"prompt": "Q: a", "chosen": "b", "rejected": " c"},
        ),
        ({"chosen": CHAT, "rejected": CHAT}, {}, {"chosen": CHAT, "rejected": CHAT}),
    ],
    ids=["columns", "templates", "chats"],
)
def test_rows_of_preferences(row, keys, want):
    rows = datasets.Dataset.from_list([row])
    section = DataSection(path="embedded:docstrings", **keys)
    assert list(encode(rows, section, "PREFERENCE", pico_tokenizer())) == [want]


def test_rows_without_a_worse_answer_are_refused():
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejectd": "c"}])
    with pytest.raises(DataError, match="no column 'rejected', did you mean 'rejectd'"):
        encode(rows, DataSection(path="embedded:docstrings"), "PREFERENCE", pico_tokenizer())
    with pytest.raises(DataError, match=r"model\.task: PREFERENCE"):
        encode(rows, DataSection(path="embedded:docstrings"), "CAUSAL_LM", pico_tokenizer())


SAID = {"role": "user", "content": "say one"}
GOOD, POOR = ({"role": "assistant", "content": text} for text in ("one", "two"))


@pytest.mark.parametrize(
    ("answers", "prompt"),
    [(([SAID, GOOD], [SAID, POOR]), None), (([GOOD], [POOR]), [SAID])],
    ids=["within", "before"],
)
def test_a_prompt_that_is_a_text_beside_chats(answers, prompt, tmp_path):
    """Chats that contain it stand for themselves; else it is the user's turn."""
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    section = DataSection(path="x", chat_template=str(tmp_path / "chat.jinja"))
    row = {"prompt": "say one", "chosen": answers[0], "rejected": answers[1]}
    encoder = Encoder(section, "PREFERENCE", pico_tokenizer(), list(row))
    assert encoder(row).get("prompt") == prompt
    with pytest.raises(DataError, match="that neither contain it nor begin with the assistant's"):
        encoder({**row, "chosen": [{"role": "system", "content": "be"}, GOOD]})


def test_pairs_that_trl_leaves_out_are_told():
    rows, arguments = datasets.Dataset.from_dict({"n": [1, 2, 3]}), SimpleNamespace(max_length=8)
    with pytest.warns(
        UserWarning, match=r"2 of 3 pairs of answers are longer than data\.max_length=8"
    ):
        _check_left(rows, rows.select([0]), arguments)
    with pytest.raises(DataError, match="all 3 pairs of answers are longer than"):
        _check_left(rows, rows.select([]), arguments)
