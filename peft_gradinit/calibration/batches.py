"""Batches from whatever users have, moved to the model, within a budget.

`budgeted` yields sub-batches with the facts that the loop needs. It cuts batches between
sequences where the sketches are to be oriented and where the token budget ends, so that neither
depends on the batch size; a batch that cannot be cut is taken whole.
"""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .spec import Calibration
from .tokens import n_input_tokens, n_sequences

FIRST_ORIENTATION = 8
"""Sequences before the first orientation of the sketches; the next come after 3, 9, … times as many.

An eighth and three eighths of a 64-sequence calibration: on MiniLM as good as four orientations.
"""


@dataclasses.dataclass
class Step:
    """One sub-batch of the pass.

    Attributes:
        batch: on the model's device.
        n_sequences: its leading dimension.
        n_tokens: its input tokens, padding not counted.
        orient: orient the sketches before adding this sub-batch.
        ends_batch: whether a batch of the data ends here.
    """

    batch: Any
    n_sequences: int
    n_tokens: int
    orient: bool
    ends_batch: bool


class Budget:
    """Counts what was read and says why reading ended."""

    def __init__(self, calibration: Calibration) -> None:
        self.max_tokens = calibration.token_budget
        self.max_batches = calibration.max_batches
        self.n_tokens = self.n_sequences = self.n_batches = 0
        self.stopped_by = "end of data"

    def exhausted(self) -> bool:
        """Whether to stop, and note the reason."""
        if self.max_tokens is not None and self.n_tokens >= self.max_tokens:
            self.stopped_by = "max_tokens"
        elif self.max_batches is not None and self.n_batches >= self.max_batches:
            self.stopped_by = "max_batches"
        return self.stopped_by != "end of data"

    def take(self, step: Step) -> Step:
        """Count a step."""
        self.n_tokens += step.n_tokens
        self.n_sequences += step.n_sequences
        self.n_batches += step.ends_batch
        return step


