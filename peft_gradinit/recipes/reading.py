"""Rows of a dataset as the model that they are for takes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..records import give_padding_token
from .chats import with_template
from .data import encode, kept_rows
from .data_section import DataSection
from .labels import Labels, labels_of
from .lengths import sequence_length
from .models import check_ids, load_model, load_processor, model_config, task_of
from .rows import Rows
from .schema import ModelSection
from .sections import CLASSIFIED, Task


@dataclasses.dataclass(frozen=True)
class Reader:
    """Encodes rows for one model: those to train on and those to evaluate on alike.

    Attributes:
        section: which data, with the length that sequences may have for this model.
        task: what the model is for.
        processor: its tokenizer or image processor.
        labels: what the label column means to its head; `None` if it has none.
        options: fields of `SFTConfig`, by which TRL prepares rows for causal models.
    """

    section: DataSection
    task: Task
    processor: Any
    labels: Labels | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelSection, data: DataSection, rows: Rows) -> "Reader":
        """Make the reader of a model and its data.

        Args:
            model: which model.
            data: which data.
            rows: those to train on, as they are in the dataset; they tell the classes.

        Returns:
            The reader.
        """
        task, processor = task_of(model), with_template(data, load_processor(model))
        check_ids(model, processor)
        labels = None
        if task in CLASSIFIED:
            labels = labels_of(rows, data, model_config(model), model.n_labels)
        length = sequence_length(data, model, processor)
        return cls(data.model_copy(update={"max_length": length}), task, processor, labels)

    def load_model(self, section: ModelSection) -> nn.Module:
        """Load the model, with the head and the padding that its data want.

        Args:
            section: which model, the one that the reader was made for.

        Returns:
            The model, in eval mode.
        """
        model: Any = load_model(section, self.labels)
        if self.task == "SEQ_CLS":  # decoders classify the last token that is not padding
            give_padding_token(model, self.processor.pad_token_id)
        return model

    def encode(self, rows: Rows) -> Rows:
        """Turn rows into what a collator can pad; streams stay streams."""
        return encode(rows, self.section, self.task, self.processor, self.labels, self.options)

    def kept(self, rows: Rows) -> Rows:
        """The rows that `encode` keeps, as they are; for language models."""
        return kept_rows(rows, self.section, self.task, self.processor, self.options)

    def packed(self, wanted: bool) -> "Reader":
        """The same reader, with or without packing."""
        section = self.section.model_copy(update={"packing": wanted})
        return dataclasses.replace(self, section=section)
