"""Registration of new PEFT types.

`peft.PeftType` is a closed enum and `register_peft_method` insists on a member, so the enum is
extended first. Both steps are idempotent: importing the package twice changes nothing.
"""

from aenum import extend_enum
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def register(
    name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner], prefix: str = "lora_"
) -> None:
    """Make PEFT know a type, so that `get_peft_model(model, config_cls(…))` works.

    Args:
        name: lower-case name, such as `"lora_ga"`; the enum member is its upper case.
        config_cls: config whose `peft_type` is that member.
        model_cls: tuner to build for it.
        prefix: what the names of its parameters start with; the tuner's own `prefix`.
    """
    if name.upper() in PeftType.__members__:
        return
    extend_enum(PeftType, name.upper(), name.upper())
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix)
