"""What sections of a recipe are made of."""

import difflib
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


class Section(BaseModel):
    """A part of a recipe: unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def nearest(key: str, known: Any) -> str:
    """`", did you mean 'x'?"` for the known key that is closest; empty if none is close."""
    found = difflib.get_close_matches(key, list(known), n=1)
    return f", did you mean {found[0]!r}?" if found else ""
