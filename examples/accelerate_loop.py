"""A PyTorch loop with Accelerate: one file for one process and for several.

python accelerate_loop.py
accelerate launch --num_processes 2 accelerate_loop.py
torchrun --nproc_per_node 2 accelerate_loop.py     # CPUs: `accelerate launch` starts one process
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from peft_gradinit import Calibration, LoraOneConfig, init_report, suggest_learning_rate
from peft_gradinit.recipes.embedded import reference, smollm2_folder

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a language model; without it SmolLM2-135M, from its package")
parser.add_argument("--data", help="texts; without it Python's language reference")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--output", default="out/accelerate_loop")
options = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())
set_seed(0)
name = options.model or smollm2_folder()
tokenizer = AutoTokenizer.from_pretrained(name)
texts = load_dataset(options.data, split="train") if options.data else reference("train")
texts = texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64))
texts = texts.select_columns(["input_ids", "attention_mask"])
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = DataLoader(texts, batch_size=4, shuffle=True, collate_fn=collator)

model = AutoModelForCausalLM.from_pretrained(name)
few = Calibration(loader, max_batches=6)  # shared out among processes; in earnest: 32
config = LoraOneConfig(
    r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", calibration=few
)
model = get_peft_model(model, config)  # before `prepare`
accelerator.print(f"{accelerator.num_processes} processes", init_report(model).summary(), sep="\n")

optimizer = torch.optim.AdamW(model.parameters(), lr=suggest_learning_rate(model).suggested)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, batch in zip(range(options.steps), loader, strict=False):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean'):.3f}")

if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(options.output)
    print(f"adapter saved in {options.output}")
accelerator.wait_for_everyone()  # a process that ends alone, with gloo's threads at work, may crash
accelerator.end_training()