def budgeted(calibration: Calibration, model: nn.Module, budget: Budget) -> Iterator[Step]:
    """Yield the steps of a pass.

    Args:
        calibration: data and budgets.
        model: decides the device and the columns of dataset samples.
        budget: counts along, and holds the reason for the end.

    Yields:
        Sub-batches in order.

    Raises:
        DataError: if the data are empty or have a form that is not understood.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), "cpu")
    orientation = FIRST_ORIENTATION
    for batch in _batches(calibration, model):
        parts = [send_to_device(batch, device)]
        while parts and not budget.exhausted():
            part = parts.pop(0)
            orient = budget.n_sequences >= orientation
            orientation *= 3 if orient else 1
            room = orientation - budget.n_sequences
            if calibration.loss_fn is None and (cut := _cut(part, room, budget)):
                part, rest = _slice(part, 0, cut), _slice(part, cut, None)
                parts.insert(0, rest)
            yield budget.take(
                Step(part, n_sequences(part), n_input_tokens(part), orient, ends_batch=not parts)
            )
        if budget.exhausted():
            return


def first_sequence(batch: Any) -> Any:
    """The first sequence of a batch, as a batch; the whole batch if it cannot be cut."""
    return _slice(batch, 0, 1) if _is_sliceable(batch) else batch


def _cut(batch: Any, room: int, budget: Budget) -> int | None:
    """Where to cut a batch: at the next orientation, or where the token budget is reached."""
    if not _is_sliceable(batch) or n_sequences(batch) < 2:
        return None
    cut = min(room, n_sequences(batch))
    if budget.max_tokens is not None:
        left = budget.max_tokens - budget.n_tokens
        while cut > 1 and n_input_tokens(_slice(batch, 0, cut - 1)) >= left:
            cut -= 1
    return cut if 0 < cut < n_sequences(batch) else None


def _is_sliceable(batch: Any) -> bool:
    """Whether every tensor of a dict batch has the same leading dimension."""
    if not isinstance(batch, Mapping):
        return False
    if not all(isinstance(v, Tensor) and v.dim() > 0 for v in batch.values()):
        return False
    return len({v.shape[0] for v in batch.values()}) == 1


def _slice(batch: Mapping[str, Tensor], start: int, stop: int | None) -> dict[str, Tensor]:
    return {key: value[start:stop] for key, value in batch.items()}


def _batches(calibration: Calibration, model: nn.Module) -> Iterator[Any]:
    data = calibration.data
    if _is_dataset(data):
        data = _batches_of_samples(calibration, model)
    elif not isinstance(data, Iterable) or isinstance(data, Mapping | Tensor | str):
        raise DataError(
            f"calibration data of type {type(data).__name__} cannot be iterated for batches; pass "
            "a DataLoader, a list or generator of batches, or a tokenised datasets.Dataset."
        )
    for batch in data:
        yield _checked(batch)


def _is_dataset(data: Any) -> bool:
    """A dataset yields samples, not batches; both kinds of `datasets` are told by `features`."""
    return isinstance(data, Dataset) or (hasattr(data, "features") and hasattr(data, "map"))


def _batches_of_samples(calibration: Calibration, model: nn.Module) -> Iterator[Any]:
    samples = iter(_samples(calibration.data))
    while chunk := list(islice(samples, calibration.batch_size)):
        yield calibration.collate_fn(chunk) if calibration.collate_fn else _pad(chunk, model)


def _samples(dataset: Any) -> Iterable[Any]:
    if isinstance(dataset, Dataset) and not hasattr(dataset, "__iter__"):
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=None)
        return loader
    return dataset


def _pad(samples: list[Any], model: nn.Module) -> dict[str, Tensor]:
    """Stack samples of different lengths; keeps the columns that `forward` takes."""
    if not isinstance(samples[0], Mapping):
        raise DataError(
            f"samples of type {type(samples[0]).__name__} cannot be collated; pass collate_fn, or "
            "a dataset whose samples are dicts with input_ids."
        )
    accepted = inspect.signature(model.forward).parameters
    columns = [c for c in samples[0] if c in accepted or c == "label"]
    if not columns:
        raise DataError(
            f"the dataset has columns {sorted(samples[0])} but {type(model).__name__}.forward takes "
            f"{sorted(accepted)}; tokenise the dataset, or pass collate_fn."
        )
    pad_id = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    fill = {"labels": -100, "input_ids": pad_id, "decoder_input_ids": pad_id}
    batch = {
        c: _pad_column([torch.as_tensor(s[c]) for s in samples], fill.get(c, 0)) for c in columns
    }
    if "label" in batch:
        batch["labels"] = batch.pop("label")
    if "input_ids" in batch and "attention_mask" in accepted and "attention_mask" not in batch:
        lengths = [len(s["input_ids"]) for s in samples]
        batch["attention_mask"] = _pad_column([torch.ones(n, dtype=torch.long) for n in lengths], 0)
    return batch


def _pad_column(values: list[Tensor], fill: int) -> Tensor:
    if values[0].dim() == 0:
        return torch.stack(values)
    return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)


def _checked(batch: Any) -> Any:
    """Refuse samples that were never collated."""
    if isinstance(batch, Mapping):
        untensored = {
            k: type(v).__name__ for k, v in batch.items() if isinstance(v, list | int | str)
        }
        if untensored:
            raise DataError(
                f"a calibration batch holds {untensored} where tensors are expected: these look "
                "like single samples; pass a DataLoader, or Calibration(dataset, collate_fn=…)."
            )
        return dict(batch)
    if isinstance(batch, tuple | list | Tensor):
        return batch
    raise DataError(
        f"a calibration batch of type {type(batch).__name__} is not understood; batches are dicts, "
        "BatchEncodings, tuples or tensors (anything else needs loss_fn and a dict around it)."
    )
