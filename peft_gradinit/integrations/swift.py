"""A plug-in for ms-swift: `--tuner_type lora_ga`, and so for every method.

`--external_plugins` takes a file, which calls `register`. The adapter is made deferred, and gets
its start from swift's own trainer, data and loss. Written for the hooks of ms-swift 4.6.
"""

# pyright: reportMissingImports=false

from typing import Any, ClassVar

from peft import get_peft_model
from swift.callbacks import TrainerCallback, callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map

from .loading import continued
from .options import METHOD_CONFIGS, callback_of, deferred_config

_NAMES = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "target_parameters": "target_parameters",
}
"""Names that PEFT has for swift's arguments."""

_TASKS = {"RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}


def register(**options: Any) -> None:
    """Make every method a `--tuner_type`, and `gradinit` a callback: `--callbacks gradinit`.

    Args:
        options: fields of the method's config, and options of `CalibrationCallback` such as
            `learning_rate="suggested"`.
    """
    for name in METHOD_CONFIGS:
        tuners_map[name] = type(f"{name}_tuner", (_Tuner,), {"method": name, "options": options})
    callbacks_map["gradinit"] = type("GradInitCallback", (_Callback,), {"options": options})


class _Tuner(PeftTuner):
    """A tuner of swift; it calls the class, never an instance."""

    method: ClassVar[str]
    options: ClassVar[dict[str, Any]]

    @classmethod
    def prepare_model(cls, args: Any, model: Any) -> Any:
        from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules

        task = args.task_type.upper()
        of_swift = {ours: getattr(args, theirs, None) for theirs, ours in _NAMES.items()}
        of_swift |= {
            "target_modules": get_target_modules(args, model),
            "modules_to_save": get_modules_to_save(args, model, task) or None,
            "task_type": None if task == "EMBEDDING" else _TASKS.get(task, task),
        }
        model.requires_grad_(False)
        return get_peft_model(model, deferred_config(cls.method, of_swift, cls.options))

    @staticmethod
    def from_pretrained(
        model: Any, model_id: str, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        return continued(model, model_id, is_trainable=is_trainable, **kwargs)


class _Callback(TrainerCallback):
    """Adds the `CalibrationCallback` once the trainer is complete: swift makes its callbacks before."""

    options: ClassVar[dict[str, Any]]

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if callback := callback_of(self.trainer, self.options):
            self.trainer.add_callback(callback)
