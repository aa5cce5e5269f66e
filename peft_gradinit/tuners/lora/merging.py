"""What is checked before PEFT merges adapters into their base."""

from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from ...errors import ConfigError
from ...starts import loses_merges
from .saving import check_started


class CheckedMerges(LoraModel):
    """`peft.LoraModel` that refuses merges which would lose an adapter."""

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Merge like PEFT.

        Raises:
            NotInitializedError: if an adapter has no start yet, since the bare base would come back.
            ConfigError: if PEFT cannot merge into a weight.
        """
        check_started(self.model, adapter_names or self.active_adapters, "merge")
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer) and loses_merges(layer.get_base_layer()):
                raise ConfigError(
                    f"PEFT cannot merge into the optimum-quanto weight of {name}, which would drop "
                    "the adapter; save the adapter and merge it into the unquantised model."
                )
