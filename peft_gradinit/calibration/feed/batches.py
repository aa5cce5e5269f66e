"""Reads batches from the user's data, and moves them to the model, within a budget.

`budgeted` yields sub-batches with the facts that the loop needs. It cuts batches between sequences
where the sketches are to be oriented and where the token budget ends, so that neither depends on
the batch size. A batch that is not known to be separable is used whole.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...errors import DataError
from ...layouts import execution_device, uncompiled
from ..copying import kept_sample, own_copy
from ..spec import Calibration
from .budget import Budget, Step
from .separable import is_sliceable, sliced
from .tokens import IGNORE_INDEX, has_tokens, n_sequences, sequence_tokens

FIRST_ORIENTATION = 8
"""Sequences before the first orientation of the sketches; later ones after 3, 9, … times as many.

An eighth and three eighths of a 64-sequence calibration: on MiniLM as good as four orientations.
"""

ORIENTATION_GROWTH = 3

_TOKEN_COLUMNS = ("input_ids", "attention_mask", "labels", "decoder_input_ids", "inputs_embeds")
_LABEL_COLUMNS = ("label", "label_ids")
"""Columns that the collators of Transformers rename to `labels`."""
_DIVISOR = "num_items_in_batch"
"""What models of Transformers divide the sum of their loss by, if they are given it."""

PROBE_TOKENS = 16
"""Enough to see whether a start changes the output. A whole sequence of 512 tokens would cost 10 %
of a calibration on 4,096."""


def budgeted(
    batches: Iterable[Any],
    calibration: Calibration,
    model: nn.Module,
    budget: Budget,
    *,
    separable: bool,
) -> Iterator[Step]:
    """Yield the steps of a pass, in order, and count them in `budget`; uncut if not `separable`."""
    device = execution_device(model)
    orientation = budget.orientation or -(-FIRST_ORIENTATION // budget.n_readers)
    if budget.n_resumed and (budget.tokens_spent() or budget.batches_spent()):
        return
    for batch in islice(batches, budget.n_resumed, None):
        budget.n_batches += 1
        tokens = sequence_tokens(batch).tolist()  # before it is moved: reading there waits
        rest = _placed(batch, device)
        may_be_cut = separable and is_sliceable(rest)
        while rest is not None and not budget.tokens_spent():
            orient = budget.n_sequences >= orientation
            while budget.n_sequences >= orientation:
                orientation *= ORIENTATION_GROWTH
            budget.orientation = orientation
            part, rest = rest, None
            room = min(
                orientation - budget.n_sequences, budget.room(tokens, of_tokens=has_tokens(part))
            )
            now, tokens = tokens, []
            if may_be_cut and room < len(now):
                now, tokens = now[:room], now[room:]
                part, rest = sliced(part, 0, room), sliced(part, room, None)
            n, n_tokens = n_sequences(part), sum(now)
            step = Step(
                part,
                n,
                n_tokens,
                orient,
                has_tokens(part),
                n_batch=budget.n_batches,
                may_be_cut=may_be_cut,
                ends_batch=rest is None,
            )
            yield budget.take(step)
        if budget.tokens_spent() or budget.batches_spent():
            n_data = n_batches(calibration)
            budget.may_have_more = rest is not None or n_data is None or budget.n_batches < n_data
            return


def n_batches(calibration: Calibration) -> int | None:
    """How many batches the data hold; `None` if they do not say."""
    try:
        n = len(calibration.data)
    except (TypeError, NotImplementedError):
        return None
    if calibration.collate_fn is not None or _is_dataset(calibration.data):
        return -(-n // calibration.batch_size)
    return n


def n_orientations(n_sequences: int) -> int:
    """How often a pass over so many sequences orients its sketches, if all batches can be cut."""
    n, next_one = 0, FIRST_ORIENTATION
    while next_one < n_sequences:
        n, next_one = n + 1, next_one * ORIENTATION_GROWTH
    return n


def first_sequence(batch: Any) -> Any:
    """The beginning of the first sequence, as a batch; the whole batch if it cannot be cut.

    At most `PROBE_TOKENS` tokens, from the first that is no padding, where every tensor of the batch is a row of tokens or of labels.
    """
    if not is_sliceable(batch):
        return batch
    first = sliced(batch, 0, 1)
    if len({v.shape[1:] for v in first.values() if v.dim() > 1}) != 1:
        return first
    start = _n_padded_left(first.get("attention_mask"))
    tokens = slice(start, start + PROBE_TOKENS)
    return {k: v[:, tokens] if v.dim() == 2 else v for k, v in first.items()}


def _n_padded_left(mask: Any) -> int:
    """How many tokens of padding a sequence begins with."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.any():
        return 0
    return int((mask[0] != 0).int().argmax())


def _placed(batch: Any, device: torch.device) -> Any:
    """A copy on the device, out of reach of the user's iterator and of its inference mode."""
    if isinstance(batch, defaultdict | MappingProxyType):  # made from something else than a dict
        batch = dict(batch)
    elif isinstance(batch, Mapping):
        batch = copy.copy(batch)  # BatchEncoding.to changes its object
    return own_copy(batch, device)


def read(calibration: Calibration, model: nn.Module) -> Iterator[Any]:
    """Yield batches from the calibration's data; `model` decides the columns of dataset samples.

    Raises:
        DataError: if the data cannot be read, or hold something else than batches.
    """
    data = calibration.data
    if not isinstance(data, Iterable | Dataset) or isinstance(data, Mapping | Tensor | str):
        raise DataError(
            f"calibration data of type {type(data).__name__} cannot be iterated for batches; pass "
            "a DataLoader, a list or generator of batches, or one split of a tokenised "
            "datasets.Dataset."
        )
    if calibration.collate_fn is not None or _is_dataset(data):
        data = _batches_of_samples(calibration, model)
    for batch in data:
        yield batch if calibration.loss_fn is not None else _checked(batch)


