"""The whole way of an adapter: training, killed within a checkpoint, resumed, published, loaded."""

import dataclasses
import json
import re
import shutil
import signal

import pytest
import torch
from peft import LoraConfig

from tests.exports import EXACT
from tests.helpers import logits, pico_llama, relative_error, token_batches
from tests.hub.chain import BASE
from tests.hub.processes import ROOT, run
from tests.hub.server import Hub, Repo

pytestmark = pytest.mark.slow
TORN = {
    "LoRA-GA": "optimizer.pt",
    "LoRA-One": "adapter_model.safetensors",
    "EVA": "optimizer.pt",
    "SVFit": "adapter_model.safetensors",
}
"""In the middle of which file the run of a method is killed."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub that has the base model."""
    base = tmp_path_factory.mktemp("base")
    pico_llama().save_pretrained(base)
    with Hub() as hub:
        hub.repos[BASE] = Repo({p.name: p.read_bytes() for p in base.iterdir()})
        yield hub
        assert hub.unknown == []


def train(method, directory, hub, *options):
    return run(["-m", "tests.hub.chain", method, directory, *options], directory.parent, hub, "me")


def printed(process):
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def size_within(checkpoint, name):
    """A size that this file goes beyond, and no file that is written before it."""
    sizes = {p.name: p.stat().st_size for p in checkpoint.iterdir()}
    below = max(size for size in sizes.values() if size < sizes[name])
    return (below + sizes[name]) // 2


def is_torn(checkpoint, name, size):
    """Whether the file has just these bytes, or is a draft that was not renamed yet.

    Safetensors writes drafts from 0.7 on, and reserves all their space first.
    """
    if (checkpoint / name).exists():
        return (checkpoint / name).stat().st_size == size
    drafts = [p.stat().st_size for p in checkpoint.glob(".tmp*")]
    return len(drafts) == 1 and drafts[0] <= size


@pytest.mark.parametrize(("method", "file"), TORN.items())
def test_from_a_killed_run_to_a_plain_load_by_name(method, file, hub, tmp_path):
    whole, run_of, name = tmp_path / "whole", tmp_path / "run", f"me/{method.lower()}"
    losses = printed(train(method, whole, hub))
    assert len(set(losses)) == 6

    size = size_within(whole / "checkpoint-4", file)
    killed = train(method, run_of, hub, "--kill-beyond", size)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert is_torn(run_of / "checkpoint-4", file, size)
    refused = train(method, run_of, hub, "--resume")
    assert refused.returncode == 1
    # Older Safetensors leave torn weights, which are refused first.
    assert re.search(r"checkpoint-4|SafetensorError", refused.stderr.splitlines()[-1])
    shutil.rmtree(run_of / "checkpoint-4")
    assert printed(train(method, run_of, hub, "--resume", "--push", name)) == losses
    live = torch.load(run_of / "logits.pt")
    assert torch.equal(live, torch.load(whole / "logits.pt"))
    assert relative_error(live, logits(pico_llama())) > 0.01

    torch.save(token_batches(4, 4)[0]["input_ids"], tmp_path / "ids.pt")
    script = ROOT / "tests" / "hub" / "chain_load.py"
    command = [script, BASE, name, run_of / "logits.pt", tmp_path / "ids.pt"]
    loaded = printed(run(command, tmp_path, hub, "someone-else"))
    assert max(loaded["errors"]) <= EXACT
    assert loaded["logged"] == []
    assert set(loaded["keys"]) <= {field.name for field in dataclasses.fields(LoraConfig)}
