"""One paper, one file: what a start needs, and its formula.

A method is a config class. `METHODS` is the one place that lists them; what a table says of a method
stands at its class: `name`, `method`, `paper`, `start`, `needs()`, `preserves_output`, `saved_as()`.
"""

from .corda import CorDAConfig
from .eva import EvaConfig, eva_factors
from .lora_ga import LoraGAConfig, lora_ga_factors
from .lora_one import LoraOneConfig, lora_one_factors
from .milora import MiLoRAConfig
from .olora import OLoRAConfig
from .pissa import PiSSAConfig
from .svfit import SVFitConfig
from .table import METHODS
