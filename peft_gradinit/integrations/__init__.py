"""Plug-ins for frameworks that make their adapters themselves, and what they share.

`axolotl`, `llamafactory`, `swift` and `unsloth` import their framework, so nothing imports them here.
A script of your own needs `deferred_config` and `callback_of` alone.
"""

from .options import callback_of, deferred_config
