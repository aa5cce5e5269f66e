"""SmolLM2 with a start, for `test_promises` and for the processes that it starts.

`python -m tests.smollm2.runs DIRECTORY [--dtype D] [--kill-after N] [--resume]` is a training run.
"""

import argparse
import os
import signal

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_gradinit import Calibration, LoraGAConfig, LoraOneConfig, calibrate
from peft_gradinit.methods import METHODS
from peft_gradinit.recipes import encode, load_model, load_processor, load_rows
from peft_gradinit.recipes.schema import DataSection, ModelSection

INFO = {m.name: m for m in METHODS}
N_STEPS = 3
LAST = [f"layers.{i}.{kind}" for i in (28, 29) for kind in ("self_attn.q_proj", "mlp.down_proj")]
"""Four layers near the loss: enough for a promise that does not depend on how many there are."""


def base(dtype: str = "float32", **options) -> nn.Module:
    return load_model(ModelSection(name="embedded:smollm2", dtype=dtype, **options))


def rows(n: int = 8):
    section = DataSection(path="embedded:functions", split="validation", max_length=192, n_train=n)
    tokenizer = load_processor(ModelSection(name="embedded:smollm2"))
    return encode(load_rows(section), section, "CAUSAL_LM", tokenizer)


def config(method: str, **options):
    info = INFO[method]
    values = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if info.needed() != "nothing":
        values |= {"lora_alpha": 8, "calibration": Calibration(rows(4), progress=False)}
    return info(**{**values, **options})


def started(method: str, model: nn.Module, **options) -> PeftModel:
    return get_peft_model(model, config(method, **options))


def probe() -> Tensor:
    return torch.tensor([rows(1)[0]["input_ids"][:24]])


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=probe().to(model.device)).logits.float().cpu()


def train_steps(model: PeftModel, n: int = 2, lr: float = 1e-3) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    ids, losses = probe().to(model.device), []
    model.train()
    for _ in range(n):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def products_float32() -> dict[str, Tensor]:
    return products("float32")


def products_bfloat16() -> dict[str, Tensor]:
    return products("bfloat16")


def products(dtype: str) -> dict[str, Tensor]:
    """What a process has measured: the reconstruction of every gradient, on a share of the rows."""
    data = Calibration(rows(8), progress=False)
    config = LoraGAConfig(r=4, target_modules=LAST, task_type="CAUSAL_LM")
    result = calibrate(base(dtype), config, data)
    return {name: (t.U * t.S) @ t.Vh for name, t in result.triplets.items()}


class KillAfter(TrainerCallback):
    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps

    def on_save(self, args, state, control, **also) -> None:
        if state.global_step == self.n_steps:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--kill-after", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    calibration = Calibration(rows(2), progress=False)
    adapter = LoraOneConfig(r=4, target_modules=LAST, calibration=calibration)
    model = get_peft_model(base(options.dtype), adapter)
    arguments = TrainingArguments(
        options.directory,
        max_steps=N_STEPS,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        save_steps=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(4))
    if options.kill_after:
        trainer.add_callback(KillAfter(options.kill_after))
    trainer.train(resume_from_checkpoint=options.resume)
    model.save_pretrained(f"{options.directory}/final")


if __name__ == "__main__":
    main()
