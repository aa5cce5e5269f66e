"""Every offline recipe runs; runs resume, export, and say what they were."""

import errno
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import sklearn.metrics
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from peft_gradinit import suggest_learning_rate
from peft_gradinit.errors import ConfigError, DataError, ExportError, OutputError
from peft_gradinit.recipes import (
    ModelSection,
    finetune,
    load_model,
    load_processor,
    load_recipe,
    load_rows,
    trainers,
)
from peft_gradinit.recipes.collation import collator
from peft_gradinit.recipes.embedded import pico_tokenizer
from peft_gradinit.recipes.evaluation import _generated
from peft_gradinit.recipes.finetuning import _curves, _inputs
from peft_gradinit.recipes.metrics import compute
from peft_gradinit.recipes.progress import Losses
from peft_gradinit.recipes.shipped import shipped
from peft_gradinit.recipes.trainers import parsed_arguments
from peft_gradinit.recipes.training import PAIR_OPTIMIZERS
from peft_gradinit.records import InitReport
from peft_gradinit.records.adapters import read_adapter
from tests.recipes.classifiers import save_classifier
from tests.recipes.images import save_vit
from tests.smollm2.marks import needs_smollm2
from tests.trainer.runs import mostly_slow

ROOT = Path(__file__).parent.parent.parent
OFFLINE = sorted((ROOT / "configs/offline").glob("*.yaml"))
PICO = ROOT / "configs/offline/pico_llama_docstrings.yaml"
QUICK = ("training.max_steps=3", "calibration.max_tokens=512", "data.n_train=48", "data.n_eval=8")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pairs of answers are longer than",  # some docstrings are
    "ignore:the step that LoRA-One starts with",  # random models on a few tokens
    "ignore:.*`use_cache=True` is incompatible.*",
)


def run(path, output, *overrides):
    return finetune(load_recipe(path, [*QUICK, f"output={output}", *overrides]))


def slow_if_real(path):
    marks = [pytest.mark.slow] if path.stem.startswith(("minilm", "smollm2")) else []
    marks += [needs_smollm2] if path.stem.startswith("smollm2") else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.filterwarnings("ignore:the calibration found fewer directions")  # it reads little here
@pytest.mark.parametrize("path", map(slow_if_real, OFFLINE))
def test_every_offline_recipe_runs(path, tmp_path):
    results = run(path, tmp_path / "out")
    assert len(results["losses"]) == 3
    assert all(np.isfinite(loss) for _, loss in results["losses"])
    recipe = load_recipe(path)
    names = {name.removeprefix("metric_") for name in results["metrics"]}
    rewards = {name for name in names if name.startswith("rewards/")}
    assert bool(rewards) == (recipe.model.task == "PREFERENCE")
    assert names - rewards == {"loss", *recipe.evaluation.metrics}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    assert (tmp_path / "out" / "loss.png").exists()
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert results["start"] is None or results["start"]["method"]
    for target in set(recipe.export.targets) - {"peft"}:
        assert (tmp_path / "out" / target).is_dir()


def rate_of_the_start(method, tmp_path):
    """Trained at, and suggested, where a recipe says no rate; the first logged loss."""
    values = yaml.safe_load(PICO.read_text())
    del values["training"]["learning_rate"]
    values["method"] = {"name": method, "r": 4, "lora_alpha": 8}
    path = tmp_path / f"{method}.yaml"
    path.write_text(yaml.safe_dump(values))
    return run(path, tmp_path / method)


def test_a_recipe_without_a_rate_takes_the_suggested_one(tmp_path):
    ours, lora = rate_of_the_start("lora_one", tmp_path), rate_of_the_start("lora", tmp_path)
    report = InitReport.from_dict(ours["start"])
    assert ours["learning_rate"] == report.learning_rate.suggested
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    plain = get_peft_model(load_model(ModelSection(name="embedded:pico-llama")), config)
    assert lora["learning_rate"] == suggest_learning_rate(plain).suggested


@pytest.mark.parametrize("name", mostly_slow(PAIR_OPTIMIZERS, quick=["lora_muon"]))
def test_a_recipe_trains_with_an_optimiser_of_pairs(name, tmp_path):
    rate = ("training.learning_rate=1e-3",)
    results = run(PICO, tmp_path / "out", f"training.optim={name}", *rate)
    other = run(PICO, tmp_path / "adam", *rate)
    assert len(results["losses"]) == 3
    assert results["losses"][0] == other["losses"][0]  # before the first step
    assert results["losses"][2] != other["losses"][2]


