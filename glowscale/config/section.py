"""What all sections of a config share."""

from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a config: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


TAGS = ("kind", "family")
"""Keys that tell which of several sections one is; they come first."""


def tag_of(section: type[Section]) -> tuple[str, str] | None:
    """The key, and its value, that tell a section from others in its place; None if none does."""
    for key in TAGS:
        if key in section.model_fields:
            return key, get_args(section.model_fields[key].annotation)[0]
    return None
