"""The schema of the recipes: every key, its kind, its default and what it means.

`configs/README.md` is made from these descriptions (`documentation.py`), so a key cannot be without
one.
"""

import dataclasses
from typing import Any, Literal

from peft import LoraConfig
from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from ..methods import METHODS
from .embedded import MINILM, MODELS
from .sections import Group, Pattern, Place, Positive, Section, Task, nearest
from .training import TrainingSection, parse_training

DEFAULT_LENGTH = 1024
"""Tokens of a sequence if nothing is said, and the model takes as many."""

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


class DataSection(Section):
    """Which data are read, and how a row becomes tokens.

    `text`, `prompt`, `completion` and `pair` are a column's name, or a template with columns in
    braces. Without any of them the columns tell: `messages`; `prompt` and `completion`; `text`;
    `input_ids`.
    """

    path: Place = Field(
        description="Hub name, folder (also of `save_to_disk`), `.jsonl`, `.json`, `.parquet`, "
        "`.csv`, `.txt` file, or `embedded:docstrings`, `embedded:functions`, "
        "`embedded:reference`."
    )
    name: str | None = Field(default=None, description="Configuration of the Hub's dataset.")
    revision: str | None = Field(default=None, description="Commit, tag or branch on the Hub.")
    split: str = Field(
        default="train",
        description="Rows to train or calibrate on; of a file, `train` or slices of it.",
    )
    eval_path: Place | None = Field(default=None, description="Default: `path`.")
    eval_name: str | None = Field(default=None, description="Default: `name`.")
    eval_split: str | None = Field(
        default=None, description="Default: `n_eval` rows are held out of `split`."
    )
    eval_rename: dict[str, str] = Field(
        default={}, description="New names for columns of the evaluation data."
    )
    n_train: Positive | None = Field(default=None, description="Take this many rows; default: all.")
    n_eval: Positive | None = Field(
        default=None, description="Evaluate on that many rows; default: all of `eval_split`."
    )
    streaming: bool = Field(default=False, description="Read a Hub dataset without downloading it.")
    shuffle_seed: int | None = Field(
        default=None,
        description="Shuffle the rows first, those of a stream after the choice; default: as they are.",
    )
    where: dict[str, Pattern] = Field(
        default={},
        description="Keep rows of `path` whose column matches a regular expression somewhere.",
    )
    text: str | None = Field(
        default=None, description="All of it carries loss; or is classified; default: `text`."
    )
    pair: str | None = Field(default=None, description="Second text of a classified pair.")
    prompt: str | None = Field(default=None, description="Carries no loss.")
    completion: str | None = Field(default=None, description="Carries the loss.")
    chosen: str | None = Field(
        default=None,
        description="The better of two answers to `prompt` (`PREFERENCE`); default: `chosen`.",
    )
    rejected: str | None = Field(default=None, description="The other one; default: `rejected`.")
    completion_keep: Group | None = Field(
        default=None,
        description="Regular expression whose first group is kept of the completion (of a chat: of its "
        "last turn); rows without a match are dropped.",
    )
    messages: str | None = Field(
        default=None, description="Column of chats, put through the chat template."
    )
    chat_template: Place | None = Field(
        default=None, description="File with a Jinja template instead of the tokenizer's."
    )
    assistant_only_loss: bool = Field(
        default=False,
        description="Loss on the assistant's turns alone; the template needs generation marks.",
    )
    loss_on_prompt: bool = Field(default=False, description="Prompts carry loss, too.")
    label: str | None = Field(
        default=None,
        description="Column of classes (strings, integers, booleans), which are sorted; default: "
        "`label`.",
    )
    label_kind: Literal["class", "number"] | None = Field(
        default=None,
        description="`number`: regression. Has to be said for floating-point numbers alone; "
        "default: classes.",
    )
    label_words: dict[int, str] = Field(
        default={},
        description="Words for classes, as `{label}` in templates; for classifiers, names of the "
        "classes in their order.",
    )
    image: str | None = Field(default=None, description="Column of images; default: `image`.")
    max_length: Positive | None = Field(
        default=None,
        description="Tokens of a sequence; default: 1,024, or what the model takes if it is less.",
    )
    drop_longer: bool = Field(default=False, description="Drop longer rows instead of cutting.")
    packing: bool = Field(
        default=False,
        description="Fill sequences of `max_length` with rows (causal models), as TRL packs them.",
    )

    @model_validator(mode="after")
    def _evaluation_is_asked_for(self) -> "DataSection":
        """Refuse what is said of evaluation data and would not be read."""
        said = ("eval_path", "eval_name", "eval_rename")
        unread = [name for name in said if getattr(self, name)] if self.eval_split is None else []
        if unread:
            raise ValueError(
                f"{', '.join(unread)} belongs to eval_split, which is missing; give the split, such as "
                "test"
            )
        return self

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.max_length or DEFAULT_LENGTH


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
        description="Regular expression whose first group is the answer, in what is generated and "
        "in the completion, where it has to be found; the last match counts.",
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
    def _data_are_said_once(self) -> "Recipe":
        for key, name, value in _of_data(self.training):
            here = getattr(self.data, name)
            if name in self.data.model_fields_set and here != value:
                raise ValueError(
                    f"data.{name} and training.{key} say the same thing, but are {here!r} and "
                    f"{getattr(self.training, key)!r}; leave one out"
                )
        return self

    def read_data(self) -> DataSection:
        """The section of the data, with what `training` says of them by TRL's names."""
        said = {name: value for _, name, value in _of_data(self.training)}
        return self.data.model_copy(update=said)


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


def told_task(model: ModelSection) -> Task | None:
    """The task, if the recipe alone tells it."""
    if model.task is None and model.name in MODELS:
        return "SEQ_CLS" if model.name == MINILM else "CAUSAL_LM"
    return model.task
