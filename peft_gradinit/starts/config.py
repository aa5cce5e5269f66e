"""The base class of all methods' configs: a `LoraConfig` whose start is computed."""

import abc
import difflib
import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import peft
from peft import LoraConfig, PeftType
from peft.tuners.lora.config import CordaConfig
from torch import Tensor

from ..calibration import DEFERRED, RESTORED, Calibration, Need
from ..errors import ConfigError
from ..numbers import is_finite_number, is_integer, use_python_numbers
from ..records import (
    AdapterRecord,
    alpha_growth,
    attached_record,
    doubled,
    plain_config,
    write_provenance,
)
from ..statistics import Readouts
from .options import AllocationOptions, PaperSettings
from .target import Target

_UNUSABLE_OPTIONS = {
    "lora_ga_config": "that is PEFT's own LoRA-GA, whose options are fields of this config",
    "eva_config": "that is PEFT's own EVA; use peft_gradinit.EvaConfig",
    "corda_config": "that is PEFT's own CorDA; use peft_gradinit.CorDAConfig",
    "kasa_config": "KaSA rewrites the base weights",
    "arrow_config": "Arrow routes between adapters that are trained already",
    "use_bdlora": "block-diagonal factors cannot hold the start",
    "alora_invocation_tokens": "the start would be of all tokens, not of the activated ones",
    "use_qalora": "pooled inputs cannot hold the start",
    "monteclora_config": "sampled factors cannot hold the start",
    "velora_config": "compressed inputs cannot hold the start",
    "megatron_config": "Megatron layers are not supported",
    "layer_replication": "replicated layers exist only after injection; replicate them before",
    "ensure_weight_tying": "tied adapters cannot have starts of their own",
}


