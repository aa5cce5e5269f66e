"""`Calibration`: which data a pass reads, how much of them, and how it measures."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader

from ..errors import ConfigError
from ..layouts import is_sharded
from ..numbers import is_integer, use_python_numbers
from .result import CalibrationResult
from .resume import Checkpoint

DEFAULT_MAX_TOKENS = 65_536
"""Budget if none is given: 128 sequences of 512 tokens, the most that the LoRA-GA authors use."""

DEFAULT_MAX_SEQUENCES = 128
"""Budget of sequences that are not of tokens (audio clips, images, series), if none is given."""

DEFERRED = "deferred"
"""The value of `calibration=` that postpones the pass to `initialize` or the Trainer callback."""

RESTORED = "restored"
"""The value of `calibration=` in configs whose adapter gets its start from a saved one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What the calibration pass reads and how.

    Copies of a config share this object: `copy.deepcopy` returns it as it is, since data loaders
    and data sets are not to be duplicated.

    Args:
        data: a `DataLoader`; any iterable of batches (dict, `BatchEncoding`, tuple, tensor); a
            tokenised `datasets.Dataset`, map-style or streaming; a `CalibrationResult` or the path
            of a saved one.
        max_tokens: budget in input tokens, padding not counted. The pass stops at the first
            sequence that reaches it. Sequences that are not of tokens (audio clips, images, series)
            count as one each. Default, if `max_batches` is not given either: 65,536, but 128
            sequences that are not of tokens.
        max_batches: budget in batches of `data`. Default: no limit of its own, since batches are of
            any size and tokens say better how much is measured.
        estimator: `"sketch"` (default) keeps `O(sketch_size (out + in))` floats a layer, or the exact
            statistic where that is smaller; `"dense"` always keeps the exact one, `(out, in)` floats
            for gradients and `(in, in)` for inputs: for small models, or to check a sketch.
        sketch_size: columns of the sketches; unused by `"dense"`. Default: `2 * n + 80` for
            `n` triplets that the method needs of a layer, for gradients at most `4 * n + 48`. On
            MiniLM the error is then 1.04 times that of the exact rank-16 gradient, 1.06 in the worst
            layer; more columns cost memory and time in proportion.
        loss_fn: `loss_fn(model, batch)` returns a scalar loss, or `(loss, weight)` with the number
            of tokens (or pairs, …) that it is the mean of. Default: `model(**batch).loss`, weighted
            by the labels that are not -100.
        loss_is_collective: whether `loss_fn` communicates with the other processes, which must all call
            it equally often then: a loss over the batches of all devices, for instance. Default: no.
        collate_fn: makes a batch from samples when `data` are samples: a dataset, or any iterable
            of samples. Default, for datasets: pads `input_ids`, `attention_mask` and `labels`, and
            drops columns that the model's `forward` lacks.
        batch_size: samples in a batch when `data` are samples. 8 fits where training fits, as weights
            get no gradient; larger is faster on a GPU. Does not change the result.
        seed: seed of the test matrices and of everything random in `data`, such as a shuffling
            loader. Fixed at 0, so that a second run, or another process, finds the same start.
        accelerator: the user's `accelerate.Accelerator`, if its autocast is to be used. None is
            ever created here.
        progress: show a progress bar of what is read. On by default: a pass may take minutes.
        checkpoint: where to keep the unfinished sums, so that a killed pass continues to the same
            result; for one process. The data must give the same batches in the same order again.
            Default: nowhere, since most passes take no longer than loading the model.

    Raises:
        ConfigError: if an option has a value that cannot work.
    """

    data: Any
    _: dataclasses.KW_ONLY
    max_tokens: int | None = None
    max_batches: int | None = None
    estimator: Literal["sketch", "dense"] = "sketch"
    sketch_size: int | None = None
    loss_fn: Callable[[Any, Any], Any] | None = None
    loss_is_collective: bool = False
    collate_fn: Callable[[list[Any]], Any] | None = None
    batch_size: int = 8
    seed: int = 0
    accelerator: Any = None
    progress: bool = True
    checkpoint: Checkpoint | None = None

    def __post_init__(self) -> None:
        use_python_numbers(self)
        if self.data is None:
            raise ConfigError(
                "Calibration(data=None) has nothing to read; pass a DataLoader, an iterable of "
                "batches, a tokenised dataset, or the path of a saved CalibrationResult."
            )
        if self.estimator not in ("sketch", "dense"):
            raise ConfigError(
                f"estimator must be 'sketch' or 'dense', got {self.estimator!r}; 'sketch' is the "
                "default."
            )
        for name in ("max_tokens", "max_batches", "sketch_size", "batch_size"):
            value = getattr(self, name)
            if value is None and name != "batch_size":
                continue
            if not is_integer(value) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
        if not is_integer(self.seed):
            raise ConfigError(f"seed must be an integer, got {self.seed!r}.")
        self._check_functions()

    def _check_functions(self) -> None:
        for name in ("loss_fn", "collate_fn"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name} must be a function, got {value!r}.")
        if self.collate_fn is not None and isinstance(self.data, DataLoader):
            raise ConfigError(
                "collate_fn makes batches from samples, but a DataLoader gives batches; pass it to "
                "the DataLoader, or pass the loader's dataset here."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calibration":
        return self

    @classmethod
    def of(cls, value: Any) -> "Calibration":
        """Wrap whatever a user may pass as `calibration=`."""
        return value if isinstance(value, cls) else cls(value)

    @property
    def token_budget(self) -> int | None:
        """`max_tokens`, or its default when no budget at all was given."""
        if self.max_tokens is None and self.max_batches is None:
            return DEFAULT_MAX_TOKENS
        return self.max_tokens

    @property
    def sequence_budget(self) -> int | None:
        """The default for sequences that are not of tokens; `None` if a budget was given."""
        given = self.max_tokens is not None or self.max_batches is not None
        return None if given else DEFAULT_MAX_SEQUENCES

    def must_run_equally(self, model: nn.Module) -> bool:
        """Whether a process that runs the model less often than others leaves them waiting."""
        return is_sharded(model) or self.loss_is_collective

    def saved_result(self) -> CalibrationResult | None:
        """The result that `data` is or is the path of; `None` if `data` are batches or samples."""
        if isinstance(self.data, CalibrationResult):
            return self.data
        if isinstance(self.data, str | os.PathLike):
            return CalibrationResult.load(self.data)
        return None

    def measurement_options(self) -> dict[str, Any]:
        """Options that shape the measurement; recorded in the fingerprint of its result."""
        return {
            "estimator": self.estimator,
            "sketch_size": self.sketch_size,
            "seed": self.seed,
            "max_tokens": self.token_budget,
            "max_batches": self.max_batches,
        }

    def demanded_options(self) -> dict[str, Any]:
        """The measurement options that a user set away from their defaults."""
        default = type(self)(()).measurement_options()
        return {k: v for k, v in self.measurement_options().items() if v != default[k]}
