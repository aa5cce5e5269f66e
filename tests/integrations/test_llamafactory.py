"""LLaMA-Factory trains from a start that was computed on its own model, data and template."""

import json
from types import SimpleNamespace

import pytest
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from peft_gradinit.errors import ConfigError
from peft_gradinit.recipes import ModelSection, load_model, load_processor


@pytest.fixture(autouse=True)
def without_version_check(monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # theirs, as the guide says


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("llamafactory")
    section = ModelSection(name="embedded:pico-llama")
    load_model(section).save_pretrained(place / "model")
    load_processor(section).save_pretrained(place / "model")
    sums = [
        {"instruction": f"What is {i} + {i}?", "input": "", "output": f"It is {2 * i}."}
        for i in range(32)
    ]
    (place / "sums.json").write_text(json.dumps(sums))
    (place / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "sums.json"}}))
    return place


def arguments(folder, output, **more):
    return {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_target": "all",
        "dataset": "sums",
        "dataset_dir": str(folder),
        "template": "default",
        "cutoff_len": 128,
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        **more,
    }


@pytest.mark.parametrize(("method", "title"), [("lora_one", "LoRA-One"), ("eva", "EVA")])
def test_a_run_goes_on_from_the_start(method, title, folder, tmp_path):
    from peft_gradinit.integrations.llamafactory import train

    options = {"method": method, "max_tokens": 512}
    train(arguments(folder, tmp_path, learning_rate="suggested", gradinit=options))
    base = load_model(ModelSection(name="embedded:pico-llama"))
    start, end = (
        load_file(p / "adapter_model.safetensors") for p in (tmp_path / "start", tmp_path)
    )
    assert start.keys() == end.keys()
    moved = [(end[key] - start[key]).abs().max() for key in start]
    lines = json.loads((tmp_path / "start" / "gradinit.json").read_text())["report"]["modules"]
    assert {line["method"] for line in lines} == {title}
    # Four steps of AdamW move an entry by about four times the learning rate at most.
    suggested = sorted(line["learning_rate"] for line in lines)[len(lines) // 2]
    assert 0.5 * suggested < max(moved) < 8 * suggested
    config = PeftModel.from_pretrained(base, tmp_path).peft_config["default"]
    assert (config.peft_type.value, config.lora_alpha) == ("LORA", 8)


def targets_of(model, **options):
    from peft_gradinit.integrations import llamafactory

    defaults = {"lora_target": ["all"], "freeze_vision_tower": True, "use_llama_pro": False}
    return llamafactory._targets(model, SimpleNamespace(**defaults | options))


class WithTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
        self.text = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "up_proj": nn.Linear(4, 4)})
        self.lm_head = nn.Linear(4, 4)


def test_the_layers_are_those_that_the_framework_adapts():
    model = WithTower()
    assert targets_of(model) == {"text.q_proj", "text.up_proj"}  # the tower is frozen by default
    assert targets_of(model, lora_target=["q_proj"]) == {"text.q_proj"}
    assert targets_of(model, freeze_vision_tower=False) == {"q_proj", "up_proj"}
    llama = load_model(ModelSection(name="embedded:pico-llama"))
    n = llama.config.num_hidden_layers
    names = targets_of(llama, use_llama_pro=True, freeze_trainable_layers=1)
    assert names
    assert all(f".{n - 1}." in name for name in names)


def test_a_resized_vocabulary_is_trained(folder, tmp_path):
    from peft_gradinit.integrations.llamafactory import train

    options = {"method": "eva", "max_tokens": 512}
    train(arguments(folder, tmp_path, resize_vocab=True, gradinit=options))
    config = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    assert "embed_tokens" in config["modules_to_save"]


def test_values_of_the_command_line_win_over_the_file(folder, tmp_path, monkeypatch):
    from peft_gradinit.integrations import llamafactory

    options = {"method": "eva", "max_tokens": 512}
    written = arguments(folder, tmp_path / "out", learning_rate=0.5, gradinit=options)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(written))
    given, run = [], llamafactory.run_exp
    monkeypatch.setattr(llamafactory, "run_exp", lambda args: (given.append(args), run(args)))
    changes = ["max_steps=1", "learning_rate=0.001", "gradinit.method=lora_one"]
    monkeypatch.setattr("sys.argv", ["llamafactory", str(tmp_path / "train.yaml"), *changes])
    llamafactory.main()
    (theirs,) = given
    assert (theirs["max_steps"], theirs["learning_rate"]) == (1, 0.001)
    saved = json.loads((tmp_path / "out" / "start" / "gradinit.json").read_text())
    assert saved["method"] == "LoRA-One"


@pytest.mark.parametrize("words", [[], ["--stage", "sft"]])
def test_a_command_line_without_a_file_is_refused(words, monkeypatch):
    from peft_gradinit.integrations.llamafactory import main

    monkeypatch.setattr("sys.argv", ["llamafactory", *words])
    with pytest.raises(ConfigError, match=r"expected a file ending in \.yaml.*write the flags"):
        main()


def test_what_cannot_work_is_told(folder, tmp_path):
    from peft_gradinit.integrations.llamafactory import train

    for more, part in (
        ({"gradinit": {"method": "lora_ga"}}, "must be 'lora_one' or 'eva', got 'lora_ga'"),
        ({"gradinit": {"stable_gama": 3}}, "did you mean 'stable_gamma'"),
        ({"adapter_name_or_path": "somewhere"}, "is an adapter already"),
        ({"finetuning_type": "full"}, "finetuning_type: lora, got 'sft' and 'full'"),
    ):
        with pytest.raises(ConfigError, match=part):
            train(arguments(folder, tmp_path / "out", **more))
    assert not (tmp_path / "out" / "start").exists()
