"""The config that all methods share: a `LoraConfig` that knows where its start comes from."""

import abc
import math
import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar, Literal

import peft
from peft import LoraConfig
from torch import Tensor, nn

from ..calibration import DEFERRED, Calibration, CalibrationResult, Measurable
from ..errors import ConfigError
from ..linalg import TruncatedSVD
from ..statistics import Fingerprint
from .allocation import ALLOCATIONS as _ALLOCATIONS
from .allocation import RankAllocation, check_allocation
from .combining import plain_config
from .numbers import is_finite_number, is_integer
from .provenance import write_provenance
from .report import InitReport
from .targets import Target

_UNUSABLE_OPTIONS = {
    "lora_ga_config": "that is PEFT's own LoRA-GA, whose options are fields of this config",
    "eva_config": "that is PEFT's own EVA; use peft_gradinit.EvaConfig",
    "corda_config": "that is another initialisation",
    "kasa_config": "KaSA rewrites the base weights",
    "arrow_config": "Arrow routes between adapters that are trained already",
    "use_bdlora": "block-diagonal factors cannot hold the start",
    "use_qalora": "pooled inputs cannot hold the start",
    "monteclora_config": "sampled factors cannot hold the start",
    "velora_config": "compressed inputs cannot hold the start",
    "megatron_config": "Megatron layers are not supported",
    "layer_replication": "replicated layers exist only after injection; replicate them before",
    "ensure_weight_tying": "tied adapters cannot have starts of their own",
}


