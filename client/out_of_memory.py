"""Out of memory: one line on what did not fit and on the settings that make it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from privacy.errors import JobError

Doing = Literal["training", "evaluating", "placing the records"]
SAYS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
"""How torch's allocators, of the CPU and of accelerators, say it where they raise a plain RuntimeError."""


class OutOfMemory(JobError):
    """A job's model and rows are too large for the device that trains. Made of counts and settings' names alone, so
    that the text may be told where an error of a process that has seen records may not."""

    def __init__(self, doing: Doing, load: Load, *, rows: int | None, batch: int | None) -> None:
        at_once = f", with {int(rows)} rows at once" if rows is not None else ""
        ways = load.ways(rows, batch)
        super().__init__(
            f"out of memory while {doing} on {load.device}{at_once}; {', or '.join(ways)}, or take a machine with more"
        )


@dataclass(frozen=True)
class Load:
    """What a trainer has in memory: on which kind of device, of which kind of model."""

    device: str
    pretrained: bool
    texts: bool

    def ways(self, rows: int | None, batch: int | None) -> list[str]:
        """What a person can set, the cheapest first; at first what leaves the training as it is."""
        found = []
        if rows is not None and rows > 1:
            half = (rows + 1) // 2
            pieces = f" (a batch of {int(batch)} rows then takes {-(-batch // half)} pieces)" if batch else ""
            found.append(f"set training.physical_batch = {half}{pieces}")
        if self.pretrained:
            found.append('where it is not set yet task.checkpointing = true or task.precision = "bfloat16"')
            found.append("a smaller data.columns.NAME.length or task.tuning.depth" if self.texts else "a smaller model")
        elif self.device != "cpu":
            found.append('training.device = "cpu"')
        return found or ["take a smaller model"]


@contextmanager
def memory_for(doing: Doing, load: Load, *, rows: int | None = None, batch: int | None = None) -> Iterator[None]:
    """Turn an error for want of memory into `OutOfMemory`; any other passes. `rows` are those that are computed with
    at once, `batch` those that one step takes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # By its name too: torch need not be there, and its accelerators have more such classes than one.
        said = str(error).lower()
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(s in said for s in SAYS):
            raise OutOfMemory(doing, load, rows=rows, batch=batch) from error
        raise
