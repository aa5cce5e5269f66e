"""Finishing touches on a directory after an adapter was saved and before it goes to the Hub.

`PeftModel.push_to_hub` and `Trainer.push_to_hub` overwrite `README.md` after `save_pretrained`, and
neither PEFT nor transformers has a hook after that. So three methods of a model with an adapter of
this package are wrapped: the wrappers call the original and complete the card.
"""

from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from ..errors import ConfigError
from ..files import write_json
from .card import complete_card, is_of_peft, remove_section
from .hub import hub_id
from .names import CARD, PICTURE, PROVENANCE_FILE
from .reading import read_dict

_ALWAYS = frozenset({
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save"),
    *("peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora"),
})
"""Options that readers of `adapter_config.json` look for; PEFT 0.8 knows all of them."""

_SAVES = "_gradinit_saves"
"""Attribute of a model while its `save_pretrained` runs."""


def saved(directory: Path, adapter_name: str = "default") -> None:
    """Make a saved adapter readable for old versions of PEFT, and complete its card.

    PEFT writes every option, and PEFT before 0.14 rejects a config with an option it does not know.
    So options that have their default value are dropped.

    Args:
        directory: of the adapter.
        adapter_name: its name. PEFT saves adapters of other names than `"default"` in folders of these
            names, below that of the card; others may save them anywhere, beside any `README.md`.
    """
    if (path := directory / CONFIG_NAME).exists():
        _leave_out_defaults(path)
    is_named = adapter_name != "default" and directory.name == adapter_name
    complete_card(directory, above=is_named and is_of_peft(directory.parent / CARD))


def published(directory: Path, repo_id: str | None = None) -> None:
    """Prepare a directory of adapters for the Hub: no local path in configs, a complete card."""
    for path in _configs(directory):
        _remove_local_path(path)
    _complete_cards(directory, repo_id)


def _configs(directory: Path) -> list[Path]:
    below = directory.glob(f"*/{CONFIG_NAME}")
    # A directory with a card of its own is no adapter of this one but a checkpoint of Trainer.
    named = [path for path in below if not (path.parent / CARD).exists()]
    return [*directory.glob(CONFIG_NAME), *named]


def _complete_cards(directory: Path, repo_id: str | None = None) -> None:
    for path in _configs(directory):
        complete_card(path.parent, repo_id, above=path.parent != directory)


def unsaved(directory: Path) -> None:
    """Remove what this package wrote beside an adapter, before another is saved over it.

    PEFT replaces its own files alone. What is left of ours would tell of the adapter before.

    Args:
        directory: of the adapter; it need not exist.
    """
    if (directory / PROVENANCE_FILE).exists():
        remove_section(directory)
        (directory / PICTURE).unlink(missing_ok=True)
        (directory / PROVENANCE_FILE).unlink()


def attend(model: nn.Module) -> None:
    """Make a `PeftModel` call `published` before each upload; nothing happens to other models."""
    if isinstance(model, PeftModel):
        vars(model).setdefault("save_pretrained", partial(_save, model))
        vars(model).setdefault("create_or_update_model_card", partial(_write_card, model))
        vars(model).setdefault("_upload_modified_files", partial(_upload, model))


def card_tags(tuner: Any) -> list[str]:
    """Tags of a tuner model for cards that others write: the base model's, one for each method."""
    methods = [getattr(config, "method", "LoRA").lower() for config in tuner.peft_config.values()]
    own = [*(getattr(tuner.model, "model_tags", None) or []), "lora", *methods, "peft_gradinit"]
    return list(dict.fromkeys(own))


def write_card(model: PeftModel, directory: Path) -> None:
    """Write PEFT's card of a model into a directory, and nothing else."""
    type(model).create_or_update_model_card(model, str(directory))


def check_no_conversion(folder: object, config: Any) -> None:
    """Refuse to convert an adapter of this package for an initial model of PEFT.

    Args:
        folder: what `save_pretrained` got as `path_initial_model_for_weight_conversion`.
        config: of the adapter.

    Raises:
        ConfigError: if there is such a folder, and the adapter is of this package.
    """
    if folder is not None and hasattr(config, "method"):
        raise ConfigError(
            f"path_initial_model_for_weight_conversion={folder!r} is for starts that write into the base "
            f"model, and {type(config).__name__} leaves it as it is: its file is plain LoRA for that model "
            "already; call save_pretrained without it."
        )


def _save(model: PeftModel, *args: Any, **kwargs: Any) -> None:
    folder = kwargs.get("path_initial_model_for_weight_conversion")
    for name in kwargs.get("selected_adapters") or model.peft_config:
        check_no_conversion(folder, model.peft_config.get(name))
    vars(model)[_SAVES] = True
    try:
        type(model).save_pretrained(model, *args, **kwargs)
    finally:
        del vars(model)[_SAVES]


def _write_card(model: PeftModel, output_dir: str) -> None:
    write_card(model, Path(output_dir))
    if vars(model).get(_SAVES):  # here, where the path of the base model may stay
        _complete_cards(Path(output_dir))
    else:  # for `Trainer`, which uploads what is there next
        published(Path(output_dir))


def _upload(model: PeftModel, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    published(Path(working_dir), repo_id)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _leave_out_defaults(path: Path) -> None:
    config = read_dict(path)
    if config.get("peft_type") != "LORA":
        return
    defaults = {**LoraConfig().to_dict(), "peft_version": config.get("peft_version")}
    kept = {
        k: v for k, v in config.items() if k in _ALWAYS or k not in defaults or v != defaults[k]
    }
    write_json(path, kept)


def _remove_local_path(path: Path) -> None:
    """Remove the base model's name from a config if it is a path of this machine."""
    config = read_dict(path)
    name = config.get("base_model_name_or_path")
    if name != (known := hub_id(name)):
        config["base_model_name_or_path"] = known
        write_json(path, config)