def test_options_of_an_optimiser_of_pairs_reach_it(tmp_path, monkeypatch):
    more = ("training.learning_rate=1e-2", "training.optim=lora_muon")
    plain = run(PICO, tmp_path / "plain", *more)
    without = run(
        PICO, tmp_path / "out", *more, "training.optim_args='momentum=0.0,nesterov=false'"
    )
    assert without["losses"][0] == plain["losses"][0]
    assert without["losses"][2] != plain["losses"][2]
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)  # told before
    with pytest.raises(ConfigError, match=r"lora_muon has no option 'momentun' \(did you mean"):
        run(PICO, tmp_path / "bad", *more, "training.optim_args='momentun=0.5'")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("momentum=0.0,nesterov=false", {"momentum": 0.0, "nesterov": False}),
        ("dampening=1e-4, mode=gd", {"dampening": 1e-4, "mode": "gd"}),
        ("betas=(0.9,0.95)", {"betas": (0.9, 0.95)}),
        ("betas=[0.9, 0.95],", {"betas": [0.9, 0.95]}),
    ],
)
def test_arguments_of_an_optimiser_are_read_as_python_writes_them(text, options):
    assert parsed_arguments(text) == options


@pytest.mark.parametrize(
    "text", ["0.9", "betas=(0.9", "**x", "a=1)+(b", "a=b()", "a=1;b=2", "a={[1]: 2}"]
)
def test_arguments_of_an_optimiser_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match=rf"training\.optim_args='{re.escape(text)}' is no list"):
        parsed_arguments(text)


def test_optimisers_that_are_unknown_or_without_a_rate_are_refused():
    with pytest.raises(
        ConfigError, match=r"training.optim: no such optimiser, did you mean 'lora_m"
    ):
        load_recipe(PICO, ["training.optim=lora_moun"])
    changes = ["training.optim=sgd", "training.learning_rate=suggested"]
    with pytest.raises(ConfigError, match="name the learning_rate of sgd"):
        load_recipe(PICO, changes)


@pytest.mark.parametrize(
    ("name", "over_adamw"),
    mostly_slow([("lora_muon", None), ("lora_one", 0.6)], quick=[("lora_one", 0.6)]),
)
def test_an_optimiser_of_pairs_takes_the_suggested_rate(name, over_adamw, tmp_path):
    changes = [f"training.optim={name}", "training.learning_rate=suggested"]
    results = run(PICO, tmp_path / "out", *changes, "training.save_steps=2")
    of_adamw = InitReport.from_dict(results["start"]).learning_rate.suggested
    want = 0.03 if over_adamw is None else over_adamw * of_adamw
    assert results["learning_rate"] == pytest.approx(want)
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    resume = f"training.resume_from_checkpoint={checkpoint}"
    resumed = run(PICO, tmp_path / "again", *changes, resume)
    assert resumed["learning_rate"] == pytest.approx(want)
    assert resumed["losses"] == results["losses"]


@pytest.mark.parametrize("rate", ["best", "0", "-1", "true", ".inf", "[1]"])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ConfigError, match=r"training\.learning_rate: .*'suggested' or a number"):
        load_recipe(PICO, [f"training.learning_rate={rate}"])


@pytest.mark.parametrize(("rate", "read"), [("3e-4", 3e-4), ("0.1", 0.1), ("suggested",) * 2])
def test_rates_are_read_as_yaml_writes_them(rate, read):
    assert load_recipe(PICO, [f"training.learning_rate={rate}"]).training.learning_rate == read


def test_the_adapter_is_the_one_that_was_evaluated(tmp_path):
    results = run(PICO, tmp_path / "out")
    model = load_model(ModelSection(name="embedded:pico-llama"))
    model = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").eval()
    recipe = load_recipe(PICO, [*QUICK])
    from peft_gradinit.recipes import encode, load_processor, load_rows
    from peft_gradinit.recipes.collation import collator

    processor = load_processor(recipe.model)
    rows = encode(load_rows(recipe.data, evaluation=True), recipe.data, "CAUSAL_LM", processor)
    batch = collator(processor)(list(rows))
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert loss == pytest.approx(results["metrics"]["loss"], rel=1e-3)


def test_nothing_is_left_of_the_adapter_of_a_run_before(tmp_path):
    quick = ("training.max_steps=1", "evaluation.metrics=[]")
    run(PICO, tmp_path / "out", *quick)
    adapter = tmp_path / "out" / "adapter"
    assert "LoRA-One" in (adapter / "README.md").read_text()
    run(PICO, tmp_path / "out", *quick, "method.name=lora", "method.options={}")
    assert len(read_adapter(adapter).layers) > 0
    names = {path.name for path in adapter.iterdir()}
    assert not {"gradinit.json", "gradinit.png"} & names
    text = (adapter / "README.md").read_text()
    assert not re.search("lora-one|gradinit", text, re.IGNORECASE)


def test_nothing_is_left_of_the_exports_of_a_run_before(tmp_path):
    quick = ("training.max_steps=1", "evaluation.metrics=[]")
    for _ in range(2):
        run(PICO, tmp_path / "out", *quick, "export.targets=[merged, serving]")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")) > 0
    assert not (tmp_path / "out" / "checkpoints").exists()  # none was asked for
    (tmp_path / "out" / "peft").mkdir()
    (tmp_path / "out" / "peft" / "notes.txt").write_text("mine")  # not an export
    run(PICO, tmp_path / "out", *quick, "export.targets=[serving]")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names & {"peft", "serving", "merged"} == {"serving", "peft"}


