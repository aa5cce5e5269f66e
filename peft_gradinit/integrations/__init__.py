"""Plug-ins for frameworks that make their adapters themselves.

A module imports its framework, so none is imported here: `axolotl`, `llamafactory`, `swift`,
`unsloth`. The names that a user writes are in the guide "Other frameworks".
"""
