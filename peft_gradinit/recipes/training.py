"""`training` of a recipe: every field of the class of arguments by which its task is trained."""

import dataclasses
import enum
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticSchemaGenerationError,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from ..errors import warn
from ..optim import OPTIMIZERS
from ..trainer import SUGGESTED, is_like_adam
from .sections import Place, Positive, Section, Task, nearest

ARGUMENTS: dict[Task, type[TrainingArguments]] = {
    "CAUSAL_LM": SFTConfig,
    "PREFERENCE": DPOConfig,
    "SEQ_2_SEQ_LM": Seq2SeqTrainingArguments,
    "SEQ_CLS": TrainingArguments,
    "IMAGE_CLS": TrainingArguments,
}
"""The class whose fields `training` has, by task."""

PAIR_OPTIMIZERS = tuple(kind.name for kind in OPTIMIZERS)
"""Names of the optimisers of `peft_gradinit.optim`."""
_OPTIMIZERS = (*(name.value for name in OptimizerNames), *PAIR_OPTIMIZERS)

EARLIER_NAMES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "warmup": "warmup_steps",
    "schedule": "lr_scheduler_type",
    "adam_betas": "adam_beta1 and adam_beta2",
    "precision": "bf16 or fp16",
    "resume": "resume_from_checkpoint",
}
"""Names that recipes had before they took those of the class of arguments."""

UNKNOWN = "no_such_key"
"""Type of the fault of a key that there is not."""

SECRET = "hub_token"
"""Is not written into results."""

NotNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]


def _suggested_or_positive(value: Any) -> Any:
    """A learning rate: one fault for a union of types, of which each would be one."""
    try:
        positive = (
            not isinstance(value, bool) and 0 < float(value) < math.inf
        )  # YAML reads 3e-4 as text
    except (TypeError, ValueError):
        positive = False
    if value != SUGGESTED and not positive:
        raise ValueError("should be 'suggested' or a number greater than 0")
    return value if value == SUGGESTED else float(value)