def test_a_full_disk_leaves_the_run_before(tmp_path, monkeypatch):
    quick = ("training.max_steps=1", "evaluation.metrics=[]", "export.targets=[serving]")
    run(PICO, tmp_path / "out", *quick)
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full(_, folder, **options):
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(OutputError, match="the disk is full"):
        run(PICO, tmp_path / "out", *quick, "method.name=lora", "method.options={}")
    now = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert now == kept


def test_of_an_earlier_adapter_only_words_of_people_in_its_card_stay(tmp_path):
    quick = ("training.max_steps=1", "evaluation.metrics=[]")
    run(PICO, tmp_path / "out", *quick)
    adapter = tmp_path / "out" / "adapter"
    (adapter / "chat_template.jinja").write_text("EARLIER")
    card = adapter / "README.md"
    card.write_text(card.read_text() + "\nWords of people.\n")
    run(PICO, tmp_path / "out", *quick)
    assert "Words of people." in card.read_text()
    template = AutoTokenizer.from_pretrained(adapter).chat_template
    assert template == load_processor(load_recipe(PICO).model).chat_template


def test_an_evaluation_that_fails_leaves_no_results_of_a_run_before(tmp_path, monkeypatch):
    quick = ("training.max_steps=1", "evaluation.metrics=[]", "export.targets=[serving]")
    run(PICO, tmp_path / "out", *quick)
    assert {"results.json", "loss.png", "serving"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }

    def fails(*_):
        raise MemoryError("on long answers")

    monkeypatch.setattr("peft_gradinit.recipes.finetuning.evaluate_model", fails)
    with pytest.raises(MemoryError, match="on long answers"):
        run(PICO, tmp_path / "out", *quick, "training.learning_rate=0.1")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter", "results.json"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())  # of this run
    assert results["learning_rate"] == 0.1
    assert results["metrics"] == {}
    assert len(results["losses"]) == 1


def test_a_run_that_diverged_writes_no_adapter_over_an_earlier_one(tmp_path, capsys):
    quick = ("training.max_steps=2", "evaluation.metrics=[]")
    run(PICO, tmp_path / "out", *quick)
    kept = {name: (tmp_path / "out" / name).read_bytes() for name in KEPT}
    diverging = ("method.name=lora", "training.learning_rate=1e30", "training.max_grad_norm=0")
    with pytest.raises(ConfigError, match=r"diverged: .* lower training\.learning_rate, .* 1e\+30"):
        run(PICO, tmp_path / "out", *quick, *diverging, "method.options={}")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in KEPT} == kept
    assert "step 2 of 2: loss nan" in capsys.readouterr().err


KEPT = ("results.json", "adapter/adapter_model.safetensors", "adapter/gradinit.json")


@pytest.mark.parametrize("targets", ["[]", "[merged]"])
def test_an_export_with_files_of_others_is_refused_before_training(targets, tmp_path):
    (tmp_path / "merged").mkdir()
    for name in ("gradinit.json", "tokenizer.json"):
        (tmp_path / "merged" / name).write_text("{}")
    with pytest.raises(ExportError, match=r"no export writes \(tokenizer\.json\)"):
        run(PICO, tmp_path, f"export.targets={targets}")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_resuming_continues_the_same_run(tmp_path):
    more = ("training.save_steps=2", "training.max_steps=4", "training.learning_rate=1e-2")
    want = run(PICO, tmp_path / "whole", *more)
    run(PICO, tmp_path / "out", *more)
    last = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    last.rmdir()
    got = run(PICO, tmp_path / "out", *more, "training.resume_from_checkpoint=true")
    assert got["losses"] == want["losses"]
    assert got["metrics"] == want["metrics"]
    kept = sorted(path.name for path in last.parent.iterdir())
    with pytest.raises(ConfigError, match=r"of an earlier run, up to checkpoint-4; set training\."):
        run(PICO, tmp_path / "out", *more)
    assert sorted(path.name for path in last.parent.iterdir()) == kept
    run(PICO, tmp_path / "out", "training.max_steps=1", "evaluation.metrics=[]")  # saves none


def check_refused(changes, output, options):
    """Each change of the recipe is named, with what the checkpoint has in its place."""
    for change, said in changes.items():
        with pytest.raises(ConfigError, match=f"is of a run with {said}"):
            run(PICO, output, *options, change)


def test_resuming_another_adapter_is_refused(tmp_path):
    """The checkpoint decides what is trained, so results would name what was not."""
    targets = "method.target_modules=[q_proj, v_proj]"
    more = ("training.save_steps=1", "evaluation.metrics=[]", targets)
    run(PICO, tmp_path / "out", *more, "training.max_steps=1")
    more += ("training.max_steps=2", "training.resume_from_checkpoint=true")
    changes = {
        "method.name=lora_ga": r"method\.name='lora_one' \(now 'lora_ga'\)",
        "method.r=4": r"method\.r=8 \(now 4\)",
        "method.options={use_dora: true}": r"method\.use_dora=False \(now True\)",
        "method.target_modules=[q_proj]": r"method\.target_modules=\['q_proj', 'v_proj'\] \(now \['q_proj'\]\)",
    }
    check_refused(changes, tmp_path / "out", more)
    assert len(run(PICO, tmp_path / "out", *more)["losses"]) == 2


