"""Rows of tokens, concatenated to sequences of one length."""

from itertools import chain
from typing import Any


def pack(columns: dict[str, list[Any]], *, length: int) -> dict[str, list[Any]]:
    """Concatenate rows and cut them into sequences of `length`; the last one may be shorter.

    Args:
        columns: lists of tokens by column, as a batched `map` gives them.
        length: of the sequences.

    Returns:
        The same columns with fewer rows.
    """
    packed = {}
    for name, rows in columns.items():
        tokens = list(chain.from_iterable(rows))
        packed[name] = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    return packed
