"""What the models of Transformers inside a model are given, whatever the batch calls it."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class ArgumentWatch:
    """Tells the arguments of each forward of a model of Transformers, by their names.

    A trainer's batch may hold texts in dicts or under names of its own, or be put together before it
    is given to the model: the model's arguments are what counts. Of models within each other, the
    outermost that is called tells.

    Args:
        model: whose parts are watched, itself among them.
        tell: called before a forward, with the arguments that are not `None`.
    """

    def __init__(self, model: nn.Module, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        self._tell: Any = torch.compiler.disable(tell)
        self._is_inside = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the forwards while the block runs."""
        with ExitStack() as stack:
            for part in self._models:
                stack.enter_context(self._told(part))
            yield

    @contextmanager
    def _told(self, part: nn.Module) -> Iterator[None]:
        """A forward that tells, not a hook: Sentence Transformers call `forward` itself."""
        own, forward = vars(part).get("forward"), part.forward
        names = list(inspect.signature(forward).parameters)

        @functools.wraps(forward)
        def telling(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return forward(*args, **kwargs)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self._tell({name: value for name, value in given.items() if value is not None})
            self._is_inside = True
            try:
                return forward(*args, **kwargs)
            finally:
                self._is_inside = False

        part.forward = telling
        try:
            yield
        finally:
            if own is None:
                del part.forward
            else:
                part.forward = own
