"""What happens to a directory after an adapter was saved to it and before it goes to the Hub.

`PeftModel.push_to_hub` and `Trainer.push_to_hub` write `README.md` after `save_pretrained`, over the
one that is there, and neither PEFT nor transformers has a hook behind that. So a model with an
adapter of this package gets two methods of its own, which call the original and then the listeners.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from ..files import write_json

listeners: list[Callable[[Path, str | None], object]] = []
"""Called with a directory that an adapter was saved to, and the repository that it goes to if it is
known; how parts of the package above this one add their files."""

_ALWAYS = frozenset({
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save"),
    *("peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora"),
})
"""What readers of `adapter_config.json` look for; PEFT 0.8 knows all of it."""


def saved(directory: Path) -> None:
    """Make a saved adapter readable for old versions of PEFT, and tell the listeners of it.

    PEFT writes all options that it knows, and versions before 0.14 fail on the first that they do
    not. So later options are written only where they are set.

    Args:
        directory: that an adapter or a merged model was saved to.
    """
    if (path := directory / CONFIG_NAME).exists():
        _leave_out_defaults(path)
    for listener in listeners:
        listener(directory, None)


def published(directory: Path, repo_id: str | None = None) -> None:
    """Make a directory ready for the Hub: no local path in its configs, a complete card.

    Args:
        directory: holds adapters, or directories of adapters.
        repo_id: where it goes.
    """
    below = directory.glob(f"*/{CONFIG_NAME}")
    # A directory with a card of its own is no adapter of this one but a checkpoint of Trainer.
    named = [path for path in below if not (path.parent / "README.md").exists()]
    for path in (*directory.glob(CONFIG_NAME), *named):
        _name_no_path(path)
        for listener in listeners:
            listener(path.parent, repo_id)


def attend(model: nn.Module) -> None:
    """Let this model call `published` whenever something of it goes to the Hub.

    Args:
        model: what is being saved; nothing happens if it is no `PeftModel`.
    """
    if isinstance(model, PeftModel):
        vars(model).setdefault("create_or_update_model_card", partial(_write_card, model))
        vars(model).setdefault("_upload_modified_files", partial(_upload, model))


def hub_id(name: str | None) -> str | None:
    """The name of a repository on the Hub as it is; `None` for local paths and for nothing."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def card_tags(tuner: Any) -> list[str]:
    """Tags for cards that others write: those of the base model, and one for each method.

    Args:
        tuner: a tuner model of this package.

    Returns:
        Tags without repetitions.
    """
    methods = [getattr(config, "method", "LoRA").lower() for config in tuner.peft_config.values()]
    own = [*(getattr(tuner.model, "model_tags", None) or []), "lora", *methods, "peft_gradinit"]
    return list(dict.fromkeys(own))


def _write_card(model: PeftModel, output_dir: str) -> None:
    type(model).create_or_update_model_card(model, output_dir)
    published(Path(output_dir))


def _upload(model: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    published(Path(working_dir), repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _leave_out_defaults(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        return
    defaults = {**LoraConfig().to_dict(), "peft_version": config.get("peft_version")}
    known = {
        k: v for k, v in config.items() if k in _ALWAYS or k not in defaults or v != defaults[k]
    }
    write_json(path, known)


def _name_no_path(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if name != (known := hub_id(name)):
        config["base_model_name_or_path"] = known
        write_json(path, config)
