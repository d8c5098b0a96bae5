"""What the tables of a job file are made of: strict sections, and the types of their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
LARGEST = 3e38  # What float32 holds, in which models are trained.
Count = Annotated[int, Field(gt=0, le=2**53)]  # As far as a float counts.
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Bound = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the job file. Strict: no unknown keys, no silent conversions between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def refuse_repeated(key: str, values: Sequence[str | int | float] | None) -> None:
    texts = [str(value) for value in values or []]
    for position, value in enumerate(values or []):
        # Data are compared by number (1 is 1.0), or by text where one of the values is text (1 is "1").
        if value in list(values or [])[:position] or str(value) in texts[:position]:
            raise ValueError(f"`{key}`: {value!r} is listed twice")
