"""What saving is for all types: PEFT's entries in the form of the file, and a note of them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..records import (
    attach_record,
    attend,
    check_no_conversion,
    note_entries,
    padding_token,
    record_of,
)


class RecordedSaves:
    """A tuner model that notes what PEFT saves; must come before PEFT's class among the bases."""

    @classmethod
    def _check_savable(cls, model: nn.Module, adapter_name: str) -> None:
        """Refuse, if need be, to save an adapter."""

    @classmethod
    def _form_of_file(
        cls, model: nn.Module, config: Any, adapter_name: str, entries: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The entries of a live adapter as the file holds them."""
        raise NotImplementedError

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        cls._check_savable(model, adapter_name)
        attend(model)
        record = record_of(model, adapter_name)
        attach_record(config, record)
        if record is not None:
            record.padding = padding_token(model)
        entries = super()._get_adapter_state_dict(  # pyright: ignore[reportAttributeAccessIssue]
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        check_not_empty(entries, state_dict, adapter_name)
        _check_whole(entries, adapter_name)
        entries = cls._form_of_file(model, config, adapter_name, entries)
        remove = cls._remove_adapter_name_from_key  # pyright: ignore[reportAttributeAccessIssue]
        note_entries(record, {remove(key, adapter_name): v for key, v in entries.items()})
        return entries

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: Any,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: Any,
        kwargs: Any,
    ) -> dict[str, Tensor]:
        check_no_conversion(path_initial_model_for_weight_conversion, peft_config)
        return super()._convert_state_dict_for_initial_model(  # pyright: ignore[reportAttributeAccessIssue]
            peft_model,
            peft_config,
            path_initial_model_for_weight_conversion,
            output_state_dict,
            kwargs,
        )


def check_not_empty(
    entries: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], adapter_name: str
) -> None:
    """Refuse to save an adapter of which a state dict holds nothing.

    An empty state dict is that of a process that does not save.

    Args:
        entries: the adapter's entries in the state dict.
        state_dict: the state dict of the model.
        adapter_name: the adapter's name.

    Raises:
        ConfigError: if the state dict has entries, but none of the adapter.
    """
    if state_dict and not entries:
        raise ConfigError(
            f"the state dict has {len(state_dict)} entries ({next(iter(state_dict))}, …), but none "
            f"of adapter {adapter_name!r}, which would be saved empty; pass the state dict of the "
            "whole model (under FSDP that of the outermost module), with the names that PEFT gave."
        )


def _check_whole(entries: Mapping[str, Tensor], adapter_name: str) -> None:
    """Refuse to save what ZeRO-3 or FSDP leave of a factor in one process.

    PEFT warns of it for its own types alone, and writes a file that does not load.

    Raises:
        ConfigError: if a factor is no matrix, or empty.
    """
    for key, tensor in entries.items():
        factor = ".lora_A" in key or ".lora_B" in key
        if factor and not key.endswith("bias") and (tensor.dim() < 2 or not tensor.numel()):
            raise ConfigError(
                f"{key} of adapter {adapter_name!r} has shape {tuple(tensor.shape)} where a matrix "
                "is expected: it is what ZeRO-3 or FSDP leave in one process; gather the state dict "
                "and pass it, as save_pretrained(folder, state_dict=accelerator.get_state_dict("
                "model)) does."
            )
