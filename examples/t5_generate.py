"""Teach a T5 to answer, and let it generate, by `python t5_generate.py`.

No package holds a pretrained T5. So a small one with random weights is made here, which shows the
steps and learns little; put `AutoModelForSeq2SeqLM.from_pretrained("google-t5/t5-small")` there.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, T5Config
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from peft_gradinit import Calibration, LoraOneConfig, init_report, suggest_learning_rate
from peft_gradinit.recipes.embedded import docstrings, pico_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--output", default="out/t5_generate")
options = parser.parse_args()
torch.manual_seed(0)

tokenizer = pico_tokenizer()
sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
shape = T5Config(vocab_size=512, eos_token_id=2, decoder_start_token_id=0, **sizes)
model = AutoModelForSeq2SeqLM.from_config(shape)


def encode(row):
    encoded = tokenizer(row["question"], truncation=True, max_length=64)
    return {**encoded, "labels": tokenizer(row["module"] + tokenizer.eos_token).input_ids}


data = docstrings("train")  # each asks which module a docstring is from
rows = data.map(encode, remove_columns=data.column_names).train_test_split(64, seed=0)
collator = DataCollatorForSeq2Seq(tokenizer, model)
few = Calibration(rows["train"], collate_fn=collator, max_batches=16)  # 128 pairs
config = LoraOneConfig(
    r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_2_SEQ_LM", calibration=few
)
model = get_peft_model(model, config)
print(init_report(model).summary())
training = Seq2SeqTrainingArguments(
    options.output,
    learning_rate=suggest_learning_rate(model).suggested,
    max_steps=options.steps,
    per_device_train_batch_size=16,
    dataloader_pin_memory=torch.cuda.is_available(),
    predict_with_generate=True,
    generation_max_length=32,
    report_to="none",
)
trainer = Seq2SeqTrainer(model, training, collator, rows["train"], rows["test"])
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.predict(rows["test"])
print(f"loss on other pairs: {before:.3f} before, {after.metrics['test_loss']:.3f} after")
print("generated:", tokenizer.batch_decode(after.predictions[:6], skip_special_tokens=True))
model.save_pretrained(options.output)
print(f"adapter saved in {options.output}")
