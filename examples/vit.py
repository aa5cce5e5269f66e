"""Adapt a vision transformer with `Trainer`, by `python vit.py`.

No package holds a pretrained ViT. So a small one is made here and learns the digits 0 to 4 first; it
stands for `ViTForImageClassification.from_pretrained(…, num_labels=10)`.
"""

import argparse

import torch
from peft import get_peft_model
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from peft_gradinit import Calibration, LoraOneConfig, init_report, suggest_learning_rate

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="out/vit")
options = parser.parse_args()
torch.manual_seed(0)

digits = load_digits()  # 1,797 images of 8 x 8 pixels; yours go through an AutoImageProcessor
images = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)
low, high = (digits.target < 5).nonzero()[0], (digits.target >= 5).nonzero()[0]


def collate(rows):
    return {"pixel_values": images[rows], "labels": torch.tensor(digits.target[rows])}


sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
sizes |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 2, "num_channels": 1}
model = ViTForImageClassification(ViTConfig(num_labels=10, **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for rows in low[torch.randint(len(low), (200, 32))]:
    model(**collate(rows)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

few = Calibration(high[200:], collate_fn=collate, max_batches=16)  # 128 images
config = LoraOneConfig(
    r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"], calibration=few
)
model = get_peft_model(model, config)
print(init_report(model).summary())
training = TrainingArguments(
    options.output,
    learning_rate=suggest_learning_rate(model).suggested,
    max_steps=options.steps,
    per_device_train_batch_size=32,
    dataloader_pin_memory=torch.cuda.is_available(),
    remove_unused_columns=False,
    report_to="none",
)
trainer = Trainer(model, training, collate, high[200:], high[:200])
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"loss on other images: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
model.save_pretrained(options.output)
print(f"adapter saved in {options.output}")
