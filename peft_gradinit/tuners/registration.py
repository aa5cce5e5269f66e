"""Registration of the types with PEFT.

`peft.PeftType` is a closed enum and `register_peft_method` insists on a member, so the enum is
extended first. Both steps are idempotent: importing the package twice changes nothing.
"""

from typing import Any

from aenum import extend_enum
from peft import PeftType
from peft.utils import register_peft_method

from ..starts import GradInitConfig
from .lora import GradInitModel
from .svfit import SVFitModel


def register(config_cls: Any) -> None:
    """Add a method to PEFT, so that `get_peft_model(model, config_cls(…))` works.

    The upper case of `config_cls.name` becomes its `PeftType`.
    """
    name = config_cls.name
    if name.upper() in PeftType.__members__:
        return
    model_cls = GradInitModel if issubclass(config_cls, GradInitConfig) else SVFitModel
    extend_enum(PeftType, name.upper(), name.upper())
    register_peft_method(
        name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
    )
