"""A training script that can be killed: `python -m tests.trainer.interrupted_run METHOD DIRECTORY`.

Prints the losses that it logged, as JSON, if it comes to its end.
"""

import argparse
import ctypes
import json
import os
import resource
import signal
import sys

import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback

from peft_gradinit import CalibrationCallback, EvaConfig
from tests.helpers import pad, pico_llama, quiet, token_batches
from tests.trainer.runs import ROWS, arguments
from tests.trainer.trl_runs import SHARED, config_of


def make_config(method):
    if method == "EVA":  # ranks from the data: some layers lose their adapter
        options = {"r": 2, "lora_alpha": 4, "rho": 4.0}
        return EvaConfig(**SHARED, **options, calibration=quiet(token_batches()))
    if method == "SVFit-compact":
        return config_of("SVFit", save_format="compact")
    return config_of(method)


torch.set_num_threads(1)  # as in the tests: sums of other lengths round otherwise
METHODS = ("LoRA-GA", "LoRA-One", "EVA", "SVFit", "SVFit-compact")


def make_trainer(method, directory, cls=Trainer, **options):
    model = get_peft_model(pico_llama(), make_config(method))
    values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    training = arguments(directory, **{**values, **options})
    data = {"train_dataset": ROWS, "eval_dataset": ROWS[:4], "data_collator": pad}
    trainer = cls(model, training, **data)
    if method in ("LoRA-GA", "LoRA-One"):
        trainer.add_callback(CalibrationCallback(trainer))
    return trainer


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


class KillAfter(TrainerCallback):
    """Ends the process after a step, as a scheduler or the lack of memory does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_beyond(n_bytes):
    """End the process within the write that makes a file longer than this; the file is left so.

    The kernel writes up to the limit, then sends SIGXFSZ. Libraries write from C++ and Rust, so the
    handler is one for C: the write never returns.
    """
    ctypes.CDLL(None).signal(signal.SIGXFSZ, _KILL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _KILL(_):
    os.kill(os.getpid(), signal.SIGKILL)


class KillInCheckpoint(TrainerCallback):
    """Ends the process within the checkpoint of a step, in the first file of more than `n_bytes`."""

    def __init__(self, step, n_bytes):
        self.step, self.n_bytes = step, n_bytes

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kill_beyond(self.n_bytes)


N_BYTES = 50


def kill_in_file(part):
    """End the process when it has written `N_BYTES` of a file whose path has this part."""

    def hook(event, arguments):
        if event == "open" and part in str(arguments[0]) and "w" in str(arguments[1]):
            kill_beyond(N_BYTES)

    sys.addaudithook(hook)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("directory")
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--kill-in-file")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    trainer = make_trainer(options.method, options.directory)
    if options.kill_after:
        trainer.add_callback(KillAfter(options.kill_after))
    if options.kill_in_file:
        kill_in_file(options.kill_in_file)
    trainer.train(resume_from_checkpoint=options.resume)
    sys.stdout.write(json.dumps(losses_of(trainer)) + "\n")


if __name__ == "__main__":
    main()
