"""Adapters load, without a warning, where only an old PEFT is; the versions are those of `docs/guides/export.md`.

The old packages are installed beside the tests' own, from the package index, into a folder that an
interpreter of its own reads first. torch is the tests'.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_gradinit import export_adapter
from peft_gradinit.methods import METHODS
from tests.exports import EXACT, emptied, trained
from tests.helpers import pico_llama, relative_error, token_batches

pytestmark = pytest.mark.slow
NAMES = [m.name for m in METHODS]
OLD = {
    "0.8.2": ("transformers==4.38.2", "tokenizers==0.15.2", "huggingface_hub==0.23.5"),
    "0.15.0": ("transformers==4.51.3", "tokenizers==0.21.1", "huggingface_hub==0.30.2"),
}
ACCELERATE = {"0.8.2": "accelerate==0.27.2", "0.15.0": "accelerate==1.6.0"}
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)


@pytest.fixture(scope="module")
def old_packages(tmp_path_factory):
    """Install a version of PEFT and what it needs, once; returns where it is."""
    installed = {}

    def install(version):
        if version not in installed:
            installed[version] = folder = tmp_path_factory.mktemp(f"peft-{version}")
            pins = [f"peft=={version}", *OLD[version], ACCELERATE[version]]
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*command, "--target", str(folder), *pins],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        return installed[version]

    return install


def load_with(version, packages, folder, adapters):
    """Load adapters of the pico Llama in an old PEFT; returns what that process printed."""
    base = pico_llama()
    config = {name: getattr(base.config, name) for name in FIELDS}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(base.state_dict(), folder / "base.safetensors")
    torch.save(token_batches()[0]["input_ids"], folder / "ids")
    script = Path(__file__).with_name("with_old_peft.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *map(str, adapters)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["peft"] == version
    return printed


def check(version, packages, folder, made):
    """The function of every adapter in an old PEFT is that of the live one, without a warning."""
    printed = load_with(version, packages(version), folder, [folder / name for name in made])
    assert printed["logged"] == []
    ids = torch.load(folder / "ids")
    for name, model in made.items():
        with torch.no_grad():
            want = model(input_ids=ids).logits
        assert relative_error(torch.load(folder / name / "logits"), want) <= EXACT, name


def test_served_adapters_load_from_peft_0_8_on(tmp_path, old_packages):
    made = {name: trained(name, use_rslora=True) for name in NAMES}
    made["emptied"] = emptied()
    for name, model in made.items():
        export_adapter(model, tmp_path / name, target="serving")
    check("0.8.2", old_packages, tmp_path, made)


def test_saved_adapters_of_one_rank_load_from_peft_0_8_on(tmp_path, old_packages):
    options = {"eva": {"rho": 1.0}}
    made = {name: trained(name, **options.get(name, {})) for name in NAMES}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    check("0.8.2", old_packages, tmp_path, made)


def test_saved_adapters_of_allocated_ranks_load_from_peft_0_15_on(tmp_path, old_packages):
    allocated = {"rank_allocation": "gradient_energy", "rho": 2.0, "use_rslora": True}
    made = {
        "lora_ga": trained("lora_ga", **allocated),
        "eva": trained("eva"),
        "emptied": emptied(),
    }
    for name, model in made.items():
        assert len(set(model.base_model.init_report["default"].ranks().values())) > 1
        model.save_pretrained(tmp_path / name)
    check("0.15.0", old_packages, tmp_path, made)