class TrainingSection(Section):
    """The arguments of the trainer, by their own names.

    `CAUSAL_LM` takes every field of TRL's `SFTConfig`, `PREFERENCE` of its `DPOConfig`,
    `SEQ_2_SEQ_LM` of Transformers' `Seq2SeqTrainingArguments`, other tasks of its `TrainingArguments`:
    `report_to`, `lr_scheduler_kwargs`, `packing_strategy`, `beta` and so on. Below are those whose
    default is another one here, or whose values are checked more closely, and ours.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    optim: str = Field(
        default="adamw_torch",
        description="As `TrainingArguments.optim`, or an optimiser of pairs, whose rate is its own: "
        + ", ".join(f"`{name}`" for name in PAIR_OPTIMIZERS),
    )
    learning_rate: Annotated[
        float | Literal["suggested"], BeforeValidator(_suggested_or_positive)
    ] = Field(
        default="suggested",
        description="Peak; `suggested`: as `suggest_learning_rate` says, for Adam and optimisers of "
        "pairs. `PREFERENCE` has to name one.",
    )
    head_learning_rate: Annotated[
        float | Literal["suggested"] | None, BeforeValidator(_suggested_or_positive)
    ] = Field(
        default=None,
        description="Ours: of a new head; `suggested`: from the size of its inputs, for Adam. "
        "Default: that of the adapter.",
    )
    num_train_epochs: AboveZero = Field(default=1.0, description="Passes over the data.")
    max_steps: int = Field(default=-1, description="End after this many steps; -1: no limit.")
    per_device_train_batch_size: Positive = Field(
        default=8, description="Sequences a device and step."
    )
    gradient_accumulation_steps: Positive = Field(default=1, description="Steps between updates.")
    warmup_steps: NotNegative = Field(default=0.0, description="Below 1: the share of all of them.")
    lr_scheduler_type: str = Field(
        default="linear", description="Schedule of the learning rate, by its name in Transformers."
    )
    weight_decay: NotNegative = Field(default=0.0, description="Weight decay of AdamW.")
    max_grad_norm: NotNegative = Field(default=1.0, description="Clipping; 0: none.")
    bf16: bool = Field(default=False, description="Compute in bfloat16 (autocast).")
    fp16: bool = Field(default=False, description="Compute in float16 (autocast).")
    gradient_checkpointing: bool = Field(default=False, description="Less memory, more time.")
    logging_steps: AboveZero = Field(default=10, description="Between two logged losses.")
    logging_nan_inf_filter: bool = Field(
        default=False,
        description="Log losses that are not finite as that of the step before, or 0.",
    )
    report_to: str | list[str] = Field(
        default="none", description="Where the losses go: `tensorboard`, `wandb`, …"
    )
    save_steps: AboveZero | None = Field(
        default=None, description="Between two checkpoints; default: none are saved."
    )
    resume_from_checkpoint: bool | Place = Field(
        default=False, description="`true`: continue from the last checkpoint; or its folder."
    )
    seed: int = Field(default=42, description="Seed of the order of the data, and of dropout.")

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in _OPTIMIZERS:
            raise ValueError(f"no such optimiser{nearest(value, _OPTIMIZERS)}")
        return value

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("should be 1 or more, or -1 for no limit")
        return value

    @field_validator("lr_scheduler_type")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        known = [kind.value for kind in SchedulerType]
        if value not in known:
            raise ValueError(f"no such schedule{nearest(value, known)}; known: {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _rate_of_the_optimizer(self) -> "TrainingSection":
        has_rule = is_like_adam(self.optim) or self.optim in PAIR_OPTIMIZERS
        if self.learning_rate == SUGGESTED and not has_rule:
            raise ValueError(
                "rates are suggested for Adam and optimisers of pairs; name the learning_rate of "
                f"{self.optim}"
            )
        if self.head_learning_rate == SUGGESTED and not is_like_adam(self.optim):
            raise ValueError(
                f"a head's rate is suggested for Adam; name the head_learning_rate of {self.optim}"
            )
        return self

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = (set(TrainingSection.model_fields) | self.model_fields_set) - {SECRET}
        return {name: value for name, value in handler(self).items() if name in kept}

    def said(self) -> dict[str, Any]:
        """Values of the keys that the recipe has, by the names of the class of arguments."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def parse_training(value: Any, task: Task | None) -> Any:
    """Check `training` against the class of arguments of a task.

    Args:
        value: what the recipe has.
        task: `None`, if only the model can tell: fields of every class are taken then, and
            `check_training` looks again.

    Returns:
        A `TrainingSection`; what is no mapping comes back as it is.

    Raises:
        ValidationError: with every fault, and the nearest known key for one that is unknown.
    """
    if not isinstance(value, Mapping):
        return value
    values, faults = _renamed(value)
    section = section_of_task(task)
    known = {}
    for key, item in values.items():
        if key not in section.model_fields:
            text = f"no such key{_hint(str(key), section, task)}"
            faults.append(_fault((key,), text, item, kind=UNKNOWN))
        elif item is not None:  # in YAML, a key without a value: the default
            known[key] = item
    if task == "PREFERENCE" and known.get("learning_rate", SUGGESTED) == SUGGESTED:
        why = "rates are suggested for supervised training; preference losses take lower ones: name it"
        faults.append(_fault(("learning_rate",), why, known.pop("learning_rate", None)))
        known["learning_rate"] = 1.0  # stands in, so that the other keys are checked
    if task == "PREFERENCE" and known.get("head_learning_rate") == SUGGESTED:
        why = "a head's rate is suggested for supervised training: name it"
        faults.append(_fault(("head_learning_rate",), why, known.pop("head_learning_rate")))
    parsed = None
    try:
        parsed = section.model_validate(known)
    except ValidationError as error:
        faults += [_fault(f["loc"], _plain(f["msg"]), f["input"]) for f in error.errors()]
    if faults:
        error = ValidationError.from_exception_data("training", faults)
        raise error
    return parsed


