"""Records of live adapters, kept on the base model: the results of injection and start.

A config holds the user's options and is the very object that the user passed. The ranks that the
layers got, the report of the start and its fingerprint are in the adapter's record.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..statistics import Fingerprint
from .names import class_names, padding_token
from .publishing import card_tags
from .report import InitReport

_ATTRIBUTE = "_gradinit_records"
"""Attribute of the base model with the records by adapter name, beside PEFT's `peft_config`."""

_RECORD = "_gradinit_record"
"""Attribute of an injected config with the record of the adapter that it describes."""


@dataclasses.dataclass
class AdapterRecord:
    """The record of one live adapter.

    Attributes:
        name: of the adapter.
        resolved: options that were injected with another value than the user's: patterns with the
            ranks that the layers got, exclusions of layers that lost their adapter; and the targets,
            since names take the place of a word.
        ranks: rank of every adapted layer, by name in the base model.
        requested_ranks: rank that the config asked for, by name, of layers that got another one.
        fan_in_fan_out: the option of the saved config; for SVFit, whose live config lacks it.
        report: the report on the start; `None` for deferred adapters.
        fingerprint: the model, targets and options of the start; `None` for deferred adapters.
        copy_of: the deferred adapter whose start this one becomes a copy of.
        entries: keys and digest of the entries that PEFT took to write them; `None` if none are to
            be written.
        config: the config of the adapter, the one that the user passed.
        classes: names of a classifier's outputs, in their order; `None` if it has none.
        padding: the padding token that a classifier of sequences had when it was saved.
        asked: `target_modules` of the config before the injection, such as `"auto"`.
    """

    name: str = "default"
    resolved: dict[str, Any] = dataclasses.field(default_factory=dict)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    requested_ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    fan_in_fan_out: bool = False
    report: InitReport | None = None
    fingerprint: Fingerprint | None = None
    copy_of: str | None = None
    entries: tuple[frozenset[str], str] | None = None
    config: Any = dataclasses.field(default=None, repr=False, compare=False)
    classes: list[str] | None = None
    padding: int | None = None
    asked: Any = None


def records_of(model: nn.Module) -> dict[str, AdapterRecord]:
    """The model's own dict of records by adapter name; a new one if the model has none."""
    holder = _holder(model)
    return {} if holder is None else vars(holder)[_ATTRIBUTE]


def record_of(model: nn.Module, adapter_name: str) -> AdapterRecord | None:
    """The record of an adapter that the model has; `None` if there is no such adapter or record.

    Transformers deletes an adapter without its tuner. The record stays then, and another adapter
    may have the name by now.
    """
    holder = _holder(model)
    if holder is None:
        return None
    record = vars(holder)[_ATTRIBUTE].get(adapter_name)
    config = vars(holder).get("peft_config", {}).get(adapter_name)
    return record if record is not None and record.config is config else None


def told_record(peft_model: Any, adapter_name: str) -> AdapterRecord:
    """The record of an adapter; for one of PEFT, a record of what its model tells.

    Args:
        peft_model: of PEFT.
        adapter_name: which adapter.

    Returns:
        The record.
    """
    base = peft_model.get_base_model()
    return record_of(peft_model, adapter_name) or AdapterRecord(
        classes=class_names(base), padding=padding_token(base)
    )


def _holder(model: nn.Module) -> nn.Module | None:
    """The base model inside a model, which has the records and PEFT's `peft_config`."""
    return next((m for m in (model, *model.modules()) if _ATTRIBUTE in vars(m)), None)


def keep_record(base: nn.Module, adapter_name: str, record: AdapterRecord | None) -> None:
    """Keep the record of an adapter in place of an earlier one; `None` removes that one."""
    records = vars(base).setdefault(_ATTRIBUTE, {})
    if record is None:
        records.pop(adapter_name, None)
    else:
        record.classes = class_names(base)
        records[adapter_name] = record


def attach_record(config: Any, record: AdapterRecord | None) -> None:
    """Tell a config which adapter it describes from now on; several may share one config.

    PEFT saves an adapter's weights and then calls `save_pretrained` of its config without the
    adapter's name.
    """
    vars(config)[_RECORD] = record


def attached_record(config: Any) -> AdapterRecord | None:
    """The record of the adapter that a config describes; `None` if it was never injected."""
    return vars(config).get(_RECORD)


def targets_asked(config: Any, model: nn.Module) -> Any:
    """The `target_modules` that a config means for a model.

    PEFT replaces a word such as `"all-linear"` by the names that it means for one model. For another
    one, which may have more layers, the config means the word again.

    Args:
        config: maybe injected before.
        model: that it is to be injected into.

    Returns:
        A word, a pattern, or names.
    """
    before = attached_record(config)
    is_here = any(record is before for record in records_of(model).values())
    if before is None or is_here or config.target_modules != before.resolved.get("target_modules"):
        return config.target_modules
    return before.asked


class WithReports:
    """A tuner model whose adapters have records; must come before PEFT's class among the bases."""

    model: nn.Module

    @property
    def init_report(self) -> Mapping[str, InitReport]:
        """Reports by adapter name.

        Deferred adapters have none, nor have loaded ones unless `load_for_training` restored it.
        """
        found = {name: init_report(self.model, name) for name in records_of(self.model)}
        return {name: report for name, report in found.items() if report}

    @property
    def model_tags(self) -> list[str]:
        """Tags that `Trainer` and TRL put on the cards that they write."""
        return card_tags(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does, and its record."""
        super().delete_adapter(adapter_name)  # pyright: ignore[reportAttributeAccessIssue]
        keep_record(self.model, adapter_name, None)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge and unload as PEFT does, and forget the records."""
        merged = super().merge_and_unload(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        vars(self.model).pop(_ATTRIBUTE, None)
        return merged

    def unload(self) -> nn.Module:
        """Unload as PEFT does, put back the modules that were trained in full, and forget the records.

        PEFT alone leaves the trained copies in the base model.
        """
        originals = {
            name: module.original_module
            for name, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
        }
        unloaded = super().unload()  # pyright: ignore[reportAttributeAccessIssue]
        for name, module in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(unloaded.get_submodule(parent), child, module)
        vars(self.model).pop(_ATTRIBUTE, None)
        return unloaded


def init_report(peft_model: nn.Module, adapter_name: str = "default") -> InitReport | None:
    """The report on the start of an adapter.

    Args:
        peft_model: a model with an adapter of this package.
        adapter_name: which adapter.

    Returns:
        The report, which prints as a table; `None` for a deferred adapter, and for one of PEFT.
    """
    record = record_of(peft_model, adapter_name)
    return record.report if record else None
