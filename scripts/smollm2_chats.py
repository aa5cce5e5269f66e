"""Functions as chats for SmolLM2, as the benchmarks read them."""

from typing import Any

from torch.utils.data import DataLoader

from peft_gradinit.recipes import Reader, load_rows
from peft_gradinit.recipes.collation import collator
from peft_gradinit.recipes.schema import DataSection, ModelSection

MODEL = ModelSection(name="embedded:smollm2", dtype="float32")


def loader(n: int, batch_size: int) -> DataLoader:
    """The first `n` chats, padded, of at most 192 tokens."""
    section = DataSection(path="embedded:functions", max_length=192)
    rows = load_rows(section)
    reader = Reader.of(MODEL, section, rows)
    encoded = list(reader.encode(rows.select(range(n))))
    collate: Any = collator(reader.processor)
    return DataLoader(encoded, batch_size=batch_size, collate_fn=collate)
