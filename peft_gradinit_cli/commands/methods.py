"""The methods that are calibrated, as the help tells them.

They are those of `peft_gradinit.methods.METHODS`, which cannot be imported without torch.
"""

CALIBRATED = {
    "lora_ga": "leading singular vectors of the gradient (needs gradients)",
    "lora_one": "one normalised low-rank gradient step (needs gradients)",
    "eva": "principal components of the layer's inputs (needs inputs)",
    "corda": "parts of the weight, ordered by what the inputs need "
    "(needs second moments of the inputs)",
}
"""Where an adapter starts, and what is measured for it, by the method's name."""

HELP = " ".join(f"{name}: {start}." for name, start in CALIBRATED.items())

PLAIN = ("lora_one", "eva")
"""Those that a plain LoRA adapter holds as they are trained: nothing is fixed beside it."""

HELP_OF_PLAIN = " ".join(f"{name}: {CALIBRATED[name]}." for name in PLAIN)
