"""`python -m peft_gradinit.cli`, as under `accelerate launch -m`."""

from .app import main

if __name__ == "__main__":
    main()