def test_resuming_another_plain_lora_is_refused(tmp_path):
    lora = ("method.name=lora", "method.options={}", "evaluation.metrics=[]")
    more = (*lora, "training.save_steps=1", "training.resume_from_checkpoint=true")
    run(PICO, tmp_path / "out", *more[:-1], "training.max_steps=1", "method.lora_alpha=64")
    more += ("training.max_steps=2",)
    changes = {
        "method.lora_alpha=4": r"method\.lora_alpha=64.* \(now 4",
        "method.r=4": r"method\.r=8 \(now 4\), method\.lora_alpha=64",
        "method.name=lora_one": r"method\.name='lora' \(now 'lora_one'\)",
    }
    check_refused(changes, tmp_path / "out", more)
    assert len(run(PICO, tmp_path / "out", *more, "method.lora_alpha=64")["losses"]) == 2


def test_resuming_with_another_optimiser_or_other_numbers_is_refused(tmp_path):
    """The state that was saved brings them along, so a change would do nothing, or end in a KeyError."""
    lora = (
        "method.name=lora",
        "method.options={}",
        "evaluation.metrics=[]",
        "training.save_steps=1",
    )
    run(PICO, tmp_path / "out", *lora, "training.max_steps=1", "training.learning_rate=1e-3")
    more = (*lora, "training.max_steps=2", "training.resume_from_checkpoint=true")
    changes = {
        "training.learning_rate=1e-2": r"training\.learning_rate=0\.001 \(now 0\.01\), which",
        "training.weight_decay=0.1": r"training\.weight_decay=0 \(now 0\.1\)",
        "training.adam_beta2=0.9": r"training\.adam_beta2=0\.999 \(now 0\.9\)",
        "training.optim=adafactor": r"another training\.optim: .* 'adafactor' has \['beta1', 'clip",
    }
    check_refused(changes, tmp_path / "out", (*more, "training.learning_rate=1e-3"))
    results = run(PICO, tmp_path / "out", *more, "training.learning_rate=1e-3")
    assert len(results["losses"]) == 2


def test_resuming_plain_lora_on_a_model_of_another_name_is_told(tmp_path):
    for name in ("one", "two"):
        load_model(ModelSection(name="embedded:pico-llama")).save_pretrained(tmp_path / name)
        pico_tokenizer().save_pretrained(tmp_path / name)
    lora = (
        "method.name=lora",
        "method.options={}",
        "evaluation.metrics=[]",
        "training.save_steps=1",
    )
    before = (*lora, f"model.name={tmp_path / 'one'}", "training.max_steps=1")
    run(PICO, tmp_path / "out", *before)
    after = (*lora, f"model.name={tmp_path / 'two'}", "training.max_steps=2")
    with pytest.warns(UserWarning, match=r"was trained on '.*one', .* model\.name='.*two'"):
        run(PICO, tmp_path / "out", *after, "training.resume_from_checkpoint=true")


def test_resuming_a_long_list_of_layers(tmp_path):
    """PEFT shortens lists of twenty names and more, where no other layer ends like them."""
    recipe = load_recipe(PICO, [])
    linear = [n for n, m in load_model(recipe.model).named_modules() if isinstance(m, nn.Linear)]
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    targets = [name for name in linear if name.endswith(kinds)]
    assert len(targets) >= 20
    more = (f"method.target_modules={targets}", "evaluation.metrics=[]", "training.save_steps=1")
    run(PICO, tmp_path / "out", *more, "training.max_steps=1")
    saved = tmp_path / "out/checkpoints/checkpoint-1/gradinit.json"
    assert len(json.loads(saved.read_text())["config"]["target_modules"]) == len(kinds)
    more += ("training.max_steps=2", "training.resume_from_checkpoint=true")
    assert len(run(PICO, tmp_path / "out", *more)["losses"]) == 2


