"""Chats: their turns, and what the chat template reads besides."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .data_section import DataSection

_READ_BY_TEMPLATES: Mapping[str, Any] = {"tools": None, "chat_template_kwargs": {}}
"""Columns that TRL gives to the chat template, and what stands for an empty one."""


def of_chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row has for the chat template besides its turns, under TRL's names."""
    return {name: row[name] or empty for name, empty in _READ_BY_TEMPLATES.items() if name in row}


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template of a row gets besides its turns, as TRL gives it."""
    found = of_chat(row)
    tools = found.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **found.get("chat_template_kwargs", {})}


def prompt_turns(prompt: str, answers: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The prompt of two chats, which is a text.

    Args:
        prompt: the text.
        answers: the chats.

    Returns:
        Its turn; `None` if both chats contain it.

    Raises:
        DataError: if they begin with something else.
    """
    first = [chat[0] for chat in answers.values() if isinstance(chat, list) and chat]
    if len(first) == len(answers):
        if all(turn["role"] == "assistant" for turn in first):
            return [{"role": "user", "content": prompt}]
        users = [[t["content"] for t in chat if t["role"] == "user"] for chat in answers.values()]
        if all(prompt in texts for texts in users):
            return None
    raise DataError(
        f"the prompt of a pair is the text {prompt[:60]!r}, but its answers are chats that neither "
        "contain it nor begin with the assistant's turn; give the prompt as a chat, or leave it out "
        "of the data."
    )


def turns_before(answer: list[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """The prompt of a completion that is a chat, which is a text.

    Args:
        answer: the chat.
        prompt: the text.

    Returns:
        The user's turn.

    Raises:
        DataError: if the completion begins with another turn than the assistant's.
    """
    if answer[0]["role"] != "assistant":
        raise DataError(
            f"the prompt is the text {prompt[:60]!r}, but its completion is a chat that begins with a turn "
            f"of {answer[0]['role']!r}, not of the assistant; give the prompt as a chat."
        )
    return [{"role": "user", "content": prompt}]


def as_messages(messages: Any) -> list[dict[str, Any]]:
    """Chats in the form of ShareGPT (`from`, `value`) are renamed.

    Args:
        messages: one chat.

    Returns:
        `role` and `content` of every turn; one that calls tools may have no content.

    Raises:
        DataError: if it is of neither form.
    """
    roles = {"human": "user", "gpt": "assistant"}
    if isinstance(messages, list) and messages and all(isinstance(m, Mapping) for m in messages):
        if all("role" in m and ("content" in m or m.get("tool_calls")) for m in messages):
            return [dict(m) for m in messages]
        if all("from" in m and "value" in m for m in messages):
            return [
                {"role": roles.get(m["from"], m["from"]), "content": m["value"]} for m in messages
            ]
    raise DataError(
        f"a chat is a list of {{'role': …, 'content': …}}, got {str(messages)[:80]!r}; name the "
        "column of the chats."
    )


def with_template(section: DataSection, processor: Any) -> Any:
    """The tokenizer with the chat template of the data.

    Args:
        section: which file, if any.
        processor: the tokenizer or image processor.

    Returns:
        A copy with the template; `processor` itself if it stays as it is.

    Raises:
        ConfigError: if the file cannot be read, or there is no tokenizer.
    """
    if section.chat_template is None:
        return processor
    if not hasattr(processor, "apply_chat_template"):
        raise ConfigError("data.chat_template is for tokenizers, but the model has none.")
    try:
        template = Path(section.chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read data.chat_template {section.chat_template!r}: {error}."
        ) from error
    if processor.chat_template != template:
        processor = copy.deepcopy(processor)
        processor.chat_template = template
    return processor