@dataclass
class GradInitConfig(PaperSettings, AllocationOptions, LoraConfig, abc.ABC):
    """A LoRA config whose adapter starts from a calibration pass.

    Everything of `peft.LoraConfig` keeps its meaning. `calibration` is not a field: it is shared by
    copies, absent from `to_dict()`, comparisons and `repr`, and never reaches
    `adapter_config.json`.

    `target_modules="auto"` lets the calibration choose among the layers and experts that
    `"all-linear"` stands for. Unless you give other values, that is
    `rank_allocation="gradient_energy"` (EVA: `"explained_variance"`) with `budget="parameters"`, the
    numbers that `r` on `"all-linear"` would train, `rho=4` and `min_rank=0`: layers that gain least
    for their numbers get no adapter. With `"auto+output"` the output layer, tied or not, is a
    candidate as well. It is apart because TRL refuses adapters there since 1.16 (it reads the weight
    itself), servers may not take them, and PEFT saves the weight beside them unless
    `save_pretrained(…, save_embedding_layers=False)`.

    Args:
        calibration: the data, a `Calibration(data, …)`, a `CalibrationResult` or the path of a
            saved one, or `"deferred"` to call `initialize(peft_model, data)` later or to train with
            a `CalibrationCallback`. There is no default: without it `get_peft_model` raises an error, as the adapter would be plain LoRA.
        uncalibrated: what happens to targets that the method cannot serve (embeddings,
            convolutions) or that the data do not reach: `"error"` (default), or `"lora"` for a
            plain LoRA start with a warning that names them. Single experts of `target_parameters`
            that no token is routed to get that in any case.
        rank_allocation: how the layers share the sum of their ranks. `"uniform"` (default): as
            configured. `"explained_variance"`: a rank goes where it explains the largest share of
            the layer's own statistic. `"gradient_energy"`: where it captures most of the gradient
            of all layers together. The scaling of each layer stays as it was. The ranks are in the
            report (`ranks()`) and in the saved adapter; this config does not change.
        budget: what an allocation shares out. `"ranks"` (default): the sum of the ranks, kept
            exactly; wide layers then cost no more than narrow ones, so that the number of trained
            numbers changes. `"parameters"`: as many trained numbers as without an allocation, or up
            to one rank of a layer fewer; a rank goes where it gains most for each number. A whole
            number: so many trained numbers. A number between 0 and 1: that share of the model's.
            Magnitudes of `use_dora` and biases of `lora_bias` count as trained numbers; layers that are not
            measured, such as embeddings, do not.
        rho: with an allocation, a layer can get up to `rho * r` ranks. 2, as in the EVA paper; at 1
            all ranks stay.
        min_rank: with an allocation, the least that a layer gets; at 0 it may lose its adapter.
        max_rank: with an allocation, the most that a layer gets; at least `r` and every rank of
            `rank_pattern`. Default: `rho` times the rank asked for.

    Raises:
        ConfigError: if a rank or an alpha is not positive, or an option of `LoraConfig` excludes
            this start.
    """

    name: ClassVar[str]
    """Name of the method in lower case; in upper case it is the `PeftType`."""
    method: ClassVar[str]
    """Name of the method as the paper writes it."""
    paper: ClassVar[str]
    """The paper's arXiv number."""
    start: ClassVar[str]
    """Description of the start in half a line."""
    anchored: ClassVar[bool] = False
    """Whether `s B0 A0` is subtracted from the function; see `tuners.lora.anchored`."""
    preserves_output: ClassVar[bool] = True
    """Whether the function at step 0 is the base model's."""
    reads_weights: ClassVar[bool] = False
    """Whether the factors depend on the weight, so that processes must agree on them."""

    uncalibrated: Literal["error", "lora"] = field(
        default="error",
        metadata={"help": "What happens to targets without a start: 'error' or plain 'lora'."},
    )
    calibration: InitVar[Any] = None

    def __post_init__(self, calibration: Any) -> None:
        use_python_numbers(self)
        super().__post_init__()
        # Pyright takes an `InitVar` for no attribute.
        self.calibration = self._calibration(calibration)  # pyright: ignore[reportAttributeAccessIssue]
        self.peft_type = PeftType(self.name.upper())
        self.resolve_allocation(self.target_modules, self.needs())
        self._check_numbers()
        if self.init_lora_weights is not True:
            raise ConfigError(
                f"{self._name} computes the initial weights itself; init_lora_weights must stay "
                f"True, got {self.init_lora_weights!r}."
            )
        if self.uncalibrated not in ("error", "lora"):
            raise ConfigError(
                f"{self._name}: uncalibrated must be 'error' or 'lora', got {self.uncalibrated!r}."
            )
        self.check_allocation(self.r, self.rank_pattern or {}, self.needs())
        for name, reason in _UNUSABLE_OPTIONS.items():
            if value := getattr(self, name, None):
                raise ConfigError(f"{self._name} cannot be used with {name}={value!r}: {reason}.")

    def _check_numbers(self) -> None:
        ranks = {"r": self.r}
        ranks |= {f"rank_pattern[{k!r}]": v for k, v in (self.rank_pattern or {}).items()}
        for name, value in ranks.items():
            if not is_integer(value) or value < 1:
                raise ConfigError(
                    f"{self._name}: {name} must be a positive integer, got {value!r}."
                )
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{k!r}]": v for k, v in (self.alpha_pattern or {}).items()}
        for name, value in alphas.items():
            if not is_finite_number(value) or value <= 0:
                raise ConfigError(f"{self._name}: {name} must be a positive number, got {value!r}.")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _calibration(self, value: Any) -> Any:
        if isinstance(value, peft.LoraGAConfig | peft.EvaConfig | CordaConfig):
            raise ConfigError(
                f"calibration={type(value).__name__}(…) is a sub-config of PEFT's own method, not "
                f"data; pass the calibration data, and the options as fields of {self._name}."
            )
        if value is not None and not self.needs().reads_data:
            if _is_one_of(value, RESTORED):
                return value
            raise ConfigError(
                f"{self._name} computes its start from the weights alone and reads no data; leave "
                "calibration out."
            )
        if value is None or _is_one_of(value, DEFERRED, RESTORED):
            return value
        if isinstance(value, str) and not Path(value).exists() and _is_like(value, DEFERRED):
            raise ConfigError(
                f"{self._name}: there is no calibration at {value!r}; did you mean {DEFERRED!r}?"
            )
        return Calibration.of(value)

    @property
    def is_deferred(self) -> bool:
        """Whether the start comes after the injection, from `initialize` or a saved adapter."""
        return _is_one_of(self.calibration, DEFERRED, RESTORED)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def allocates_ranks(self) -> bool:
        """Whether the calibration decides the layers' ranks."""
        restored = _is_one_of(self.calibration, RESTORED)  # pyright: ignore[reportAttributeAccessIssue]
        return self.rank_allocation != "uniform" and self.rho > 1 and not restored

    # Defined by each method -------------------------------------------------------------------

    @classmethod
    def needed(cls) -> str:
        """Name of the measured statistic, for tables: gradients, inputs, nothing, …."""
        return cls().needs().title

    @classmethod
    def saved_as(cls) -> str:
        """Form of the saved adapter for a live one of rank `r`, for tables."""
        return f"LoRA of rank {'2r' if cls.anchored else 'r'}"

    @property
    def checks_step(self) -> bool:
        """Whether the start changes the model's outputs and the loss there must be measured."""
        return False

    def allocated_alpha(self, times: float) -> float:
        """Factor for a layer's `lora_alpha` when an allocation multiplies its rank by `times`."""
        return alpha_growth(times, use_rslora=self.use_rslora)

    @abc.abstractmethod
    def needs(self) -> Need:
        """The measurements of every layer that the start needs."""

    @abc.abstractmethod
    def factors(
        self, readouts: Readouts, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Compute the start of one target.

        Args:
            readouts: measurements of the target, as `needs()` asks for.
            target: the layer or expert, with its rank, shape and weight.
            scaling: `s` of the adapter, `lora_alpha / r`.
            seed: seed of everything random; differs by target.

        Returns:
            `A0 (r, in)` and `B0 (out, r)`.
        """

    # Saving -----------------------------------------------------------------------------------

    def saved_config(self, record: AdapterRecord | None = None) -> LoraConfig:
        """The plain `LoraConfig` under which the saved factors give the live adapter's function.

        An anchored adapter of rank `r` is saved with rank `2 r` at the same scaling.

        Args:
            record: the record of the live adapter. Default: no option differs from this config's.
        """
        plain = plain_config(self, **(record.resolved if record else {}))
        return doubled(plain) if self.anchored else plain

    def to_dict(self) -> dict[str, Any]:
        """The options; those of the plain LoRA file once the config describes a live adapter.

        Scripts that save `get_peft_model_state_dict` themselves write this dict beside it.
        """
        record = attached_record(self)
        return super().to_dict() if record is None else self.saved_config(record).to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json`.

        The config of a live adapter is written as that of the adapter's plain LoRA file, with a
        `gradinit.json` beside it. Any other config is written as it is.

        Args:
            save_directory: the folder; made if missing.
            kwargs: passed on to `LoraConfig.save_pretrained`.
        """
        record = attached_record(self)
        if record is None:
            super().save_pretrained(str(save_directory), **kwargs)
            return
        self.saved_config(record).save_pretrained(str(save_directory), **kwargs)
        write_provenance(save_directory, self, record)


def _is_one_of(calibration: Any, *words: str) -> bool:
    return isinstance(calibration, str) and calibration in words


def _is_like(word: str, known: str) -> bool:
    return bool(difflib.get_close_matches(word.lower(), [known], cutoff=0.7))