@dataclass
class GradInitConfig(LoraConfig, abc.ABC):
    """A LoRA config whose adapter starts from a calibration pass.

    Everything of `peft.LoraConfig` keeps its meaning. `calibration` is not a field: it is shared by
    copies, absent from `to_dict()`, comparisons and `repr`, and never reaches
    `adapter_config.json`.

    Args:
        calibration: the data, a `Calibration(data, …)`, a `CalibrationResult` or the path of a
            saved one, or `"deferred"` to call `initialize(peft_model, data)` later, or to train with a
            `CalibrationCallback`. There is no default: an adapter without it would be plain LoRA.
        uncalibrated: what happens to targets that the method cannot serve (embeddings,
            convolutions) or that the data do not reach: `"error"` (default), or `"lora"` for a
            plain LoRA start with a warning that names them. Single experts of `target_parameters`
            that no token is routed to get that in any case.
        rank_allocation: how the layers share the sum of their ranks. `"uniform"` (default): as
            configured. `"explained_variance"`: a rank goes where it explains the largest share of
            the layer's own statistic. `"gradient_energy"`: where it captures most of the gradient
            of all layers together. The sum is kept exactly; `rank_pattern` and `alpha_pattern` say
            what came out, and the scaling of each layer stays.
        rho: with an allocation, a layer can get up to `rho * r` ranks. 2, as in the EVA paper; at 1
            all ranks stay.
        min_rank: with an allocation, the least that a layer gets; at 0 it may lose its adapter.
        max_rank: with an allocation, the most that a layer gets; at least `r` and every rank of
            `rank_pattern`. Default: `rho` times the rank asked for.

    Raises:
        ConfigError: if a rank or an alpha is not positive, or an option of `LoraConfig` excludes
            this start.
    """

    method: ClassVar[str]
    statistic: ClassVar[str]
    anchored: ClassVar[bool]

    uncalibrated: Literal["error", "lora"] = field(
        default="error",
        metadata={"help": "What happens to targets without a start: 'error' or plain 'lora'."},
    )
    rank_allocation: RankAllocation = field(
        default="uniform", metadata={"help": f"How layers share their ranks: {_ALLOCATIONS}."}
    )
    rho: float = field(default=2.0, metadata={"help": "Ranks that a layer may get, over r."})
    min_rank: int = field(default=1, metadata={"help": "The least rank of a layer."})
    max_rank: int | None = field(default=None, metadata={"help": "The largest rank of a layer."})
    calibration: InitVar[Any] = None

    def __post_init__(self, calibration: Any) -> None:
        super().__post_init__()
        # An `InitVar` that stays, which pyright does not know.
        self.calibration = self._calibration(calibration)  # pyright: ignore[reportAttributeAccessIssue]
        self.restored = False
        self.copy_of: str | None = None
        self.requested_ranks: dict[str, int] = {}
        self.init_report: InitReport | None = None
        self.fingerprint: Fingerprint | None = None
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
        check_allocation(self)
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
        if isinstance(value, peft.LoraGAConfig | peft.EvaConfig):
            raise ConfigError(
                f"calibration={type(value).__name__}(…) is a sub-config of PEFT's own method, not "
                f"data; pass the calibration data, and the options as fields of {self._name}."
            )
        if value is None or _is_deferred(value):
            return value
        return Calibration.of(value)

    @property
    def is_deferred(self) -> bool:
        """Whether the start is filled in after injection, by `initialize` or from a checkpoint."""
        return self.restored or _is_deferred(self.calibration)  # pyright: ignore[reportAttributeAccessIssue]

    # What a method fills in -------------------------------------------------------------------

    @property
    def checks_step(self) -> bool:
        """Whether the start moves the function, and its loss is to be measured."""
        return False

    @property
    def allocates_ranks(self) -> bool:
        """Whether the layers' ranks are decided from what was measured."""
        return self.rank_allocation != "uniform" and self.rho > 1

    def same_scaling(self, times: float) -> float:
        """By how much `lora_alpha` grows with `times` the rank, so that the scaling stays."""
        return math.sqrt(times) if self.use_rslora else times

    def allocated_alpha(self, times: float) -> float:
        """By how much `lora_alpha` of a layer grows to which an allocation gives `times` its rank."""
        return self.same_scaling(times)

    @abc.abstractmethod
    def rank_limit(self, shape: tuple[int, int]) -> int:
        """The largest `r` for which an `(out, in)` layer has enough singular triplets."""

    @abc.abstractmethod
    def n_triplets(self, r: int) -> int:
        """How many triplets a start of rank `r` needs."""

    def rank_scores(self, triplets: TruncatedSVD) -> Tensor:
        """What each further rank of a layer adds, in squared singular values: `(max rank,)`."""
        return triplets.S.double().square()

    def measured_options(self) -> dict[str, Any]:
        """Options of the method that shape the measurement; a saved result must agree in them."""
        return {}

    @abc.abstractmethod
    def measure(
        self,
        model: nn.Module,
        modules: Mapping[str, Measurable],
        calibration: Calibration,
        fingerprint: Fingerprint,
    ) -> CalibrationResult:
        """Run the pass that the method needs."""

    @abc.abstractmethod
    def factors(
        self, triplets: TruncatedSVD, target: Target, scaling: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Compute the start `A0 (r, in)`, `B0 (out, r)` of one target."""

    # What is saved ----------------------------------------------------------------------------

    def saved_config(self) -> LoraConfig:
        """The plain `LoraConfig` under which the saved factors give the live adapter's function.

        An anchored adapter of rank `r` is saved with rank `2 r`; `lora_alpha` grows by 2 (rsLoRA:
        by the root of 2), which keeps the scaling. The same holds for the patterns.
        """
        plain = plain_config(self)
        if self.anchored:
            growth = self.same_scaling(2)
            plain.r = 2 * self.r
            plain.lora_alpha = growth * self.lora_alpha  # pyright: ignore[reportAttributeAccessIssue]
            plain.rank_pattern = {k: 2 * v for k, v in (self.rank_pattern or {}).items()}
            plain.alpha_pattern = {k: growth * v for k, v in (self.alpha_pattern or {}).items()}
        return plain

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` of the plain LoRA adapter, and `gradinit.json` beside it.

        Args:
            save_directory: the folder; made if missing.
            kwargs: passed on to `LoraConfig.save_pretrained`.
        """
        self.saved_config().save_pretrained(str(save_directory), **kwargs)
        write_provenance(save_directory, self)


def _is_deferred(calibration: Any) -> bool:
    return isinstance(calibration, str) and calibration == DEFERRED
