"""Fine-tune a chat model with TRL. The adapter starts one gradient step away (LoRA-One).

python sft_chat.py
python sft_chat.py --model HuggingFaceTB/SmolLM2-360M-Instruct --data trl-lib/Capybara --steps 500
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from peft_gradinit import CalibrationCallback, LoraOneConfig, init_report
from peft_gradinit.recipes.embedded import functions, smollm2_folder

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a chat model; without it SmolLM2-135M, from its package")
parser.add_argument("--data", help="chats; without it functions of Python and what they do")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--output", default="out/sft_chat")
options = parser.parse_args()
on_gpu = torch.cuda.is_available()

chats = load_dataset(options.data, split="train") if options.data else functions("train")
chats = chats.shuffle(seed=0)
trainer = SFTTrainer(
    options.model or str(smollm2_folder()),
    args=SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_length=512,
        logging_steps=2,
        report_to="none",
        bf16=on_gpu,
        dataloader_pin_memory=on_gpu,
        gradient_checkpointing=False,  # True where memory is short
    ),
    train_dataset=chats.skip(64),
    eval_dataset=chats.take(16),
    peft_config=LoraOneConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        calibration="deferred",  # until the trainer has prepared the chats
    ),
)
trainer.add_callback(
    CalibrationCallback(trainer, learning_rate="suggested", max_tokens=1024)  # in earnest: 16,384
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(init_report(trainer.model).summary())
print(f"loss on other chats: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
trainer.save_model()
print(f"adapter saved in {options.output}")
