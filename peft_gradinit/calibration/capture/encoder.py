"""Which inputs of a two-part model are of the encoder's tokens."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EncoderWatch:
    """Tells the encoder's tokens from the decoder's, which lengths cannot if both are as long.

    The encoder's are what its own layers read, and what it gives to the decoder's cross-attention.

    Args:
        encoder: `None` if it is not known.
    """

    def __init__(self, encoder: nn.Module | None) -> None:
        self._encoder = encoder
        self._runs = False
        self._output: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the encoder's forwards while the block runs."""
        encoder = self._encoder
        if encoder is None:
            yield
            return
        handles = [
            encoder.register_forward_pre_hook(self._begin),
            encoder.register_forward_hook(self._end),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._output = None

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._runs, self._output = True, None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._runs = False
        values = output.values() if isinstance(output, Mapping) else output
        values = [output] if isinstance(output, Tensor) else values
        self._output = next((value for value in values if isinstance(value, Tensor)), None)

    def owns(self, x: Tensor) -> bool | None:
        """Whether an input is of the encoder's tokens; `None` if the encoder is not known."""
        if self._encoder is None:
            return None
        if self._runs:
            return True
        output = self._output
        if output is None or x.shape != output.shape:
            return False
        return x is output or torch.equal(x, output.to(x))


def encoder_of(model: Any) -> nn.Module | None:
    """The encoder that a model of Transformers names; `None` if it names none apart from itself."""
    get: Callable[[], Any] | None = getattr(model, "get_encoder", None)
    encoder = None if get is None else get()
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None
