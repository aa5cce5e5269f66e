"""A plug-in for axolotl: `adapter: lora_ga`, and so for every method.

The adapter is made deferred, and gets its start from axolotl's own trainer, data and loss. Written
for the hooks of axolotl 0.19.
"""

# pyright: reportMissingImports=false

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import get_peft_model
from pydantic import BaseModel, Field

from ..errors import ConfigError
from .loading import continued
from .options import METHOD_CONFIGS, callback_of, deferred_config

_NAMES = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_exclude_modules": "exclude_modules",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_layer_replication": "layer_replication",
    "peft_ensure_weight_tying": "ensure_weight_tying",
    "peft_init_lora_weights": "init_lora_weights",
}
"""Names that PEFT has for axolotl's keys."""

_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


class GradInitArgs(BaseModel):
    """The key of this plug-in in axolotl's YAML."""

    gradinit: dict[str, Any] = Field(
        default={}, description="Options of the method's config and of CalibrationCallback."
    )


class GradInitPlugin(BasePlugin):
    """Adapters whose start is computed: `plugins: [peft_gradinit.integrations.axolotl.GradInitPlugin]`.

    `adapter` names the method; the keys `lora_…` and `peft_…` are read as for LoRA. Options of ours,
    such as `rank_allocation` or `learning_rate: suggested`, stand under `gradinit`.
    """

    def get_input_args(self) -> str:
        """Path of the key's schema; axolotl imports it."""
        return f"{__name__}.{GradInitArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The values of `adapter` that this plug-in serves."""
        return [AdapterCapabilities(name=name, lora_like=True) for name in METHOD_CONFIGS]

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse what axolotl does for its own adapters alone, or behind their layers' back.

        Args:
            cfg: axolotl's config.

        Raises:
            ConfigError: if the base is to be quantised, or kernels are to compute the adapter.
        """
        if cfg.adapter not in METHOD_CONFIGS:
            return
        if cfg.load_in_4bit or cfg.load_in_8bit:
            raise ConfigError(
                f"axolotl quantises the base for the adapters 'lora' and 'qlora' alone, got "
                f"{cfg.adapter!r}; make a start by `peft-gradinit start --quantization 4bit`, and "
                "train it with adapter: qlora and lora_model_dir."
            )
        if kernels := [name for name in _KERNELS if cfg.get(name)]:
            raise ConfigError(
                f"{', '.join(kernels)} would compute the adapter without calling the layers that a "
                f"calibration listens to; leave them out with adapter: {cfg.adapter}."
            )

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """The model with its adapter, and the config; `None` for adapters of others."""
        if cfg.adapter not in METHOD_CONFIGS:
            return None
        config = deferred_config(cfg.adapter, _lora_options(model, cfg), cfg.gradinit or {})
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            loaded = continued(model, cfg.lora_model_dir, is_trainable=not inference)
            return loaded, loaded.peft_config["default"]
        in_float32 = cfg.peft_autocast_adapter_dtype is not False
        return get_peft_model(model, config, autocast_adapter_dtype=in_float32), config

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback that computes the start when training begins."""
        if cfg.adapter not in METHOD_CONFIGS:
            return []
        callback = callback_of(trainer, cfg.gradinit or {})
        return [] if callback is None else [callback]


def _lora_options(model: Any, cfg: Any) -> dict[str, Any]:
    options = {ours: cfg.get(theirs) for theirs, ours in _NAMES.items()}
    if cfg.lora_target_linear and cfg.lora_target_modules:
        raise ConfigError(
            f"lora_target_linear=true and lora_target_modules={cfg.lora_target_modules!r} are both "
            f"given; {cfg.adapter} takes one of them."
        )
    options["target_modules"] = "all-linear" if cfg.lora_target_linear else cfg.lora_target_modules
    name = type(model).__name__
    options["task_type"] = next((t for part, t in _TASKS.items() if part in name), "CAUSAL_LM")
    return options