def test_an_impossible_export_is_refused_before_training(tmp_path):
    more = ("method.name=lora", "method.options={use_dora: true}", "export.targets=[serving]")
    with pytest.raises(ExportError, match="servers do not know DoRA"):
        run(PICO, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_export_that_fails_loses_no_results(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ExportError("the disk is full")

    monkeypatch.setattr("peft_gradinit.recipes.exporting.export_adapter", fail)
    with pytest.raises(ExportError, match="the disk is full"):
        run(PICO, tmp_path / "out", "export.targets=[merged]")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["losses"]


def test_a_classifier_with_further_modules_is_resumed(tmp_path):
    """PEFT adds the heads that it knows to the list in the checkpoint."""
    save_classifier(tmp_path / "model")
    rows = [{"text": f"a film it was {word}", "label": word} for word in ("good", "bad") * 8]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    method = {"name": "lora", "options": {"modules_to_save": ["pooler"]}}
    training = {"learning_rate": 1e-3, "max_steps": 1, "save_steps": 1, "logging_steps": 1}
    finetune(small_recipe(tmp_path, {}, method=method, training=training))
    training |= {"max_steps": 2, "resume_from_checkpoint": True}
    results = finetune(small_recipe(tmp_path, {}, method=method, training=training))
    assert [step for step, _ in results["losses"]] == [1, 2]
    method["options"] = {"modules_to_save": ["embeddings"]}
    with pytest.raises(
        ConfigError, match=r"modules_to_save=\['classifier', 'pooler', 'score'\] \(now \['c"
    ):
        finetune(small_recipe(tmp_path, {}, method=method, training=training | {"max_steps": 3}))


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        run(PICO, tmp_path / "out", "training.resume_from_checkpoint=true")
    assert not (tmp_path / "out").exists()


def test_baselines_are_drawn_and_missing_ones_named(tmp_path):
    run(PICO, tmp_path / "lora", "method.name=lora", "method.options={}")
    results = run(PICO, tmp_path / "one", f"baselines=[{tmp_path / 'lora'}]")
    assert results["method"] == "lora_one"


def test_baselines_of_one_method_are_all_drawn():
    results = {"method": "lora_one", "losses": [[1, 0.5]], "eval_losses": []}
    folders = ("a/out", "b/out", "c/out")
    curves = _curves(
        results, {folder: ("lora", [(1, float(i))]) for i, folder in enumerate(folders)}
    )
    assert list(curves) == ["lora_one", "lora", "lora (out)", "lora (c/out)"]
    assert [points[0][1] for points in curves.values()] == [0.5, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("by", ["recipe", "launcher"])
def test_a_model_that_would_be_sharded_is_refused_before_it_is_loaded(by, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    asked = ["training.fsdp=full_shard"] if by == "recipe" else []
    with pytest.raises(ConfigError, match="a whole model on every device, and FSDP, which"):
        run(PICO, tmp_path / "out", *asked)
    assert by == "launcher" or not os.environ.get("ACCELERATE_USE_FSDP")


@pytest.mark.parametrize(("stage", "refused"), [(2, False), (3, True)])
def test_the_third_stage_of_deepspeed_is_refused(stage, refused, monkeypatch):
    made = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage), report_to=[])
    monkeypatch.setattr(trainers, "ARGUMENTS", {"CAUSAL_LM": lambda **values: made})
    make = functools.partial(trainers.arguments_of, load_recipe(PICO), "CAUSAL_LM", evaluates=False)
    if not refused:
        assert make() is made
        return
    with pytest.raises(ConfigError, match="and ZeRO-3, which"):
        make()


def test_a_stream_without_a_number_of_steps_is_refused_before_the_calibration(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)
    recipe = load_recipe(PICO, [f"output={tmp_path / 'out'}", "training.num_train_epochs=1"])
    stream = load_rows(recipe.data).to_iterable_dataset()
    monkeypatch.setattr("peft_gradinit.recipes.finetuning.load_rows", lambda *_, **__: stream)
    recipe = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"max_steps": -1})}
    )
    with pytest.raises(ConfigError, match=r"training\.max_steps has to say how long"):
        finetune(recipe)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("baselines=[nothing]", ConfigError, "'nothing' holds no readable"),
        ("baselines=[DAMAGED]", ConfigError, "holds no readable"),
        ("evaluation.max_new_tokens=null", ConfigError, r"set evaluation\.max_new_tokens"),
        ("evaluation.metrics=[exact_mach]", ConfigError, "'exact_mach' cannot be loaded"),
        ("data.eval_rename={module: m}", DataError, "no column 'module'"),
    ],
)
def test_what_comes_after_training_is_checked_before(
    override, error, message, tmp_path, monkeypatch
):
    """Nothing is lost to a slip that shows at the end: no model is loaded, nothing is written."""
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text('{"method": "lora", "losses": 3}')
    with pytest.raises(error, match=message):
        run(PICO, tmp_path / "out", override.replace("DAMAGED", str(tmp_path / "damaged")))
    assert not (tmp_path / "out").exists()


def test_answers_are_generated_at_the_end_and_choose_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)
    by = "training.metric_for_best_model=exact_match"
    with pytest.raises(ConfigError, match=r"'exact_match' is not measured in training, .*loss"):
        run(PICO, tmp_path / "out", by, "evaluation.steps=1")


def test_an_evaluation_without_rows_is_refused(tmp_path):
    nothing = ("data.eval_split=null", "data.n_eval=null")
    with pytest.raises(ConfigError, match=r"metrics=\['exact_match'\] .*nothing to evaluate on"):
        run(PICO, tmp_path / "out", *nothing)
    with pytest.raises(ConfigError, match=r"steps=1, .*nothing to evaluate on"):
        run(PICO, tmp_path / "out", *nothing, "evaluation.metrics=[]", "evaluation.steps=1")


@pytest.fixture
def without_matplotlib(monkeypatch):
    parts = [name for name in sys.modules if name.split(".")[0] == "matplotlib"]
    for name in {*parts, "matplotlib", "matplotlib.figure"}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_matplotlib")
