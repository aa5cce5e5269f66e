"""The section of a recipe that says which data are read, and how."""

import contextlib
from typing import Literal

from pydantic import Field, model_validator

from .cells import fields_of
from .sections import CLASSIFIED, Group, Pattern, Place, Positive, Section, Task

DEFAULT_LENGTH = 1024
"""Tokens of a sequence if nothing is said, and the model takes as many."""

_READ: dict[str, tuple[Task, ...]] = {
    "text": ("CAUSAL_LM", "SEQ_CLS"),
    "pair": ("SEQ_CLS",),
    "prompt": ("CAUSAL_LM", "SEQ_2_SEQ_LM", "PREFERENCE"),
    "completion": ("CAUSAL_LM", "SEQ_2_SEQ_LM"),
    "messages": ("CAUSAL_LM",),
    "chosen": ("PREFERENCE",),
    "rejected": ("PREFERENCE",),
    "image": ("IMAGE_CLS",),
}
"""Tasks that read a key, of the keys that name columns."""


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
    prompt: str | None = Field(
        default=None,
        description="Carries no loss. Nothing is put between it and the completion.",
    )
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


def unread_keys(section: DataSection, task: Task) -> list[str]:
    """Keys that name columns which the task does not read.

    Args:
        section: what is said of the data.
        task: what the model is for.

    Returns:
        The keys. `label` is among them if neither classes nor the words of a template are made of it.
    """
    unread = [key for key, tasks in _READ.items() if getattr(section, key) and task not in tasks]
    if section.label and task not in CLASSIFIED and not section.label_words:
        unread.append("label")
    return unread


def is_written(section: DataSection, column: str) -> bool:
    """Whether a column is a part of the texts, by its name or in a template."""
    sources = [source for key in _READ if (source := getattr(section, key))]
    with contextlib.suppress(ValueError):  # a broken template is told when it is filled
        return any(source == column or column in fields_of(source) for source in sources)
    return False
