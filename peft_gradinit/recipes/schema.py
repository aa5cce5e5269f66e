"""The schema of the recipes: every key, its kind, its default and what it means.

`configs/README.md` is made from these descriptions (`documentation.py`), so a key cannot be without
one.
"""

import dataclasses
import difflib
import math
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from transformers.training_args import OptimizerNames

from ..methods import METHODS
from ..optim import OPTIMIZERS

DEFAULT_LENGTH = 1024
"""Tokens of a sequence if nothing is said, and the model takes as many."""

VERSION = 1
"""The version of the schema that this package reads and writes."""

Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "IMAGE_CLS"]
CLASSIFIED = ("SEQ_CLS", "IMAGE_CLS")
"""Tasks whose head has an output for each class."""

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0)]


def _suggested_or_positive(value: Any) -> Any:
    """A learning rate: one fault for a union of types, of which each would be one."""
    try:
        positive = (
            not isinstance(value, bool) and 0 < float(value) < math.inf
        )  # YAML reads 3e-4 as text
    except (TypeError, ValueError):
        positive = False
    if value != "suggested" and not positive:
        raise ValueError("should be 'suggested' or a number greater than 0")
    return value if value == "suggested" else float(value)


PAIR_OPTIMIZERS = tuple(kind.name for kind in OPTIMIZERS)
"""Names of the optimisers of `peft_gradinit.optim`."""
_OPTIMIZERS = (*(name.value for name in OptimizerNames), *PAIR_OPTIMIZERS)