def check_training(section: TrainingSection, task: Task) -> list[str]:
    """Faults of a section that was parsed before its task was known.

    Args:
        section: which keys are said.
        task: what the model is for.

    Returns:
        One line a key that the task does not have.
    """
    known = section_of_task(task).model_fields
    name = ARGUMENTS[task].__name__
    return [
        f"training.{key}: {name}, by which {task} is trained, has no such field"
        for key in sorted(section.model_fields_set - set(known))
    ]


@functools.cache
def section_of_task(task: Task | None) -> type[TrainingSection]:
    """The section with every field of a class of arguments; of all of them for no task."""
    classes = tuple(dict.fromkeys(ARGUMENTS.values())) if task is None else (ARGUMENTS[task],)
    fields: dict[str, Any] = {}
    for kind in classes:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init and field.name not in {*TrainingSection.model_fields, *fields}:
                fields[field.name] = (_kind(hints[field.name], field.metadata), None)
    return create_model("TrainingSection", __base__=TrainingSection, **fields)


def _kind(hint: Any, metadata: Mapping[str, Any]) -> Any:
    """The type of a field: of an `Enum | str` its values alone, of choices these."""
    options = typing.get_args(hint)
    enums = [o for o in options if isinstance(o, type) and issubclass(o, enum.Enum)]
    if enums and set(options) == {enums[0], str}:
        return Literal[tuple(member.value for member in enums[0])]
    choices = metadata.get("choices")
    if choices and hint in (str, str | None):
        return Literal[(*choices, None)] if hint == (str | None) else Literal[tuple(choices)]
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, TypeError):
        return Any
    return hint


def _hint(key: str, section: type[TrainingSection], task: Task | None) -> str:
    elsewhere = [t for t in ARGUMENTS if key in section_of_task(t).model_fields]
    if task is not None and elsewhere:
        return f" for {task}; {', '.join(elsewhere)} has it"
    return nearest(key, [*section.model_fields, *EARLIER_NAMES])


def _renamed(value: Mapping[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """The same values by the names of the arguments, and faults of keys that say a thing twice."""
    values: dict[str, Any] = {}
    faults: list[InitErrorDetails] = []
    earlier = {key: EARLIER_NAMES[key] for key in value if key in EARLIER_NAMES}
    for key, item in value.items():
        try:
            new = _as_arguments(key, item) if key in earlier else {key: item}
        except ValueError as error:
            faults.append(_fault((key,), str(error), item))
            continue
        faults += [
            _fault((key,), f"is {name}, which is there, too", item)
            for name in new
            if key in earlier and name in value
        ]
        values |= {name: new[name] for name in new if name not in value or key not in earlier}
    if earlier:
        names = ", ".join(f"{old} is {new}" for old, new in earlier.items())
        warn(
            f"keys of training have the names of the trainer's arguments now: {names}; rename them."
        )
    return values, faults


def _as_arguments(key: str, item: Any) -> dict[str, Any]:
    """One value of an earlier name, by the names of the arguments.

    Args:
        key: the earlier name.
        item: its value.

    Returns:
        Values by name.

    Raises:
        ValueError: if the value is none that the name had.
    """
    if key == "adam_betas":
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise ValueError("should be a list of two numbers")
        return {"adam_beta1": item[0], "adam_beta2": item[1]}
    if key == "precision":
        if item not in ("float32", "bf16", "fp16"):
            raise ValueError("should be 'float32', 'bf16' or 'fp16'")
        return {"bf16": item == "bf16", "fp16": item == "fp16"}
    return {EARLIER_NAMES[key]: item}


def _fault(
    location: Iterable[Any], message: Any, value: Any, kind: Any = "training"
) -> InitErrorDetails:
    return InitErrorDetails(
        type=PydanticCustomError(kind, message), loc=tuple(location), input=value
    )


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ")
