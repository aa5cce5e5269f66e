"""QLoRA: a base of 4 bits stays as it is, and the adapter starts from a gradient through it.

python qlora.py                                            # works without a GPU, too
python qlora.py --model Qwen/Qwen3-8B --data roneneldan/TinyStories --steps 500
"""

import argparse

import torch
from datasets import load_dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from peft_gradinit import Calibration, LoraOneConfig, init_report, suggest_learning_rate
from peft_gradinit.recipes.embedded import reference, smollm2_folder

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a language model; without it SmolLM2-135M, from its package")
parser.add_argument("--data", help="texts; without it Python's language reference")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--output", default="out/qlora")
options = parser.parse_args()

name = options.model or smollm2_folder()
tokenizer = AutoTokenizer.from_pretrained(name)
texts = load_dataset(options.data, split="train") if options.data else reference("train")
texts = texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64))
texts = texts.select_columns(["input_ids", "attention_mask"]).train_test_split(16, seed=0)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # many CPUs lack bfloat16
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4)
model = prepare_model_for_kbit_training(
    model, gradient_checkpointing_kwargs={"use_reentrant": False}
)
few = Calibration(texts["train"], collate_fn=collator, max_batches=2)  # in earnest: 16
config = LoraOneConfig(
    r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", calibration=few
)
model = get_peft_model(model, config)
print(init_report(model).summary())

training = TrainingArguments(
    options.output,
    learning_rate=suggest_learning_rate(model).suggested,
    max_steps=options.steps,
    per_device_train_batch_size=4,
    dataloader_pin_memory=torch.cuda.is_available(),
    report_to="none",
)
trainer = Trainer(model, training, collator, texts["train"], texts["test"])
trainer.train()
with model.disable_adapter():  # after training: on CPUs bitsandbytes trains badly once evaluated
    before = trainer.evaluate()["eval_loss"]
print(f"loss on other texts: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
model.save_pretrained(options.output)
print(f"adapter saved in {options.output}")
