"""One row of a dataset: for TRL as texts or chats, else as tokens or pixels with their label."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError, DataError
from .cells import as_text, in_colours, value_of
from .chats import (
    as_messages,
    of_chat,
    prompt_turns,
    template_options,
    turns_before,
    with_template,
)
from .data_section import DataSection, unread_keys
from .sections import CLASSIFIED, Task

_NO_LOSS = -100
"""What the losses of Transformers leave out."""

_EMPTY: dict[str, list[int]] = {"input_ids": [], "attention_mask": [], "labels": []}
"""What a dropped row becomes."""

_CHATS = ("messages", "conversations", "conversation")


class Encoder:
    """Encodes rows of one dataset for one model.

    Args:
        section: columns and templates.
        task: what the model is for.
        processor: its tokenizer or image processor.
        columns: those of the dataset.
        read_label: from the label column to what the loss of a classifier takes.

    Raises:
        ConfigError: if there is none for a classifier.
        DataError: if the columns do not tell what to read.
    """

    def __init__(
        self,
        section: DataSection,
        task: Task,
        processor: Any,
        columns: list[str],
        read_label: Callable[[Any], int | float] | None = None,
    ) -> None:
        self.section = section
        self.task: Task = task
        self.columns = columns
        if task in CLASSIFIED and read_label is None:
            raise ConfigError(
                f"encoding for {task} needs to know the classes; pass labels=labels_of(…), or "
                "encode by Reader.of(…)."
            )
        self._read_label: Any = read_label
        self.processor = with_template(section, processor)
        self._encode = self._encoder()

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a row; one that is to be dropped has no tokens, or no completion."""
        return self._encode(self._with_words(row))

    def prompt(self, row: Mapping[str, Any]) -> list[int] | None:
        """The prompt alone, to generate an answer to: the tokens that training has before it.

        Args:
            row: of the dataset.

        Returns:
            Token ids; `None` if the prompt alone is so long that training has no answer behind it.
        """
        length, row = self.section.length, self._with_words(row)
        prompt = self._asked(row)
        if isinstance(prompt, list):
            turns = [*prompt, *self._answer(row)[:-1]]
            ids = self._of_chat(turns, row, asks=True, tokenize=True, return_dict=True)["input_ids"]
        elif self.task == "SEQ_2_SEQ_LM":
            return list(self.processor(prompt, truncation=True, max_length=length)["input_ids"])
        else:
            ids = self._ids(prompt.rstrip(" "))
        return ids if len(ids) < length else None

    def completion(self, row: Mapping[str, Any]) -> str | None:
        """What the row gives as the answer, of a chat its last turn; `None` if the row is to be dropped.

        A turn that is more than a text, such as a call of a tool, is as the chat template writes it.
        """
        row = self._with_words(row)
        text = self._value(row, self.section.completion or "completion")
        if not isinstance(text, list):
            return self._kept(str(text))
        turns = self._kept_turns(self._answer(row))
        return None if turns is None else self._text_of_last(turns, row)

    def _text_of_last(self, turns: list[dict[str, Any]], row: Mapping[str, Any]) -> str:
        *before, last = turns
        if isinstance(last.get("content"), str) and not last.get("tool_calls"):
            return last["content"]
        before = [*self._asked(row), *before]
        asked = self._of_chat(before, row, asks=True, tokenize=False)
        whole = self._of_chat([*before, last], row, asks=False, tokenize=False)
        ids = self.processor(whole.removeprefix(asked), add_special_tokens=False)["input_ids"]
        return self.processor.decode(ids, skip_special_tokens=True)

    def _answer(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The turns of a completion that is a chat.

        Raises:
            DataError: if the last one is not the assistant's.
        """
        turns = self._messages(self._value(row, self.section.completion or "completion"))
        if (role := turns[-1]["role"]) != "assistant":
            raise DataError(
                f"a completion is a chat that ends with a turn of {role!r}, not of the assistant, whose "
                "answer is learned; leave that turn out."
            )
        return turns

    def _of_chat(
        self, turns: list[dict[str, Any]], row: Mapping[str, Any], *, asks: bool, **options: Any
    ) -> Any:
        return self.processor.apply_chat_template(
            turns, add_generation_prompt=asks, **template_options(row), **options
        )

    def _encoder(self) -> Any:
        """Choose how to read a row, from the section or else from the columns.

        Returns:
            A method.

        Raises:
            ConfigError: if the section says what cannot be heeded, or two things of one.
            DataError: if neither tells.
        """
        by_task = {
            "IMAGE_CLS": self._image,
            "SEQ_CLS": self._classified,
            "SEQ_2_SEQ_LM": self._pair_of_texts,
            "PREFERENCE": self._preferred,
        }
        encode = by_task.get(self.task) or self._of_causal()
        if unread := unread_keys(self.section, self.task):
            raise ConfigError(
                f"data.{', data.'.join(unread)} cannot be heeded for {self.task}, which reads other columns; leave "
                "it out, or set model.task."
            )
        if self.section.completion_keep and encode not in (self._pair_of_texts, self._prompted):
            raise ConfigError(
                "data.completion_keep is for prompts and completions, and these rows are read as others "
                "are; leave it out."
            )
        if self.section.drop_longer and self.task in ("IMAGE_CLS", "PREFERENCE"):
            raise ConfigError(
                f"data.drop_longer cannot be heeded for {self.task}, whose rows are not tokenised here; "
                "leave it out."
            )
        return encode

    def _of_causal(self) -> Any:
        """What the section says, else what the columns are called."""
        section, columns = self.section, self.columns
        pair = [name for name in ("prompt", "completion") if getattr(section, name)]
        said = [*pair[:1], *(name for name in ("messages", "text") if getattr(section, name))]
        if len(said) > 1:
            raise ConfigError(
                f"data.{said[0]} and data.{said[1]} both say what to read; leave one of them out."
            )
        if pair or (not said and {"prompt", "completion"} <= set(columns)):
            return self._prompted
        chat = section.messages or next((c for c in _CHATS if c in columns), None)
        if chat is not None and section.text is None:
            return functools.partial(self._chat, chat)
        if section.text is not None or "text" in columns:
            return self._text
        if "input_ids" in columns:
            return self._tokens
        raise DataError(
            f"the columns {columns} do not tell what to read; name a column or give a template for "
            "text, for prompt and completion, or for messages; for pairs of a better and a worse "
            "answer, model.task: PREFERENCE."
        )

    def _chat(self, column: str, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"messages": self._messages(self._value(row, column)), **of_chat(row)}

    def _text(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": self._written(row, self.section.text or "text")}

    def _tokens(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Tokens that are there already; masks of TRL's names say which of them carry loss."""
        ids = list(row["input_ids"])
        labels = list(row.get("labels") or ids)
        masks = ["assistant_masks"] + ([] if self.section.loss_on_prompt else ["completion_mask"])
        real = row.get("attention_mask") or [1] * len(ids)
        given = [row[name] for name in masks if row.get(name)]
        if any(len(other) != len(ids) for other in (labels, real, *given)):
            raise DataError(
                "a row has other numbers of labels or of entries in its masks than of input_ids, of which "
                f"it has {len(ids)}; tokenise it again."
            )
        for mask in given:
            labels = [
                label if keeps else _NO_LOSS for label, keeps in zip(labels, mask, strict=True)
            ]
        kept = [i for i, is_real in enumerate(real) if is_real]
        return {"input_ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept]}

    def _prompted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        prompt, source = self._asked(row), self.section.completion or "completion"
        if isinstance(prompt, list):
            answer = self._kept_turns(self._answer(row))
            return {"prompt": prompt, "completion": answer, **of_chat(row)}
        kept, start = self._kept(self._written(row, source)), prompt.rstrip(" ")
        gap = prompt[len(start) :]  # tokenizers make it the beginning of the next word
        return {"prompt": start, "completion": kept if kept is None else gap + kept}

    def _asked(self, row: Mapping[str, Any]) -> Any:
        """The prompt: turns if it or its answer is a chat, else a text."""
        prompt = self._turns(row, self.section.prompt or "prompt")
        if self.task != "SEQ_2_SEQ_LM" and not isinstance(prompt, list):
            answer = self._value(row, self.section.completion or "completion")
            if isinstance(answer, list):
                return turns_before(self._messages(answer), prompt)
        return prompt

    def _preferred(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The better and the worse answer; without a prompt, TRL takes what they have in common."""
        section = self.section
        answers = {
            "chosen": self._turns(row, section.chosen or "chosen"),
            "rejected": self._turns(row, section.rejected or "rejected"),
        }
        of_chats = isinstance(answers["chosen"], list)
        if section.prompt or "prompt" in self.columns:
            prompt = self._turns(row, section.prompt or "prompt")
            if of_chats and not isinstance(prompt, list):
                prompt = prompt_turns(prompt, answers)
            elif isinstance(prompt, list) and not of_chats:
                raise DataError(
                    "the prompt of a pair is a chat, but its answers are texts; give both as chats, or "
                    "both as texts."
                )
            answers |= {} if prompt is None else {"prompt": prompt}
        return answers | (of_chat(row) if of_chats else {})

    def _turns(self, row: Mapping[str, Any], source: str) -> Any:
        value = self._value(row, source)
        return self._messages(value) if isinstance(value, list) else as_text(value, source)

    def _messages(self, messages: Any) -> list[dict[str, Any]]:
        if not getattr(self.processor, "chat_template", None):
            raise DataError(
                "the data are chats, but the tokenizer has no chat template; give one as "
                "data.chat_template."
            )
        return as_messages(messages)

    def _pair_of_texts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Source and target of an encoder-decoder."""
        kept = self._kept(self._written(row, self.section.completion or "completion"))
        if kept is None:
            return dict(_EMPTY)
        prompt = self._written(row, self.section.prompt or "prompt")
        encoded, target = self._tokenised(prompt), self._tokenised(text_target=kept)
        return {
            "input_ids": encoded["input_ids"] if target["input_ids"] else [],
            "attention_mask": encoded["attention_mask"],
            "labels": target["input_ids"],
        }

    def _classified(self, row: Mapping[str, Any]) -> dict[str, Any]:
        texts = [self._written(row, self.section.text or "text")]
        if self.section.pair is not None:
            texts.append(self._written(row, self.section.pair))
        return {**self._tokenised(*texts), "labels": self._label(row)}

    def _tokenised(self, *texts: str, **target: str) -> dict[str, Any]:
        """Tokens of texts, cut to the length; none if they are to be dropped instead."""
        cut, length = not self.section.drop_longer, self.section.length
        encoded = dict(self.processor(*texts, **target, truncation=cut, max_length=length))
        if len(encoded["input_ids"]) > length:
            encoded["input_ids"] = []
        return encoded

    def _image(self, row: Mapping[str, Any]) -> dict[str, Any]:
        name = self.section.image or "image"
        image = in_colours(self._value(row, name), name)
        pixels = self.processor(image, return_tensors="np")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self._label(row)}

    def _label(self, row: Mapping[str, Any]) -> int | float:
        return self._read_label(row[self.section.label or "label"])

    def _with_words(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        words, column = self.section.label_words, self.section.label or "label"
        if not words or self.task in CLASSIFIED:
            return row
        if row.get(column) not in words:
            raise DataError(
                f"the class {row.get(column)!r} in column {column!r} has no word; label_words has "
                f"{dict(words)}."
            )
        return {**row, column: words[row[column]]}

    def _value(self, row: Mapping[str, Any], source: str) -> Any:
        return value_of(row, source, self.columns)

    def _written(self, row: Mapping[str, Any], source: str) -> str:
        return as_text(self._value(row, source), source)

    def _kept(self, completion: str) -> str | None:
        if self.section.completion_keep is None:
            return completion
        found = re.search(self.section.completion_keep, completion)
        return found.group(1) if found else None

    def _kept_turns(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """A completion that is a chat: what is kept of its last turn."""
        if self.section.completion_keep is None:
            return turns
        content = turns[-1].get("content")
        kept = None if content is None else self._kept(as_text(content, "content"))
        return None if kept is None else [*turns[:-1], {**turns[-1], "content": kept}]

    def _ids(self, text: str) -> list[int]:
        ids = list(self.processor(text)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.processor.eos_token_id else ids
