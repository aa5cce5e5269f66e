"""The schema of the recipes: every key, its kind, its default and what it means.

`configs/README.md` is made from these descriptions (`documentation.py`), so a key cannot be without
one.
"""

import dataclasses
from typing import Any, Literal

from peft import LoraConfig
from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from ..methods import METHODS
from .data_section import DataSection
from .embedded import MINILM, MODELS
from .sections import Group, Place, Positive, Section, Task, nearest
from .training import TrainingSection, parse_training

VERSION = 1
"""The version of the schema that this package reads and writes."""

METHOD_CONFIGS: dict[str, Any] = {"lora": LoraConfig} | {m.name: m for m in METHODS}
"""Config classes by the names that `method.name` takes."""


class Source(Section):
    """Where the settings are from; for people, not read by the program."""

    paper: str = Field(description="Title and arXiv number.")
    settings: str = Field(description="Where the hyperparameters are stated.")
    expected: dict[str, str | float] = Field(
        default={}, description='Published figures, by name, or "not stated".'
    )
    differences: list[str] = Field(
        default=[], description="What differs from the paper here, one line each."
    )


class ModelSection(Section):
    """Which model is fine-tuned."""

    name: Place = Field(
        description="Hub name, folder, or `embedded:minilm`, `embedded:smollm2`, "
        "`embedded:pico-llama`, which need no network."
    )
    task: Task | None = Field(default=None, description="Default: as the model's class says.")
    revision: str | None = Field(default=None, description="Commit, tag or branch on the Hub.")
    tokenizer: Place | None = Field(default=None, description="Default: that of the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the weights; `auto`: as they were saved."
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None, description="Load the weights quantised by bitsandbytes (4bit: NF4)."
    )
    n_labels: Positive | None = Field(
        default=None,
        description="Outputs of a new head; default: the classes of the data. 1: regression.",
    )
    seed: int = Field(default=0, description="Seed of weights that are drawn, such as a new head.")


class MethodSection(Section):
    """How the adapter starts. `lora` is PEFT's own, for baselines."""

    name: str = Field(description="`lora` or a method of the table: " + ", ".join(METHOD_CONFIGS))
    r: Positive | Literal["full"] = Field(default=8, description="Rank; `full` for SVFit alone.")
    lora_alpha: float | None = Field(
        default=None, gt=0, description="Default: PEFT's, 8; SVFit has none."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r).")
    target_modules: str | list[str] = Field(
        default="all-linear", description="As in `peft.LoraConfig`."
    )
    options: dict[str, Any] = Field(
        default={}, description="Further fields of the method's config class."
    )

    @field_validator("name")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHOD_CONFIGS:
            raise ValueError(f"no such method{nearest(value, METHOD_CONFIGS)}")
        return value

    @field_validator("options")
    @classmethod
    def _known_options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        config = METHOD_CONFIGS.get(info.data.get("name", ""))
        if config is None:
            return value
        known = {f.name for f in dataclasses.fields(config) if f.init} - set(cls.model_fields)
        unknown = [f"{key!r}{nearest(key, known)}" for key in value if key not in known]
        if unknown:
            raise ValueError(f"{config.__name__} has no option {', '.join(unknown)}")
        return value

    @model_validator(mode="after")
    def _takes_what_is_said(self) -> "MethodSection":
        known = {field.name for field in dataclasses.fields(METHOD_CONFIGS[self.name])}
        said = [name for name in ("lora_alpha", "use_rslora") if getattr(self, name)]
        if unknown := [name for name in said if name not in known]:
            raise ValueError(f"{self.name} has no {', '.join(unknown)}; leave it out")
        if self.r == "full" and self.name != "svfit":
            raise ValueError(f"r='full' is for svfit, not for {self.name}; give a number")
        return self


class CalibrationSection(Section):
    """How much of the training data the start is computed from."""

    max_tokens: Positive | None = Field(
        default=None, description="Budget in tokens; default: 65,536 if no other is given."
    )
    max_batches: Positive | None = Field(default=None, description="Budget in batches.")
    batch_size: Positive = Field(
        default=8, description="Sequences at once; does not change the result."
    )
    estimator: Literal["sketch", "dense"] = Field(
        default="sketch", description="`dense` keeps exact gradients, for small models."
    )
    sketch_size: Positive | None = Field(default=None, description="Columns; default: by the rank.")
    seed: int = Field(default=0, description="Seed of the sketches.")
    result: Place | None = Field(
        default=None, description="Take a saved calibration instead of reading data."
    )


