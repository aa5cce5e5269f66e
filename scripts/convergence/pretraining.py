"""Pretrain a small model once, and keep it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .settings import Pretraining

Rows = dict[str, Tensor]
CACHE = Path("out/convergence/pretrained")
BASES = Path(__file__).parent / "bases"


def pretrained(
    recipe: Pretraining, make: Callable[[dict], PreTrainedModel], draw: Callable[..., Rows]
) -> Path:
    """Folder of the model of a recipe; trains it if the study has none, and it is not there yet.

    Args:
        recipe: how.
        make: the model, from `recipe.model`.
        draw: `draw(n, generator)` gives a batch of `n` rows.
    """
    if recipe.weights is not None:
        return BASES / recipe.weights
    folder = CACHE / recipe.key
    if not (folder / "config.json").exists():
        torch.manual_seed(recipe.seed)
        model = train(make(recipe.model), recipe, draw)
        model.save_pretrained(folder)
        (folder / "recipe.json").write_text(recipe.model_dump_json(indent=1), encoding="utf-8")
    return folder


def train(model: PreTrainedModel, recipe: Pretraining, draw: Callable[..., Rows]):
    """AdamW with warmup and cosine."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    model.train()
    for step in range(recipe.steps):
        loss = model(**draw(recipe.batch_size, generator)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"pretraining, step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()