def test_pictures_that_cannot_be_drawn_are_told_first(tmp_path):
    with pytest.raises(ConfigError, match="pictures need matplotlib"):
        run(PICO, tmp_path / "out", "baselines=[out/another]")


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_a_run_says_that_it_draws_nothing(tmp_path):
    with pytest.warns(UserWarning, match=r"loss.png will not be drawn without matplotlib"):
        run(PICO, tmp_path / "out", "training.max_steps=1")
    assert (tmp_path / "out" / "results.json").exists()
    assert not (tmp_path / "out" / "loss.png").exists()


@pytest.mark.parametrize(
    ("task", "mask"),
    [("CAUSAL_LM", [[0, 0, 1], [1, 1, 1]]), ("SEQ_2_SEQ_LM", [[1, 0, 0], [1, 1, 1]])],
)
def test_prompts_are_padded_where_the_model_does_not_see_it(task, mask):
    """Left for causal models; right for encoders, whose positions are counted from the left."""
    shown = []

    class Model(torch.nn.Module):
        device = torch.device("cpu")

        def generate(self, input_ids, attention_mask, **_):
            shown.append(attention_mask.tolist())
            return input_ids

    tokenizer = pico_tokenizer()
    side = tokenizer.padding_side
    _generated(Model(), load_recipe(PICO), task, [[7], [7, 8, 9]], tokenizer)
    assert shown == [mask]
    assert tokenizer.padding_side == side


def test_a_saved_calibration_serves_a_recipe(tmp_path):
    from peft_gradinit import calibrate
    from peft_gradinit.recipes import adapter_config
    from tests.helpers import quiet

    recipe = load_recipe(PICO)
    ids = torch.randint(3, 500, (4, 20), generator=torch.Generator().manual_seed(0))
    data = quiet([{"input_ids": ids, "labels": ids}])
    config = adapter_config(recipe.method, "CAUSAL_LM", calibration="unused")
    calibrate(load_model(recipe.model), config, data).save(tmp_path / "c")
    results = run(PICO, tmp_path / "out", f"calibration.result={tmp_path / 'c'}")
    assert results["start"]["facts"]["n_sequences"] == 4


def test_metrics_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 4, 50), generator.integers(0, 4, 50)
    got = compute(["accuracy", "macro_f1", "matthews"], predicted, true)
    assert got == pytest.approx({
        "accuracy": sklearn.metrics.accuracy_score(true, predicted),
        "macro_f1": sklearn.metrics.f1_score(true, predicted, average="macro"),
        "matthews": sklearn.metrics.matthews_corrcoef(true, predicted),
    })
    assert compute(["matthews"], [1, 1], [0, 1]) == {"matthews": 0.0}
    assert compute(["exact_match"], ["a ", "b"], ["a", "c"]) == {"exact_match": 0.5}
    with pytest.raises(ConfigError, match="'acuracy' cannot be loaded"):
        compute(["acuracy"], [1], [1])
    with pytest.raises(ConfigError, match="'accuracy' cannot be computed"):
        compute(["accuracy"], [1, 2], [1])


def test_words_without_an_answer_are_no_match_and_references_need_one(tmp_path):
    """A model that never answers is right nowhere, and a reference without an answer is named."""
    quick = (
        "training.max_steps=1",
        "evaluation.metrics=[exact_match]",
        "evaluation.max_new_tokens=2",
    )
    words = (
        'data.prompt="Say it: {module}"',
        'data.completion="{module} #### 7"',
        r'evaluation.answer="#### (\\d)"',
    )
    assert run(PICO, tmp_path / "a", *quick, *words)["metrics"]["exact_match"] == 0
    with pytest.raises(DataError, match=r"finds no answer in row 0 of the evaluation data, '"):
        run(PICO, tmp_path / "b", *quick, *words[:2], r'evaluation.answer="=> (\\d)"')


def test_a_failed_evaluation_leaves_the_trained_adapter(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("peft_gradinit.recipes.finetuning.evaluate_model", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        run(PICO, tmp_path / "out")
    model = load_model(ModelSection(name="embedded:pico-llama"))
    moved = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").state_dict()
    assert any("lora_B" in name and value.any() for name, value in moved.items())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ('data.where={module: "("}', r"data\.where.*'\(' is no regular expression"),
        (r"data.completion_keep=\d+", r"completion_keep.*has no group in round brackets"),
        (r"evaluation.answer=\d+", r"evaluation\.answer.*has no group in round brackets"),
        (r"evaluation.answer=(\d+", r"evaluation\.answer.*is no regular expression"),
    ],
)
def test_expressions_are_read_with_the_recipe(change, fault):
    with pytest.raises(ConfigError, match=fault):
        load_recipe(PICO, [change])