class EvaluationSection(Section):
    """What is measured on the evaluation rows."""

    metrics: list[str] = Field(
        default=[],
        description="`accuracy`, `macro_f1`, `matthews` of classes, `exact_match` of texts, `mse`, "
        "`mae`, `r2` of numbers (scikit-learn's); others are loaded from the Hub by `evaluate`.",
    )
    batch_size: Positive = Field(default=8, description="Sequences a device and step.")
    max_new_tokens: Positive | None = Field(
        default=None, description="Generate answers to the prompts and compare these."
    )
    answer: Group | None = Field(
        default=None,
        description="Regular expression whose first group is the answer, in what is generated and in the "
        "completion, where it has to be found; the last match counts, without commas of thousands.",
    )
    steps: Positive | None = Field(
        default=None, description="Evaluate the loss in training, too; default: at the end alone."
    )


class ExportSection(Section):
    """What is written after training, beside the adapter itself."""

    targets: list[Literal["peft", "serving", "merged"]] = Field(
        default=["peft"], description="Forms, one folder each."
    )
    rank: Positive | None = Field(default=None, description="Truncate to this rank.")


class PushSection(Section):
    """Upload of the adapter to the Hub."""

    repo: str = Field(description="`user/name`.")
    private: bool = Field(default=True, description="Not visible to others.")


class Recipe(Section):
    """One fine-tuning run, from the model to the evaluated adapter."""

    version: int = Field(description="Version of this schema: 1.")
    title: str | None = Field(default=None, description="One line. Default: the name of the file.")
    source: Source | None = Field(default=None, description="Where the settings are from.")
    offline: bool = Field(default=False, description="Runs without a network.")
    output: Place = Field(description="Folder of everything that is written.")
    model: ModelSection = Field(description="Which model.")
    data: DataSection = Field(description="Which data.")
    method: MethodSection = Field(description="How the adapter starts.")
    calibration: CalibrationSection = Field(
        default=CalibrationSection(), description="From how much data."
    )
    training: SerializeAsAny[TrainingSection] = Field(description="How it is trained.")
    evaluation: EvaluationSection = Field(
        default=EvaluationSection(), description="What is measured."
    )
    export: ExportSection = Field(default=ExportSection(), description="What is written.")
    push: PushSection | None = Field(default=None, description="Where it is uploaded to.")
    baselines: list[Place] = Field(
        default=[], description="Outputs of other runs, for the picture of the losses."
    )

    @field_validator("version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != VERSION:
            raise ValueError(
                f"this package reads version {VERSION} of the schema"
                + ("; update it" if value > VERSION else "")
            )
        return value

    @field_validator("training", mode="before")
    @classmethod
    def _of_the_task(cls, value: Any, info: ValidationInfo) -> Any:
        model = info.data.get("model")
        return parse_training(value, None if model is None else told_task(model))

    @model_validator(mode="after")
    def _no_two_keys_say_one_thing_differently(self) -> "Recipe":
        of_data = [("data", *said) for said in _of_data(self.training)]
        of_evaluation = [("evaluation", *said) for said in _of_evaluation(self.training)]
        for place, key, name, value in (*of_data, *of_evaluation):
            section = getattr(self, place)
            here = getattr(section, name)
            if name in section.model_fields_set and here != value:
                raise ValueError(
                    f"{place}.{name} and training.{key} say the same thing, but are {here!r} and "
                    f"{getattr(self.training, key)!r}; leave one out"
                )
        return self

    def read_data(self) -> DataSection:
        """The section of the data, with what `training` says of them by TRL's names."""
        said = {name: value for _, name, value in _of_data(self.training)}
        return self.data.model_copy(update=said)

    def read_evaluation(self) -> EvaluationSection:
        """The section of the evaluation, with what `training` says of it by the names of `Trainer`."""
        said = {name: value for _, name, value in _of_evaluation(self.training)}
        return self.evaluation.model_copy(update=said)


SAME_IN_DATA = {
    "max_length": "max_length",
    "packing": "packing",
    "assistant_only_loss": "assistant_only_loss",
    "chat_template_path": "chat_template",
    "completion_only_loss": "loss_on_prompt",
    "dataset_text_field": "text",
}


def _of_data(training: TrainingSection) -> list[tuple[str, str, Any]]:
    """Keys of `training` that `data` has as well: TRL's name, that of `data`, its value there."""
    said = training.said()
    return [
        (key, name, not said[key] if name == "loss_on_prompt" else said[key])
        for key, name in SAME_IN_DATA.items()
        if key in said
    ]


def _of_evaluation(training: TrainingSection) -> list[tuple[str, str, Any]]:
    """The same of `evaluation`."""
    said = training.said()
    same = {"per_device_eval_batch_size": "batch_size", "eval_steps": "steps"}
    return [(key, name, said[key]) for key, name in same.items() if key in said]


def told_task(model: ModelSection) -> Task | None:
    """The task, if the recipe alone tells it."""
    if model.task is None and model.name in MODELS:
        return "SEQ_CLS" if model.name == MINILM else "CAUSAL_LM"
    return model.task
