"""Publishing with the real client, and loading by name in a process without this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tests.exports import EXACT
from tests.hub import processes
from tests.hub.server import TOKEN, Hub

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
METHODS = ("lora_ga", "lora_one", "eva", "svfit")
TITLES = {"lora_ga": "LoRA-GA", "lora_one": "LoRA-One", "eva": "EVA", "svfit": "SVFit"}
LOADED = (
    *METHODS,
    "local-base",
    "named",
    "twice",
    "failing",
    "trainer",
    "sft",
    "serving",
    "merged",
)


def run(script, directory, hub, home):
    done = processes.run([HERE / script, directory], directory, hub, home)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The server after everything was pushed, and the directory with the results."""
    directory = tmp_path_factory.mktemp("hub")
    with Hub() as hub:
        run("push.py", directory, hub, "pusher")
        run("load.py", directory, hub, "loader")
        run("live.py", directory, hub, "trainer")
        assert hub.unknown == []
        yield hub, directory


def files(published, name):
    return published[0].repos[f"me/{name}"].files


def card(published, name):
    return ModelCard(files(published, name)["README.md"].decode())


def text_files(published, name):
    return {
        path: content.decode()
        for path, content in files(published, name).items()
        if path.endswith((".json", ".md"))
    }


@pytest.mark.parametrize("name", LOADED)
def test_loaded_by_name_it_is_the_function(name, published):
    errors = torch.load(published[1] / "errors.pt")
    assert errors[name] <= EXACT


@pytest.mark.parametrize("name", [*METHODS, "named"])
def test_loaded_for_training_by_name_it_is_the_function(name, published):
    assert torch.load(published[1] / "live.pt")["errors"][name] <= EXACT


def test_what_the_hub_does_not_have_is_named(published):
    message = torch.load(published[1] / "live.pt")["refusal"]
    assert "'me/absent' is no folder here, and cannot be downloaded from the Hub: 404" in message
    assert "check the name, revision and token" in message


@pytest.mark.parametrize("name", METHODS)
def test_card_of_a_pushed_model(name, published):
    data, text = card(published, name).data, card(published, name).text
    assert data.library_name == "peft"
    assert data.base_model == "me/pico-llama"
    assert data.pipeline_tag == "text-generation"
    tags = {"lora", TITLES[name].lower(), "peft_gradinit", "base_model:adapter:me/pico-llama"}
    assert tags <= set(data.tags)
    assert f"# {TITLES[name]} adapter for me/pico-llama" in text
    assert "https://arxiv.org/abs/" in text
    assert f'PeftModel.from_pretrained(model, "me/{name}")' in text
    assert "More Information Needed" not in text
    assert text.count("- PEFT ") == 1
    if name != "svfit":
        assert "| calibration | 12 sequences, 148 tokens" in text
        assert files(published, name)["gradinit.png"].startswith(b"\x89PNG")
        assert "](gradinit.png)" in text


def test_snippet_of_the_card_runs_as_printed(published):
    hub, directory = published
    code = re.search(r"```python\n(.*?)```", card(published, "eva").text, flags=re.DOTALL)[1]
    script = directory / "snippet.py"
    script.write_text(f"{code}\nassert 'lora' in str(model).lower()\n")
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(directory / "reader"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LOADED)
def test_no_token_and_no_path_is_published(name, published):
    for path, content in text_files(published, name).items():
        assert TOKEN not in content, path
        assert "secret-place" not in content, path
        assert str(published[1]) not in content, path


def test_base_without_a_name_is_left_out_and_explained(published):
    data, text = card(published, "local-base").data, card(published, "local-base").text
    assert data.base_model is None
    assert not any(tag.startswith("base_model") for tag in data.tags)
    assert "The base model had no name on the Hub" in text
    config = json.loads(files(published, "local-base")["adapter_config.json"])
    assert config["base_model_name_or_path"] is None
    local = json.loads(files(published, "lora_ga")["adapter_config.json"])
    assert local["base_model_name_or_path"] == "me/pico-llama"


def test_adapter_of_another_name_has_its_folder(published):
    assert "german/adapter_config.json" in files(published, "named")
    text = card(published, "named").text
    assert 'from_pretrained(model, "me/named", subfolder="german")' in text
    assert "](german/gradinit.png)" in text


def test_second_push_keeps_what_people_wrote(published):
    text = card(published, "twice").text
    assert "## Intended use\n\nPoetry." in text
    assert text.count("## LoRA-One") == 1
    assert len(published[0].repos["me/twice"].commits) == 3


def test_trainers_card_is_completed_not_replaced(published):
    data, text = card(published, "trainer").data, card(published, "trainer").text
    assert "### Training hyperparameters" in text
    assert "**LoRA-GA** ([arXiv:2407.05000]" in text
    assert text.index("## LoRA-GA") < text.index("## Training procedure")
    assert {"lora", "lora-ga", "peft_gradinit"} <= set(data.tags)
    assert data.base_model == "me/pico-llama"
    assert data.library_name == "peft"
    assert {"gradinit.json", "gradinit.png"} <= set(files(published, "trainer"))


def test_trl_card_has_the_tags_and_is_completed_by_the_models_push(published):
    data, text = card(published, "sft").data, card(published, "sft").text
    assert {"trl", "sft", "lora", "eva", "peft_gradinit"} <= set(data.tags)
    assert "This model was trained with SFT." in text
    assert "**EVA** ([arXiv:2410.07170]" in text


def test_exported_directories_describe_themselves(published):
    served, merged = card(published, "serving"), card(published, "merged")
    assert "--max-lora-rank 8" in served.text
    assert "rank 8 in all layers" in served.text
    assert merged.data.library_name == "transformers"
    assert merged.data.base_model == "me/pico-llama"
    assert "ordinary transformers model" in merged.text


def test_failed_uploads_publish_nothing_and_the_next_one_succeeds(published):
    log = json.loads((published[1] / "failures.json").read_text())
    lfs_error, after_lfs, commit_error, after_commit, at_last = log
    assert lfs_error.startswith("RuntimeError: Error while uploading")
    assert "planned failure of commit" in commit_error
    assert after_lfs == after_commit == [[], []]
    assert at_last[1] == ["Upload model"]
    assert {"README.md", "adapter_model.safetensors", "gradinit.json"} <= set(at_last[0])
    counts = published[0].requests
    assert counts["failed lfs"] >= 2
    assert counts["failed commit"] == counts["failed preupload"] == 1
