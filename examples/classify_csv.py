"""Classify texts with `Trainer`, from a CSV whose classes are words.

python classify_csv.py
python classify_csv.py --data mine.csv --model answerdotai/ModernBERT-base --steps 500
"""

import argparse

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from peft_gradinit import Calibration, CalibrationCallback, LoraOneConfig
from peft_gradinit.recipes.embedded import docstrings, minilm_folder

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="a CSV with the columns text and label")
parser.add_argument("--model", default=minilm_folder(), help="an encoder; default: MiniLM")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--output", default="out/classify_csv")
options = parser.parse_args()

if options.data is None:  # docstrings of Python, and which module each is from
    options.data = "docstrings.csv"
    rows = docstrings("train").remove_columns("label").rename_column("module", "label")
    rows.select_columns(["text", "label"]).to_csv(options.data)

data = load_dataset("csv", data_files=options.data, split="train").class_encode_column("label")
classes = data.features["label"].names
tokenizer = AutoTokenizer.from_pretrained(options.model)
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64))
data = data.select_columns([*tokenizer.model_input_names, "label"]).train_test_split(0.1, seed=0)
collator = DataCollatorWithPadding(tokenizer)

model = AutoModelForSequenceClassification.from_pretrained(
    options.model, num_labels=len(classes), id2label=dict(enumerate(classes))
)
few = Calibration(data["train"], collate_fn=collator, max_batches=16)  # 128 texts
config = LoraOneConfig(
    r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS", calibration=few
)
model = get_peft_model(model, config)

training = TrainingArguments(
    options.output,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    dataloader_pin_memory=torch.cuda.is_available(),
)
trainer = Trainer(model, training, collator, data["train"], data["test"])
# The new head of MiniLM is slow at the adapter's rate, since its inputs are small.
rates = {"learning_rate": "suggested", "head_learning_rate": "suggested"}
trainer.add_callback(CalibrationCallback(trainer, **rates))
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"loss on other texts: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
model.save_pretrained(options.output)
print(f"adapter saved in {options.output}")