def small_recipe(folder, data, **sections):
    values = {
        "version": 1,
        "output": str(folder / "out"),
        "model": {"name": str(folder / "model")},
        "data": {"path": str(folder / "data"), "n_eval": 4, **data},
        "training": {"learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1},
        **sections,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.title == "recipe"  # the file's name
    return recipe


def test_images_are_classified(tmp_path):
    save_vit(tmp_path / "model")
    images = [Image.effect_noise((20, 20), 50) for _ in range(16)]
    rows = [{"img": image, "kind": i % 3} for i, image in enumerate(images)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    method = {
        "name": "lora_ga",
        "r": 2,
        "target_modules": ["query", "value", "q_proj", "v_proj"],
        "options": {"modules_to_save": ["classifier"]},
    }
    recipe = small_recipe(
        tmp_path,
        {"image": "img", "label": "kind"},
        method=method,
        evaluation={"metrics": ["accuracy"]},
    )
    results = finetune(recipe)
    assert 0 <= results["metrics"]["metric_accuracy"] <= 1
    assert len(results["losses"]) == 2


def test_metrics_without_predictions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)  # told before
    save_vit(tmp_path / "model")
    save_images(tmp_path / "data", "abc")
    sections = {
        "method": {"name": "lora"},
        "evaluation": {"metrics": ["accuracy"]},
        "training": {"max_steps": 1, "prediction_loss_only": True},
    }
    with pytest.raises(ConfigError, match=r"\['accuracy'\] need predictions, but training\.predic"):
        finetune(small_recipe(tmp_path, {}, **sections))


def save_images(folder, classes):
    images = [Image.effect_noise((20, 20), 50) for _ in range(16)]
    rows = [{"image": im, "label": classes[i % len(classes)]} for i, im in enumerate(images)]
    datasets.Dataset.from_list(rows).save_to_disk(folder)


@pytest.mark.parametrize(("names", "trained"), [("BA", False), ("xy", True), (None, True)])
def test_a_head_of_as_many_other_classes_is_trained(names, trained, tmp_path):
    """As many outputs do not make it a head of these classes; their names tell, but for upper case."""
    named = names and {
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
    }
    save_vit(tmp_path / "model", **(named or {"num_labels": 2}))
    save_images(tmp_path / "data", "ab")
    targets = ["query", "value", "q_proj", "v_proj"]
    method = {"name": "lora", "r": 2, "target_modules": targets}
    finetune(small_recipe(tmp_path, {}, method=method))
    before = load_file(tmp_path / "model" / "model.safetensors")["classifier.weight"]
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    heads = [value for name, value in saved.items() if name.endswith("classifier.weight")]
    assert len(heads) == trained
    for head in heads:  # from that of the checkpoint: two steps of 1e-3
        assert 0 < (head - before).abs().max() < 2.1e-3


def test_a_new_head_is_trained_and_saved(tmp_path):
    """What a checkpoint lacks is random, so an adapter without it would give other classes to each."""
    save_vit(tmp_path / "model")
    save_images(tmp_path / "data", "abc")
    targets = ["query", "value", "q_proj", "v_proj"]
    recipe = small_recipe(
        tmp_path, {}, method={"name": "lora_one", "r": 2, "target_modules": targets}
    )
    loss = finetune(recipe)["metrics"]["loss"]
    evaluated = _inputs(recipe)[1].evaluation
    batch = collator(load_processor(recipe.model))(list(evaluated))
    for seed in range(2):
        torch.manual_seed(seed)
        model = ViTForImageClassification.from_pretrained(
            tmp_path / "model", num_labels=3, ignore_mismatched_sizes=True
        )
        model = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").eval()
        with torch.no_grad():
            assert model(**batch).loss.item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("method", "smoothing"), [("lora_ga", 0.0), ("lora", 0.1)])
def test_encoder_decoders_answer(tmp_path, method, smoothing):
    config = T5Config(
        vocab_size=512,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"sentence": f"sentence {i}", "label": i % 2} for i in range(16)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    recipe = small_recipe(
        tmp_path,
        {"prompt": "{sentence}: ", "completion": "{label}", "label_words": {0: "bad", 1: "good"}},
        method={"name": method, "r": 1},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 3},
        training={"learning_rate": 1e-3, "max_steps": 2, "label_smoothing_factor": smoothing},
    )
    results = finetune(recipe)
    assert 0 <= results["metrics"]["exact_match"] <= 1


