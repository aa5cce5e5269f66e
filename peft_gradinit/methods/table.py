"""The table of methods: the one place that lists them.

What a table says of a method stands at its class: `name`, `method`, `paper`, `start`, `needs()`,
`preserves_output`, `saved_as()`.
"""

from .corda import CorDAConfig
from .eva import EvaConfig
from .lora_ga import LoraGAConfig
from .lora_one import LoraOneConfig
from .milora import MiLoRAConfig
from .olora import OLoRAConfig
from .pissa import PiSSAConfig
from .svfit import SVFitConfig

METHODS = (
    LoraGAConfig,
    LoraOneConfig,
    EvaConfig,
    CorDAConfig,
    PiSSAConfig,
    MiLoRAConfig,
    OLoRAConfig,
    SVFitConfig,
)
