"""What sections of a recipe are made of."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Task = Literal["CAUSAL_LM", "PREFERENCE", "SEQ_2_SEQ_LM", "SEQ_CLS", "IMAGE_CLS"]
CLASSIFIED = ("SEQ_CLS", "IMAGE_CLS")
"""Tasks whose head has an output for each class."""

Positive = Annotated[int, Field(ge=1)]


def _from_home(place: str) -> str:
    if not place.startswith("~"):
        return place  # as it is: a name on the Hub is no path
    try:
        return str(Path(place).expanduser())
    except RuntimeError as error:
        raise ValueError(f"there is no such home folder: {error}") from error


Place = Annotated[str, AfterValidator(_from_home)]
"""A file, a folder, or a name on the Hub; `~` is the home folder, as in a shell."""


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def _with_group(pattern: str) -> str:
    if not _compiled(pattern).groups:
        raise ValueError(f"{pattern!r} has no group in round brackets, whose match is kept")
    return pattern


Pattern = Annotated[str, AfterValidator(lambda pattern: _compiled(pattern).pattern)]
"""A regular expression."""
Group = Annotated[str, AfterValidator(_with_group)]
"""A regular expression whose first group is what it finds."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def nearest(key: str, known: Any) -> str:
    """`", did you mean 'x'?"` for the known key that is closest; empty if none is close."""
    found = difflib.get_close_matches(key, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
