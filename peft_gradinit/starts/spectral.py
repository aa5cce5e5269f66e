"""The base class of SVFit's config: options, ranks, saving; the maths is in `methods.svfit`."""

import abc
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft import LoraConfig, PeftConfig, PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..calibration import Need, Weights
from ..errors import ConfigError
from ..numbers import is_integer, use_python_numbers
from ..records import AdapterRecord, attached_record, unscaled, write_provenance
from .options import PaperSettings, check_choosable

FULL = "full"
_SAVE_FORMATS = ("lora", "compact")


@dataclass
class SpectralConfig(PaperSettings, PeftConfig, abc.ABC):
    """An adapter that trains one number for each of `r` fixed rank-one directions of the weight.

    The options are described in `peft_gradinit.SVFitConfig`.

    Raises:
        ConfigError: if an option has a value that cannot work.
    """

    name: ClassVar[str]
    method: ClassVar[str]
    paper: ClassVar[str]
    start: ClassVar[str]
    anchored: ClassVar[bool] = False
    preserves_output: ClassVar[bool] = True

    r: int | str = field(default=8, metadata={"help": "Directions of each layer, or 'full'."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, such as 'layers' or 'h'."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved in full."}
    )
    rank_pattern: dict[str, int | str] = field(
        default_factory=dict, metadata={"help": "Ranks other than r, by name or expression."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Not supported: must stay None."}
    )
    save_format: Literal["lora", "compact"] = field(
        default="lora", metadata={"help": f"What save_pretrained writes: {_SAVE_FORMATS}."}
    )

    def __post_init__(self) -> None:
        use_python_numbers(self)
        super().__post_init__()
        self.peft_type = PeftType(self.name.upper())
        self.rank_pattern = self.rank_pattern or {}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        self._check_ranks()
        self._check_layers()
        self._check_parameters()
        if self.save_format not in _SAVE_FORMATS:
            raise ConfigError(
                f"{self._name}: save_format must be one of {_SAVE_FORMATS}, got "
                f"{self.save_format!r}."
            )

    def _check_ranks(self) -> None:
        ranks = {"r": self.r} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        for name, value in ranks.items():
            if not (is_integer(value) and value >= 1) and value != FULL:
                raise ConfigError(
                    f"{self._name}: {name} must be a positive integer or {FULL!r}, got {value!r}."
                )

    def _check_layers(self) -> None:
        check_choosable(self.target_modules, self.needs(), self._name)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"{self._name}: layers_pattern={self.layers_pattern!r} needs layers_to_transform, "
                "the indices of the blocks; got None."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                f"{self._name}: layers_to_transform={self.layers_to_transform!r} needs "
                f"target_modules as a list of names, got {self.target_modules!r}; list the names, "
                "or put the indices into the regular expression."
            )

    def _check_parameters(self) -> None:
        if self.target_parameters:
            raise ConfigError(
                f"{self._name} trains singular values of linear layers, not of parameters without "
                f"a layer of their own; got target_parameters={self.target_parameters!r}. Use "
                "one of the LoRA types, such as LoraGAConfig, for experts."
            )

    @property
    def _name(self) -> str:
        return type(self).__name__

    def requested_rank(self, name: str, shape: tuple[int, int]) -> int:
        """The rank that the options ask for in a module whose weight has shape `(out, in)`.

        It may exceed the module's. `"full"` is `min(out, in)`.

        Args:
            name: full name of the module.
            shape: `(out, in)` of its weight.
        """
        r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        return r if isinstance(r, int) else min(shape)

    # Defined by the method --------------------------------------------------------------------

    @abc.abstractmethod
    def basis(self, weight: Tensor, r: int, name: str) -> tuple[Tensor, Tensor]:
        """Compute `U (out, r)` and `Vh (r, in)`, float32, from a weight `(out, in)`."""

    @abc.abstractmethod
    def factors(self, U: Tensor, delta: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `A (r, in)` and `B (out, r)` of the same function as LoRA of scaling 1."""

    @abc.abstractmethod
    def recover(
        self, A: Tensor, B: Tensor, basis: tuple[Tensor, Tensor], weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Undo `factors`: `U`, `delta`, `Vh` from the factors and a basis of the same weight."""

    @abc.abstractmethod
    def basis_options(self) -> dict[str, Any]:
        """Options that the basis depends on, for the fingerprint."""

    # Saving -----------------------------------------------------------------------------------

    @property
    def saves_lora(self) -> bool:
        """Whether a plain LoRA adapter is saved."""
        return self.save_format == "lora"

    @classmethod
    def needed(cls) -> str:
        """Name of the measured statistic, for tables: gradients, inputs, nothing, …."""
        return cls().needs().title

    @classmethod
    def saved_as(cls) -> str:
        """Form of the saved adapter for a live one of rank `r`, for tables."""
        return "LoRA of rank r, or r numbers a layer"

    @staticmethod
    def needs() -> Need:
        """The measurements of every layer that the start needs: its weight alone."""
        return Weights()

    def saved_config(self, record: AdapterRecord) -> LoraConfig:
        """The plain `LoraConfig` under which the saved factors give the live adapter's function.

        The scaling is 1 in every layer.

        Args:
            record: the record of the live adapter.
        """
        return unscaled(self, record.ranks, fan_in_fan_out=record.fan_in_fan_out)

    def to_dict(self) -> dict[str, Any]:
        """The options; those of the adapter's file once the config describes a live adapter."""
        record = attached_record(self)
        if record is None:
            return super().to_dict()
        if not self.saves_lora:
            return super().to_dict() | record.resolved
        return self.saved_config(record).to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` and, for a live adapter, `gradinit.json` beside it.

        A config that was never injected has no adapter to describe and is written as it is.

        Args:
            save_directory: the folder; made if missing.
            kwargs: passed on to PEFT.
        """
        record = attached_record(self)
        if record is not None and self.saves_lora:
            self.saved_config(record).save_pretrained(str(save_directory), **kwargs)
        else:
            super().save_pretrained(str(save_directory), **kwargs)
        if record is not None:
            write_provenance(save_directory, self, record)
