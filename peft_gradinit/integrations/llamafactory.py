"""A start for LLaMA-Factory: `python -m peft_gradinit.integrations.llamafactory train.yaml`.

`key=value` after the file wins over it, as for `llamafactory-cli train`.

LLaMA-Factory has no hook for adapters, but continues from a saved one (`adapter_name_or_path`). So
the start is computed on its own model, data, template and collator, saved in `output_dir/start`,
and LLaMA-Factory trains from there. Written for LLaMA-Factory 0.9.5, supervised fine-tuning.
"""

# pyright: reportMissingImports=false

import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from llamafactory.data import (
    SFTDataCollatorWith4DAttentionMask,
    get_dataset,
    get_template_and_fix_tokenizer,
)
from llamafactory.hparams import get_train_args, read_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.model.model_utils.misc import find_all_linear_modules, find_expanded_modules
from llamafactory.model.model_utils.visual import patch_target_modules
from llamafactory.train.tuner import run_exp
from peft import PeftModel, get_peft_model

from ..calibration import Calibration
from ..errors import ConfigError
from ..layouts import process_state
from ..records import InitReport, init_report
from ..starts import GradInitConfig
from .options import METHOD_CONFIGS, deferred_config

_OF_CALIBRATION = ("max_tokens", "max_batches", "estimator", "seed")


def train(arguments: Mapping[str, Any]) -> None:
    """Compute a start and train from it.

    Args:
        arguments: those of `llamafactory-cli train`, and `gradinit`: `method` (`lora_one` or `eva`),
            budgets of the calibration, and fields of the method's config. `learning_rate:
            suggested` takes that of the start.

    Raises:
        ConfigError: if the method or the run has no start that LLaMA-Factory could continue from.
    """
    theirs = dict(arguments)
    options = dict(theirs.pop("gradinit", None) or {})
    suggested = theirs.get("learning_rate") == "suggested"
    if suggested:
        theirs["learning_rate"] = 1e-4  # until the start is there
    if theirs.get("adapter_name_or_path"):
        raise ConfigError(
            f"adapter_name_or_path={theirs['adapter_name_or_path']!r} is an adapter already; leave "
            "it out for a new start, or run llamafactory-cli train."
        )
    folder = Path(theirs["output_dir"]) / "start"
    report = _saved_start(theirs, options, folder)
    if suggested and report.learning_rate:
        theirs["learning_rate"] = report.learning_rate.suggested
    run_exp({**theirs, "adapter_name_or_path": str(folder)})


def _saved_start(theirs: dict[str, Any], options: dict[str, Any], folder: Path) -> InitReport:
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(dict(theirs))
    if (finetuning_args.stage, finetuning_args.finetuning_type) != ("sft", "lora"):
        raise ConfigError(
            f"a start is for stage: sft and finetuning_type: lora, got {finetuning_args.stage!r} and "
            f"{finetuning_args.finetuning_type!r}."
        )
    budget = {name: options.pop(name) for name in _OF_CALIBRATION if name in options}
    config = _config(finetuning_args, options)
    tokenizer_module = load_tokenizer(model_args)
    tokenizer = tokenizer_module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    rows = get_dataset(
        template, model_args, data_args, training_args, stage="sft", **tokenizer_module
    )
    model: Any = load_model(tokenizer, model_args, finetuning_args, is_trainable=False)
    if config.target_modules is None:
        config.target_modules = _targets(model, finetuning_args)  # pyright: ignore[reportAttributeAccessIssue]
    if model_args.resize_vocab and config.modules_to_save is None:
        config.modules_to_save = _embeddings(model)
    config.calibration = Calibration(  # pyright: ignore[reportAttributeAccessIssue]
        rows["train_dataset"],
        collate_fn=SFTDataCollatorWith4DAttentionMask(
            template=template,
            model=model,
            label_pad_token_id=-100,
            block_diag_attn=model_args.block_diag_attn,
            neat_packing=data_args.neat_packing,
            attn_implementation=getattr(model.config, "_attn_implementation", None),
            compute_dtype=model_args.compute_dtype,
            **tokenizer_module,
        ),
        **budget,
    )
    started = cast("PeftModel", get_peft_model(model.to(training_args.device), config))
    state = process_state()
    if state.is_main_process:
        started.save_pretrained(str(folder))
        print(init_report(started))  # noqa: T201 LLaMA-Factory reports on standard output as well
    state.wait_for_everyone()
    report = cast("InitReport", init_report(started))
    del model, started
    gc.collect()
    return report


def _targets(model: Any, finetuning_args: Any) -> str | set[str]:
    """The layers that LLaMA-Factory would adapt: without a frozen vision tower, say."""
    targets = finetuning_args.lora_target
    if targets == ["all"]:
        targets = find_all_linear_modules(model, finetuning_args.freeze_vision_tower)
    if finetuning_args.use_llama_pro:
        targets = find_expanded_modules(model, targets, finetuning_args.freeze_trainable_layers)
    targets = patch_target_modules(model, finetuning_args, targets)
    return targets if isinstance(targets, str) else set(targets)


def _embeddings(model: Any) -> list[str]:
    """What LLaMA-Factory trains in full where the vocabulary was resized."""
    resized = (model.get_input_embeddings(), model.get_output_embeddings())
    named = model.named_modules()
    return sorted({n.rpartition(".")[2] for n, m in named if any(m is one for one in resized)})


def _config(finetuning_args: Any, options: dict[str, Any]) -> GradInitConfig:
    """The config of the start; its targets are those of the framework, unless options give some."""
    name = options.pop("method", "lora_one")
    kind = METHOD_CONFIGS.get(name)
    if kind is None or not issubclass(kind, GradInitConfig) or kind.anchored:
        raise ConfigError(
            f"gradinit.method must be 'lora_one' or 'eva', got {name!r}: LLaMA-Factory trains plain "
            "LoRA alone, and the other methods keep their start fixed beside it."
        )
    of_framework = {
        "r": finetuning_args.lora_rank,
        "lora_alpha": finetuning_args.lora_alpha,
        "lora_dropout": finetuning_args.lora_dropout,
        "use_rslora": finetuning_args.use_rslora,
        "use_dora": finetuning_args.use_dora,
        "modules_to_save": finetuning_args.additional_target,
        "task_type": "CAUSAL_LM",
    }
    return cast("GradInitConfig", deferred_config(name, of_framework, options))


def main() -> None:
    """Train as a file says, and values `key=value` that win over it.

    Raises:
        ConfigError: if there is no file of YAML or JSON; LLaMA-Factory would also take flags.
    """
    arguments = read_args() if sys.argv[1:] else []
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"expected a file ending in .yaml, .yml or .json, and key=value after it, got "
            f"{sys.argv[1:]}; write the flags into a file."
        )
    train(arguments)


if __name__ == "__main__":
    main()
