"""A start for unsloth: `with_start` in place of `FastLanguageModel.get_peft_model`.

unsloth computes its LoRA layers in kernels of its own, which know plain LoRA alone and do not call
the layers that a calibration listens to. So the start is computed on the base model, and goes on as
a plain adapter, in the way in which `FastLanguageModel.from_pretrained` loads one. Written for
unsloth 2026.10.
"""

# pyright: reportMissingImports=false

import tempfile
from typing import Any, cast

from peft import PeftModel, get_peft_model

from ..errors import ConfigError
from ..records import InitReport, LearningRate, init_report
from ..starts import GradInitConfig


def with_start(
    model: Any, config: GradInitConfig, *, use_gradient_checkpointing: Any = "unsloth"
) -> tuple[Any, LearningRate]:
    """Add a LoRA adapter with a computed start to a model of unsloth.

    Args:
        model: the first thing that `FastLanguageModel.from_pretrained` returns.
        config: a `LoraOneConfig` or an `EvaConfig` with `calibration=` data; the others keep their
            start fixed beside the adapter, which plain LoRA cannot.
        use_gradient_checkpointing: as in `FastLanguageModel.get_peft_model`.

    Returns:
        The model to train, and the learning rate to begin with.

    Raises:
        ConfigError: if the config is of another kind, or deferred.
    """
    from unsloth import FastLanguageModel  # pyright: ignore[reportAttributeAccessIssue] not this file

    _check(config)
    started = cast("PeftModel", get_peft_model(model, config))
    report = cast("InitReport", init_report(started))
    with tempfile.TemporaryDirectory() as folder:
        started.save_pretrained(folder)
        base = started.unload()
        plain = PeftModel.from_pretrained(base, folder, is_trainable=True)
    patched = FastLanguageModel.patch_peft_model(plain, use_gradient_checkpointing)
    return patched, cast("LearningRate", report.learning_rate)


def _check(config: Any) -> None:
    if not isinstance(config, GradInitConfig) or config.anchored:
        raise ConfigError(
            f"with_start takes a LoraOneConfig or an EvaConfig, got {type(config).__name__}: "
            "unsloth trains plain LoRA alone."
        )
    if config.is_deferred or config.calibration is None:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            f"with_start needs {type(config).__name__}(calibration=data): once unsloth has the "
            "adapter, its layers cannot be measured any more."
        )