METHOD_CONFIGS: dict[str, Any] = {"lora": LoraConfig} | {m.name: m for m in METHODS}
"""Config classes by the names that `method.name` takes."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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

    name: str = Field(
        description="Hub name, folder, or `embedded:minilm`, `embedded:smollm2`, "
        "`embedded:pico-llama`, which need no network."
    )
    task: Task | None = Field(default=None, description="Default: told by the model's class.")
    revision: str | None = Field(default=None, description="Commit, tag or branch on the Hub.")
    tokenizer: str | None = Field(default=None, description="Default: that of the model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the weights; `auto`: as they were saved."
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None, description="Load the weights quantised by bitsandbytes (4bit: NF4)."
    )
    n_labels: Positive | None = Field(
        default=None,
        description="Outputs of a new head; default: the classes of the data. 1: regression.",
    )
    seed: int = Field(default=0, description="Of weights that are drawn, such as a new head.")


class DataSection(Section):
    """Which data are read, and how a row becomes tokens.

    `text`, `prompt`, `completion` and `pair` are a column's name, or a template with columns in
    braces. Without any of them the columns tell: `messages`; `prompt` and `completion`; `text`;
    `input_ids`.
    """

    path: str = Field(
        description="Hub name, folder (also of `save_to_disk`), `.jsonl`, `.json`, `.parquet`, "
        "`.csv`, `.txt` file, or `embedded:docstrings`, `embedded:functions`, "
        "`embedded:reference`."
    )
    name: str | None = Field(default=None, description="Configuration of the Hub's dataset.")
    revision: str | None = Field(default=None, description="Commit, tag or branch on the Hub.")
    split: str = Field(default="train", description="Trained (or calibrated) on.")
    eval_path: str | None = Field(default=None, description="Default: `path`.")
    eval_name: str | None = Field(default=None, description="Default: `name`.")
    eval_split: str | None = Field(
        default=None, description="Default: `n_eval` rows are held out of `split`."
    )
    eval_rename: dict[str, str] = Field(
        default={}, description="New names for columns of the evaluation data."
    )
    n_train: Positive | None = Field(default=None, description="Take that many rows; default: all.")
    n_eval: Positive | None = Field(
        default=None, description="Evaluate on that many rows; default: all of `eval_split`."
    )
    streaming: bool = Field(default=False, description="Read a Hub dataset without downloading it.")
    shuffle_seed: int | None = Field(
        default=None, description="Shuffle the rows first; default: as they are."
    )
    where: dict[str, str] = Field(
        default={},
        description="Keep rows of `path` whose column matches a regular expression somewhere.",
    )
    text: str | None = Field(default=None, description="All of it carries loss; or is classified.")
    pair: str | None = Field(default=None, description="Second text of a classified pair.")
    prompt: str | None = Field(default=None, description="Carries no loss.")
    completion: str | None = Field(default=None, description="Carries the loss.")
    completion_keep: str | None = Field(
        default=None,
        description="Regular expression whose first group is kept of the completion; rows without "
        "a match are dropped.",
    )
    messages: str | None = Field(
        default=None, description="Column of chats, put through the chat template."
    )
    chat_template: str | None = Field(
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
        default=False, description="Concatenate rows to sequences of `max_length` (causal models)."
    )

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
    batch_size: Positive = Field(default=8, description="Does not change the result.")
    estimator: Literal["sketch", "dense"] = Field(
        default="sketch", description="`dense` keeps exact gradients, for small models."
    )
    sketch_size: Positive | None = Field(default=None, description="Default: 2 rank + 80.")
    seed: int = Field(default=0, description="Of the sketches.")
    result: str | None = Field(
        default=None, description="Take a saved calibration instead of reading data."
    )


class TrainingSection(Section):
    """The arguments of `transformers.Trainer`."""

    optim: str = Field(
        default="adamw_torch",
        description="As `TrainingArguments.optim`, or an optimiser of pairs, whose rate is its own: "
        + ", ".join(f"`{name}`" for name in PAIR_OPTIMIZERS),
    )

    learning_rate: Annotated[
        float | Literal["suggested"], BeforeValidator(_suggested_or_positive)
    ] = Field(
        default="suggested", description="Peak; `suggested`: as `suggest_learning_rate` says."
    )
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="Of a new head. Default: that of the adapter."
    )
    epochs: float = Field(default=1.0, gt=0, description="Passes over the data.")
    max_steps: int = Field(default=-1, description="Ends earlier; -1: does not.")
    batch_size: Positive = Field(default=8, description="Sequences a device and step.")
    gradient_accumulation: Positive = Field(default=1, description="Steps between updates.")
    warmup: Rate = Field(default=0.0, description="Steps; below 1: the share of all of them.")
    schedule: str = Field(default="cosine", description="As `lr_scheduler_type`.")
    weight_decay: Rate = Field(default=0.0, description="Of AdamW.")
    max_grad_norm: Rate = Field(default=1.0, description="Clipping; 0: none.")
    adam_betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Of AdamW.")
    precision: Literal["float32", "bf16", "fp16"] = Field(
        default="float32", description="Of the computation (autocast)."
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory, more time.")
    logging_steps: Positive = Field(default=10, description="Between two logged losses.")
    save_steps: Positive | None = Field(
        default=None, description="Between two checkpoints; default: none are saved."
    )
    resume: bool = Field(default=False, description="Continue from the last checkpoint.")
    seed: int = Field(default=42, description="Of the order of the data, and of dropout.")

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        if value not in _OPTIMIZERS:
            raise ValueError(f"no such optimiser{nearest(value, _OPTIMIZERS)}")
        return value

    @model_validator(mode="after")
    def _rate_of_the_optimizer(self) -> "TrainingSection":
        if self.learning_rate == "suggested" and "adam" not in self.optim:
            raise ValueError(
                f"rates are suggested for Adam; name the learning_rate of {self.optim}"
            )
        return self


class EvaluationSection(Section):
    """What is measured on the evaluation rows, by `evaluate`."""

    metrics: list[str] = Field(
        default=[],
        description="`accuracy`, `macro_f1`, `matthews`, `exact_match` are built in; others are "
        "loaded from the Hub by `evaluate.load`.",
    )
    batch_size: Positive = Field(default=8, description="Sequences a device and step.")
    max_new_tokens: Positive | None = Field(
        default=None, description="Generate answers to the prompts and compare these."
    )
    answer: str | None = Field(
        default=None,
        description="Regular expression whose first group is the answer, in what is generated and "
        "in the completion; the last match counts.",
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

    version: int = Field(description="Of this schema: 1.")
    title: str = Field(description="One line.")
    source: Source | None = Field(default=None, description="Where the settings are from.")
    offline: bool = Field(default=False, description="Runs without a network.")
    output: str = Field(description="Folder of everything that is written.")
    model: ModelSection = Field(description="Which model.")
    data: DataSection = Field(description="Which data.")
    method: MethodSection = Field(description="How the adapter starts.")
    calibration: CalibrationSection = Field(
        default=CalibrationSection(), description="From how much data."
    )
    training: TrainingSection = Field(description="How it is trained.")
    evaluation: EvaluationSection = Field(
        default=EvaluationSection(), description="What is measured."
    )
    export: ExportSection = Field(default=ExportSection(), description="What is written.")
    push: PushSection | None = Field(default=None, description="Where it is uploaded to.")
    baselines: list[str] = Field(
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


def nearest(key: str, known: Any) -> str:
    """`", did you mean 'x'?"` for the known key that is closest; empty if none is close."""
    found = difflib.get_close_matches(key, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
