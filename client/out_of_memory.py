"""Out of memory: one line on what did not fit and on the settings that make it smaller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from privacy.errors import JobError, wants_memory

Doing = Literal["training", "evaluating", "placing the records", "placing the model"]
DEVICES = ("cpu", "cuda", "mps", "xpu")


class OutOfMemory(JobError):
    """A job's model and rows are too large for the device that trains. Made of counts and settings' names alone, so
    that it may be told where an error of a process that has seen records may not: as `fields`, from which the other
    side makes the text."""

    def __init__(self, doing: Doing, load: Load, *, rows: int | None, batch: int | None) -> None:
        self.fields = {**asdict(load), "doing": doing, "rows": rows, "batch": batch}
        at_once = f", with {int(rows)} rows at once" if rows is not None else ""
        ways = load.ways(rows, batch)
        super().__init__(
            f"out of memory while {doing} on {load.device}{at_once}; {', or '.join(ways)}, or take a machine with more"
        )

    @classmethod
    def told(cls, fields: Mapping[str, Any]) -> OutOfMemory | None:
        """The same from the `fields` of another process, whatever it says of itself; None for what are not ones."""
        device, doing = fields.get("device"), fields.get("doing")
        counts = [fields.get("rows"), fields.get("batch")]
        if any(count is not None and (type(count) is not int or not 0 <= count < 2**31) for count in counts):
            return None
        if device not in DEVICES or doing not in get_args(Doing):
            return None
        load = Load(device, pretrained=fields.get("pretrained") is True, texts=fields.get("texts") is True)
        return cls(cast(Doing, doing), load, rows=counts[0], batch=counts[1])


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
        if wants_memory(error):
            raise OutOfMemory(doing, load, rows=rows, batch=batch) from error
        raise
