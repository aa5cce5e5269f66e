"""Names of the files that this package writes beside an adapter of PEFT."""

PROVENANCE_FILE = "gradinit.json"
"""The facts that `adapter_config.json` has no place for."""

PICTURE = "gradinit.png"
"""Where the ranks went, on the card."""

CARD = "README.md"
"""PEFT and `Trainer` write it as well; a section of it is ours."""
