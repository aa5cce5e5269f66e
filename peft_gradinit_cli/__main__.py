"""`python -m peft_gradinit_cli`, as under `accelerate launch -m`."""

from . import main

if __name__ == "__main__":
    main()