def script(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("line", [("scripts/finetune.py",), ("-m", "peft_gradinit_cli", "train")])
def test_the_command_runs_checks_and_refuses(line, tmp_path):
    line = (*line, PICO, *QUICK, f"output={tmp_path / 'out'}")
    done = script(*line)
    assert done.returncode == 0, done.stderr
    for part in ("lora_one", "trained numbers", "exact_match", str(tmp_path / "out")):
        assert part in done.stdout.replace("\n", "")
    assert "step 3 of 3: loss " in done.stderr
    printed = json.loads(script(*line, "--json").stdout)
    assert printed["learning rate"] == pytest.approx(3e-3)
    checked = script(*line, "--check")
    assert json.loads(checked.stdout)["training"]["max_steps"] == 3
    wrong = script(*line, "trainig.x=1")
    assert wrong.returncode == 1
    assert "did you mean 'training'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_preferences_are_trained_in_two_processes(tmp_path):
    done = script(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "peft_gradinit_cli", "train"),
        *("offline/pico_llama_preferences", *QUICK, f"output={tmp_path / 'out'}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["processes"] == 2
    assert results["losses"][0][1] == pytest.approx(0.6931, abs=1e-3)  # the reference is the start
    assert 0 <= results["metrics"]["rewards/accuracies"] <= 1


@pytest.mark.slow
def test_the_command_runs_in_two_processes(tmp_path):
    done = script(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "peft_gradinit_cli", "train"),
        *("offline/pico_llama_docstrings", *QUICK, f"output={tmp_path / 'out'}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["processes"] == 2
    assert 0 <= results["metrics"]["exact_match"] <= 1


def test_losses_are_shown_with_the_time_that_remains(tmp_path, capsys):
    run(PICO, tmp_path / "out", "training.max_steps=2", "evaluation.steps=1")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert re.fullmatch(r"step 1 of 2: loss \d\.\d{4}, about \d+\.\d minutes remain", lines[0])
    assert re.fullmatch(r"step 1 of 2: evaluation loss \d\.\d{4}", lines[1])
    assert re.fullmatch(r"step 2 of 2: loss \d\.\d{4}", lines[2])


def test_a_bar_is_drawn_on_standard_error_alone(tmp_path, capsys):
    run(PICO, tmp_path / "out", "training.max_steps=2", "training.disable_tqdm=false")
    shown = capsys.readouterr()
    assert re.search(r"100%\|█+\| 2/2 ", shown.err)
    assert re.search(r"step 2 of 2: loss \d\.\d{4}", shown.err)
    assert shown.out == ""


def test_the_picture_has_the_evaluation_losses(tmp_path, monkeypatch):
    drawn = {}
    where = "peft_gradinit.recipes.finetuning.draw_losses"
    monkeypatch.setattr(where, lambda curves, path: drawn.update(curves))
    results = run(PICO, tmp_path / "out", "training.max_steps=2", "evaluation.steps=1")
    assert drawn.keys() == {"lora_one", "lora_one, evaluation"}
    assert drawn["lora_one"] == [tuple(pair) for pair in results["losses"]]
    assert [step for step, _ in drawn["lora_one, evaluation"]] == [1, 2]


def test_the_time_that_remains_leaves_the_calibration_out(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("peft_gradinit.recipes.progress.time.perf_counter", lambda: clock[0])
    state = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True)
    losses = Losses()
    losses.on_train_begin(None, state, None)
    clock[0] = 600.0  # ten minutes of calibration
    for step in (0, 1):
        state.global_step = step
        losses.on_step_begin(None, state, None)
        clock[0] += 30.0
    state.global_step = 2
    losses.on_log(None, state, None, logs={"loss": 1.0})
    assert capsys.readouterr().err == "step 2 of 10: loss 1.0000, about 4.0 minutes remain\n"


def test_recipes_that_ship_are_found_by_name():
    assert shipped().keys() >= {"offline/pico_llama_docstrings", "lora_ga/llama2_metamath"}
    by_name = load_recipe("offline/pico_llama_docstrings")
    assert by_name == load_recipe(PICO) == load_recipe("configs/offline/pico_llama_docstrings.yaml")
    with pytest.raises(
        ConfigError, match=r"no recipe 'lora_ga/llama2_meta', did you mean 'lora_ga/"
    ):
        load_recipe("lora_ga/llama2_meta")


PUSH = ("push.repo=me/adapter",)


def unreachable(*args, **options):
    raise ConnectionError("no route to the Hub")


def test_unreachable_hub_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_gradinit.recipes.publishing.create_repo", unreachable)
    monkeypatch.setattr("peft_gradinit.recipes.reading.load_model", None)  # not even loaded
    with pytest.raises(ConfigError, match=r"push.repo='me/adapter' .*no route.*leave push out"):
        run(PICO, tmp_path / "out", *PUSH)


def test_failed_upload_says_where_the_adapter_is_and_how_to_upload_it(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "peft_gradinit.recipes.publishing.create_repo",
        lambda repo, **options: made.append((repo, options)),
    )
    monkeypatch.setattr("peft.PeftModel.push_to_hub", unreachable)
    folder = tmp_path / "out" / "adapter"
    with pytest.raises(OutputError, match="no route to the Hub") as caught:
        run(PICO, tmp_path / "out", *PUSH)
    assert made == [("me/adapter", {"private": True, "exist_ok": True})]
    assert f"`hf upload me/adapter {folder}`" in str(caught.value)
    assert (folder / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "results.json").exists()


def test_the_upload_holds_what_reads_the_data(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("peft_gradinit.recipes.publishing.create_repo", lambda *_, **__: None)
    for kind in (PeftModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(
            kind, "push_to_hub", lambda self, repo, **_: pushed.append((type(self).__name__, repo))
        )
    run(PICO, tmp_path / "out", *PUSH, "evaluation.metrics=[]")
    names = ["PeftModelForCausalLM", type(pico_tokenizer()).__name__]
    assert pushed == [(name, "me/adapter") for name in names]
