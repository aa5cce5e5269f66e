#!/usr/bin/env python
"""Run a recipe: `accelerate launch scripts/finetune.py configs/FILE.yaml [section.key=value …]`.

The same as `peft-gradinit train`, without an installed command.
"""

import sys

from peft_gradinit_cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
