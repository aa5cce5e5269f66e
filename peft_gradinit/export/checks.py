"""Adapters whose factors cannot be written at another rank or scale."""

from collections.abc import Iterable

from peft import LoraConfig

from ..errors import ExportError
from ..records import overwrites_base


def check_base(config: LoraConfig, target: str) -> None:
    """Refuse factors that are for another base than the original one, where they would stand alone.

    Args:
        config: that of the saved adapter.
        target: the form of the export.

    Raises:
        ExportError: if the adapter's start has written into the base.
    """
    start = None
    if overwrites_base(config):
        start = f"init_lora_weights={config.init_lora_weights!r}"
    elif getattr(config, "kasa_config", None) is not None:
        start = "kasa_config"
    if start is not None:
        what = "servers load" if target == "serving" else "the factors that rank= gives are for"
        without = "" if target == "serving" else "leave rank out, "
        raise ExportError(
            f"an adapter with {start} has changed the base weights, and {what} the original ones; "
            f"{without}convert it as PEFT's documentation says, or use target='merged'."
        )


def check_truncatable(config: LoraConfig, others: Iterable[str]) -> None:
    """Refuse to cut the ranks of an adapter on other layers than linear ones.

    Args:
        config: that of the saved adapter.
        others: keys of its entries beside factors of linear layers.

    Raises:
        ExportError: if there are factors among them.
    """
    factors = sorted(key for key in others if ".lora_A" in key or ".lora_embedding_A" in key)
    if config.target_parameters or factors:
        raise ExportError(
            "rank= truncates linear layers, and this adapter has others: "
            f"{config.target_parameters or factors[:3]}; leave rank out."
        )
