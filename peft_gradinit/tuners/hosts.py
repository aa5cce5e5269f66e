"""Models that have adapters: PEFT's, and others that adapters were added to without a `PeftModel`."""

from peft import PeftModel
from torch import nn


def adapter_hosts(model: nn.Module) -> list[nn.Module]:
    """The models inside a model that have adapters.

    Args:
        model: a model, inside wrappers such as FSDP1 and DDP or not.

    Returns:
        Every `PeftModel`. If there is none, the models that Transformers' `add_adapter` or PEFT's
        `inject_adapter_in_model` added adapters to.
    """
    modules = list(model.modules())
    peft_models: list[nn.Module] = [module for module in modules if isinstance(module, PeftModel)]
    return peft_models or [module for module in modules if vars(module).get("peft_config")]
