"""A fine-tuning script as users have it: `python -m tests.hub.chain METHOD DIRECTORY`.

The base comes from the Hub by its name, the trainer is TRL's. Prints the losses that it logged, as
JSON, if it comes to its end.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from peft_gradinit import CalibrationCallback, EvaConfig
from tests.helpers import logits
from tests.trainer.interrupted_run import KillInCheckpoint
from tests.trainer.trl_runs import CONFIGS, SHARED, config_of, data, losses_of, trainer_of

torch.set_num_threads(1)  # sums of several threads round otherwise
BASE = "me/pico-llama"


def make_config(method):
    """EVA measures as it is made, and shares out its ranks; the others start in the trainer."""
    if method == "EVA":
        return EvaConfig(**SHARED, r=4, lora_alpha=8, calibration=data())
    return config_of(method)


def make_trainer(method, directory):
    trainer = trainer_of(
        "sft", directory, model=LlamaForCausalLM.from_pretrained(BASE),
        peft_config=make_config(method), max_steps=6, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    if method in ("LoRA-GA", "LoRA-One"):
        trainer.add_callback(CalibrationCallback(trainer))
    return trainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=CONFIGS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kill-beyond", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--push")
    options = parser.parse_args()
    trainer = make_trainer(options.method, options.directory)
    if options.kill_beyond:
        trainer.add_callback(KillInCheckpoint(4, options.kill_beyond))
    trainer.train(resume_from_checkpoint=options.resume)
    torch.save(logits(trainer.model), options.directory / "logits.pt")
    if options.push:
        trainer.args.hub_model_id = options.push
        trainer.push_to_hub()
    sys.stdout.write(json.dumps(losses_of(trainer)) + "\n")


if __name__ == "__main__":
    main()
