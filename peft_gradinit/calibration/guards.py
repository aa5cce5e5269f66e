"""The model is left as it was found, also when the user's code raises or is interrupted.

`left_as_found` is the one context in which the pass touches the user's model and process. It sets
the following for the pass and restores it in reverse order:

- every module in eval mode (no dropout, so the gradient is a property of the data alone). Modules
  that checkpoint are the exception, since they do so in train mode only: their own flag is on,
  whatever it was (`from_pretrained` returns models in eval mode), and their dropout rates are zero;
- 4-bit layers of bitsandbytes unpacked: evaluated on some CPUs they pack their weight for good, and
  a packed weight passes no gradient on;
- reentrant checkpointing replaced by the non-reentrant kind, under which taps work;
- `use_cache` off; compiled code run eagerly, since compiled graphs ignore hooks added later;
- the random state of torch, numpy and Python, and of the generators of the user's data loader;
- the epochs that the loader and its samplers have counted, which decide the order of the next one;
- models that ZeRO-3 has partitioned made runnable without an engine;
- torch's fast path of transformer layers off, which runs past hooks and adapters;
- cuDNN off for models with recurrent layers, since its backward pass refuses eval mode;
- inference mode off and gradients on, whatever the caller's mode.
"""

import functools
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from ..layouts import resharded, runnable

_HOLDERS = (
    "loader",
    "base_dataloader",
    "sampler",
    "batch_sampler",
    "dataset",
    "collate_fn",
    "data_collator",
)
"""Attributes of loaders, samplers and their wrappers that may hold a generator or count epochs."""


_ONE_PASS = threading.RLock()


@contextmanager
def left_as_found(model: nn.Module, data: Any, seed: int) -> Iterator[None]:
    """Prepare model and process for the pass and restore them at the end.

    A second thread waits, since what is restored (random states, the modes of a model) belongs to
    all threads.

    `seed` is for everything random in the block; generators inside a `DataLoader` are restored too.
    """
    modules = list(model.modules())
    with (
        _ONE_PASS,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),
        _slow_path(),
        _recurrent(modules),
        _randomness(data, seed),
        _workers(data),
        _epochs(data),
        _modes(model, modules),
        _unpacked(modules),
        _attributes(modules),
        runnable(model),
        resharded(model),
    ):
        yield


@contextmanager
def _slow_path() -> Iterator[None]:
    # Torch's fast path of transformer layers reads the weights of linear layers past their hooks
    # and adapters.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _recurrent(modules: Sequence[nn.Module]) -> Iterator[None]:
    # Torch's own kernels give the same gradients, in both modes.
    recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = enabled and not recurrent
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def _randomness(data: Any, seed: int) -> Iterator[None]:
    found = generators(data)
    states = [g.get_state() for g in found]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with _forked():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def _forked() -> AbstractContextManager[None]:
    """Put the random states of the CPU and of all devices back at the end of a block."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.random.fork_rng(devices=())
    # Devices by name: without them, fork_rng warns where there are several.
    devices = range(torch.accelerator.device_count())
    return torch.random.fork_rng(devices=devices, device_type=accelerator.type)


def generators(loader: Any) -> list[torch.Generator]:
    """Generators that iterating over a `DataLoader` would advance, also inside nested samplers."""
    found = (getattr(holder, "generator", None) for holder in _holders(loader))
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _holders(loader: Any) -> list[Any]:
    """A loader with all that it is made of: its data, samplers, collator and what they wrap."""
    found: dict[int, Any] = {}
    waiting = [loader]
    while waiting:
        holder = waiting.pop()
        if holder is not None and id(holder) not in found:
            found[id(holder)] = holder
            waiting += [getattr(holder, name, None) for name in _HOLDERS]
    return list(found.values())


@contextmanager
def _workers(data: Any) -> Iterator[None]:
    """Give the pass workers of its own where a loader keeps them, whose random states go on."""
    loaders = [h for h in _holders(data) if isinstance(h, DataLoader) and "_iterator" in vars(h)]
    kept = [loader._iterator for loader in loaders]
    for loader in loaders:
        loader._iterator = None
    try:
        yield
    finally:
        for loader, iterator in zip(loaders, kept, strict=True):
            loader._iterator = iterator


@contextmanager
def _epochs(data: Any) -> Iterator[None]:
    """Put counted epochs back, and Accelerate's list of loaders, which one that is left early stays on."""
    holders = _holders(data)
    counted = [
        (vars(holder), name, vars(holder)[name])
        for holder in holders
        for name in ("epoch", "iteration")
        if type(getattr(holder, "__dict__", {}).get(name)) is int
    ]
    found = [getattr(holder, "gradient_state", None) for holder in holders]
    states: list[Any] = [state for state in found if hasattr(state, "dataloader_references")]
    references = [list(state.dataloader_references) for state in states]
    try:
        yield
    finally:
        for fields, name, value in counted:
            fields[name] = value
        for state, loaders in zip(states, references, strict=True):
            state.dataloader_references = loaders


@contextmanager
def _modes(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Set eval mode, but train mode for modules that checkpoint."""
    modes = [(module, module.training) for module in modules]
    try:
        model.eval()
        for module, _ in modes:
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def _unpacked(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Unpack packed 4-bit weights; afterwards the packed ones are back, bit for bit."""
    packed = []
    try:
        for module in modules:
            state = _state_of_4bit(module)
            if getattr(state, "packing_format_for_cpu", False):
                packed.append((module.weight, module.weight.data, state, dict(vars(state))))
                module.state_dict()  # unpacks the module's own weight, rounding its scales
        yield
    finally:
        for weight, data, state, fields in packed:
            weight.data = data
            vars(state).clear()
            vars(state).update(fields)


def _state_of_4bit(module: nn.Module) -> Any:
    """The quantisation state of a 4-bit layer of bitsandbytes; `None` for other modules."""
    # Not `module.weight`, which other modules may have to compute.
    return getattr(module._parameters.get("weight"), "quant_state", None)


@contextmanager
def _attributes(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Set plain attributes for the pass and put the old values back."""
    changed = []
    try:
        for holder, name, value in _temporary_values(modules):
            changed.append((holder, name, getattr(holder, name)))
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in reversed(changed):
            setattr(holder, name, value)


def _temporary_values(modules: Sequence[nn.Module]) -> list[tuple[Any, str, Any]]:
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    values: list[tuple[Any, str, Any]] = [
        (c, "use_cache", False) for c in configs.values() if getattr(c, "use_cache", False) is True
    ]
    for module in modules:
        # With this flag bitsandbytes packs 4-bit weights when they are evaluated.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            values.append((module, "support_avx512bf16_for_cpu", False))
        if not getattr(module, "gradient_checkpointing", False):
            continue
        if hasattr(module, "_gradient_checkpointing_func"):
            function = functools.partial(checkpoint, use_reentrant=False)
            values.append((module, "_gradient_checkpointing_func", function))
        # It is in train mode, where its own dropout and layerdrop would be active.
        for holder in (module, getattr(module, "config", None)):
            rates = [k for k, v in _attributes_of(holder) if "drop" in k and type(v) is float]
            values += [(holder, name, 0.0) for name in rates]
    return values


def _attributes_of(holder: Any) -> list[tuple[str, Any]]:
    return list(getattr(holder, "__dict__", {}).items())
