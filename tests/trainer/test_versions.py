"""Adapters written by earlier versions load for good; those of later ones say what to update.

`written_by_0_1_0.json` holds the `gradinit.json` of 0.1.0 for every method, without the hashes of the
base weights. It is not to be made again: it is what users have.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from peft_gradinit import load_for_training
from peft_gradinit.errors import DataError
from tests.helpers import logits, pico_llama, relative_error, train_steps
from tests.trainer.runs import trainer_of

WRITTEN = json.loads((Path(__file__).parent / "written_by_0_1_0.json").read_text())
SAVED_RANK = {"LoRA-GA": 4, "LoRA-One": 2, "EVA": 2, "SVFit": 2}
SAVED_ALPHA = {"LoRA-GA": 16, "LoRA-One": 8, "EVA": 8, "SVFit": 2}


def saved_by_0_1_0(method, directory):
    """A folder as 0.1.0 leaves it, written down by hand."""
    generator = torch.Generator().manual_seed(4)
    r, tensors = SAVED_RANK[method], {}
    for i in range(2):
        stem = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        A, B = torch.randn(48, r, generator=generator), torch.randn(48, r, generator=generator)
        if method == "SVFit":  # orthonormal rows, orthogonal columns
            A, B = torch.linalg.qr(A).Q, 3 * torch.linalg.qr(B).Q
        tensors[f"{stem}.lora_A.weight"] = A.T.contiguous()
        tensors[f"{stem}.lora_B.weight"] = 0.1 * B.contiguous()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": SAVED_ALPHA[method],
        "target_modules": ["q_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "gradinit.json").write_text(json.dumps(WRITTEN[method]))
    return directory


@pytest.mark.parametrize("method", WRITTEN)
def test_what_0_1_0_wrote_loads_and_trains(method, tmp_path):
    directory = saved_by_0_1_0(method, tmp_path / "saved")
    live = load_for_training(pico_llama(), directory, allow_mismatch=True)
    plain = PeftModel.from_pretrained(pico_llama(), directory)
    assert relative_error(logits(plain), logits(pico_llama())) > 1e-3
    assert relative_error(logits(live), logits(plain)) < 1e-5
    config = live.peft_config["default"]
    assert type(config).__name__ == WRITTEN[method]["config_class"]
    for name, value in WRITTEN[method]["config"].items():
        if name not in ("inference_mode", "target_modules", "base_model_name_or_path"):
            assert getattr(config, name) == value, name
    train_steps(live)
    assert relative_error(logits(live), logits(plain)) > 1e-6


@pytest.mark.parametrize("method", WRITTEN)
def test_what_0_1_0_wrote_resumes_in_a_trainer(method, tmp_path):
    directory = saved_by_0_1_0(method, tmp_path / "saved")
    live = load_for_training(pico_llama(), directory, allow_mismatch=True)
    trainer_of(tmp_path / "out", model=live).train()
    live.save_pretrained(tmp_path / "again")
    again = load_for_training(pico_llama(), tmp_path / "again", allow_mismatch=True)
    assert relative_error(logits(again), logits(live)) < 1e-6  # SVFit rounds what others wrote


def test_options_of_a_later_version_are_named_with_what_to_update(tmp_path):
    directory = saved_by_0_1_0("LoRA-GA", tmp_path / "saved")
    content = copy.deepcopy(WRITTEN["LoRA-GA"])
    content["config"]["new_option"] = 3
    content["versions"] |= {"peft_gradinit": "0.9.0", "peft": "0.40.0"}
    (directory / "gradinit.json").write_text(json.dumps(content))
    message = (
        r"LoraGAConfig does not know here: \['new_option'\].*peft_gradinit 0\.9\.0, peft 0\.40\.0"
    )
    with pytest.raises(DataError, match=message):
        load_for_training(pico_llama(), directory, allow_mismatch=True)


def test_entries_of_a_later_version_beside_the_known_ones_do_no_harm(tmp_path):
    directory = saved_by_0_1_0("EVA", tmp_path / "saved")
    content = WRITTEN["EVA"] | {"new_entry": {"of": "a later version"}}
    (directory / "gradinit.json").write_text(json.dumps(content))
    load_for_training(pico_llama(), directory, allow_mismatch=True)
