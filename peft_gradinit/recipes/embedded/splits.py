"""Deals things to splits, and orders them, by their names alone: no other thing changes that."""

import hashlib

from ...errors import ConfigError

SPLITS = ("train", "validation", "test")


def check_split(data: str, split: str) -> None:
    """Refuse a split that the data do not have (`ConfigError`)."""
    if split not in SPLITS:
        raise ConfigError(f"{data!r} has the splits {list(SPLITS)}, got {split!r}.")


def split_of(name: str) -> str:
    """The split of a module or a topic: one in ten is for validation, one in ten for tests."""
    return {0: "validation", 1: "test"}.get(int(hash_of(name), 16) % 10, "train")


def hash_of(text: str) -> str:
    """The same in every process, unlike `hash`."""
    return hashlib.sha256(text.encode()).hexdigest()