def _is_dataset(data: Any) -> bool:
    """Whether data yield samples, not batches; `features` identifies both kinds of `datasets`."""
    return isinstance(data, Dataset) or (hasattr(data, "features") and hasattr(data, "map"))


def _batches_of_samples(calibration: Calibration, model: nn.Module) -> Iterator[Any]:
    data, collate = calibration.data, calibration.collate_fn
    is_iterable = hasattr(data, "__iter__")  # map-style torch datasets are not
    samples = iter(data) if is_iterable else (data[i] for i in range(len(data)))
    while chunk := [kept_sample(s) for s in islice(samples, calibration.batch_size)]:
        yield _collated(chunk, collate, model) if collate else _pad(chunk, model)


def _collated(samples: list[Any], collate: Callable[[list[Any]], Any], model: nn.Module) -> Any:
    """The samples as the user's function makes a batch of them.

    Raises:
        DataError: if it fails on samples with columns that `Trainer` would have dropped.
    """
    try:
        return collate(samples)
    except Exception as error:
        sample, accepted = samples[0], _forward_parameters(model)
        columns = sample if isinstance(sample, Mapping) else ()
        others = [c for c in columns if c not in accepted and c not in _LABEL_COLUMNS]
        if not others:
            raise
        raise DataError(
            f"collate_fn failed on the dataset ({error}). It was given the columns {others} as well, "
            "which the model's forward does not take and Trainer drops; if it needs none of them, "
            f"pass dataset.remove_columns({others})."
        ) from error


def _pad(samples: list[Any], model: nn.Module) -> dict[str, Tensor]:
    """Pad samples to one length and stack them; keep the columns that `forward` takes."""
    accepted = _forward_parameters(model)
    columns = {c: [torch.as_tensor(s[c]) for s in samples] for c in _columns(samples[0], accepted)}
    if "attention_mask" in accepted and "attention_mask" not in columns and "input_ids" in columns:
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    pad_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    pad_id = pad_id if isinstance(pad_id, int) and pad_id > 0 else 0
    fill = {"labels": IGNORE_INDEX, "input_ids": pad_id, "decoder_input_ids": pad_id}
    batch = {name: _pad_column(values, fill.get(name, 0)) for name, values in columns.items()}
    for name in _LABEL_COLUMNS:
        if name in batch:
            batch["labels"] = batch.pop(name)
    return batch


def _columns(sample: Any, accepted: Mapping[str, Any]) -> list[str]:
    """Columns to keep: those that `forward` takes, and labels under another name.

    Raises:
        DataError: if samples cannot be collated here.
    """
    if not isinstance(sample, Mapping):
        raise DataError(
            f"samples of type {type(sample).__name__} cannot be collated; pass collate_fn, or "
            "a dataset whose samples are dicts with input_ids."
        )
    renamed = () if "labels" in sample else _LABEL_COLUMNS
    columns = [c for c in sample if c in accepted or c in renamed]
    if not set(columns) - set(_LABEL_COLUMNS):
        raise DataError(
            f"the dataset has columns {sorted(sample)} but the model's forward takes "
            f"{sorted(accepted)}; tokenise the dataset, or pass collate_fn."
        )
    for column in columns:
        if isinstance(sample[column], str | None):
            raise DataError(
                f"column {column!r} of the dataset holds {sample[column]!r} where numbers are "
                "expected; encode or remove it, or pass collate_fn."
            )
    if torch.as_tensor(sample.get("input_ids", [0])).dim() != 1:
        raise DataError(
            "the dataset's samples hold input_ids of more than one dimension, as batches do; pass "
            "DataLoader(dataset, batch_size=None), or samples of one sequence each."
        )
    return columns


def _forward_parameters(model: nn.Module) -> Mapping[str, Any]:
    model = uncompiled(model)  # torch.compile's wrapper has no signature
    return inspect.signature(model.forward).parameters


def _pad_column(values: list[Tensor], fill: int) -> Tensor:
    if values[0].dim() == 0:
        return torch.stack(values)
    return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


def _checked(batch: Any) -> Any:
    """Drop texts, as `Trainer` does, and a divisor of the loss: losses here count by their terms.

    Raises:
        DataError: if the batch holds samples that were never collated.
    """
    if isinstance(batch, tuple | list | Tensor):
        return batch
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a calibration batch of type {type(batch).__name__} is not understood; batches are "
            "dicts, BatchEncodings, tuples or tensors; anything else needs loss_fn."
        )
    for name in _TOKEN_COLUMNS:
        value = batch.get(name)
        if isinstance(value, Tensor) and (value.dim() > 1 or name == "labels"):
            continue
        if name == "labels" and _is_of_objects(value):
            continue
        if value is not None:
            got = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"
            raise DataError(
                f"{name} of a calibration batch is {type(value).__name__} ({got}) where a tensor "
                "of sequences is expected: samples that were not collated; give the DataLoader a "
                "collate_fn (such as DataCollatorForSeq2Seq), or pass the dataset itself."
            )
    return {k: v for k, v in batch.items() if k != _DIVISOR and not _is_text(v)}


def _is_of_objects(labels: Any) -> bool:
    """Whether labels are those of a detector: for each image a dict of classes and boxes."""
    return isinstance(labels, list | tuple) and all(isinstance(of, Mapping) for of in labels)


def _is_text(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str)
