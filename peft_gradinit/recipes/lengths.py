"""How long a sequence may be: what was asked for, and what the model has positions for."""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, warn
from .data_section import DEFAULT_LENGTH, DataSection
from .models import empty_model
from .schema import ModelSection

_NO_LIMIT = 10**9
"""Tokenizers without a limit say 1e30."""

_IS_TABLE = re.compile("pos|wpe")
_MAX_OFFSET = 2
"""Rows before the first position, which some tables have besides those that the config counts."""


def sequence_length(data: DataSection, model: ModelSection, processor: Any = None) -> int:
    """Tokens that a sequence may have.

    Without a `max_length` it is 1,024, or what the model or its tokenizer is made for where that
    is less.

    Args:
        data: what was asked for.
        model: which model.
        processor: its tokenizer or image processor, if it is known.

    Returns:
        The length.

    Raises:
        ConfigError: if more was asked for than the model has positions for.
    """
    empty = empty_model(model)
    named, table = _named(empty), table_length(empty)
    asked = data.max_length
    if asked is None:
        limits = [DEFAULT_LENGTH, named, table]
        if isinstance(processor, PreTrainedTokenizerBase):
            limits.append(processor.model_max_length)
        return min(limit for limit in limits if limit is not None)
    if table is not None and asked > table:
        raise ConfigError(
            f"max_length={asked}, but {model.name!r} has positions for {table} tokens; give "
            f"{table} or less, or leave it out: longer texts are cut."
        )
    if table is None and named is not None and asked > named:
        warn(
            f"max_length={asked} is more than the {named} positions that the config of "
            f"{model.name!r} names; the model runs, but was not made for them."
        )
    return asked


def table_length(model: nn.Module) -> int | None:
    """Tokens that the model has positions for.

    Args:
        model: on any device, also meta.

    Returns:
        The number; `None` if positions are not looked up in a table (rotary, relative), so that
        longer sequences run.
    """
    named = _named(model)
    if named is None:
        return None
    sizes = [
        (module.num_embeddings, module.padding_idx)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _IS_TABLE.search(name.rpartition(".")[2])
    ]
    sizes += [
        (len(tensor), None)
        for name, tensor in model.named_buffers()
        if name.endswith("embed_positions") and tensor.dim() == 2
    ]
    # Tables of images, or of distances, have other sizes. Where there is a row for padding, the
    # positions begin behind it (RoBERTa: 514 rows, 512 tokens).
    fitting = [
        min(named, n if padding is None else n - padding - 1)
        for n, padding in sizes
        if named <= n <= named + _MAX_OFFSET
    ]
    return min(fitting, default=None)


def _named(model: Any) -> int | None:
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return named if isinstance(named, int) and 0 < named < _NO_LIMIT else None
