"""How much of a round's work one site does: at most so many steps, for so long, on so much of the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from strategies.job import Job


@dataclass(frozen=True, kw_only=True)
class Pace:
    """At most `steps` a round (None: as many as the job says), for at most `seconds` of `clock`, in which a training
    takes one step at least; of the model's parameters only the last `share` moves."""

    steps: int | None = None
    seconds: float | None = None
    share: float = 1.0
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of(cls, job: Job, site: str) -> Pace:
        """What the job says of `site`."""
        training = job.training
        steps, share = (training.work or {}).get(site), (training.weak or {}).get(site, 1.0)
        return cls(steps=steps, seconds=training.budget_s, share=share)

    def steps_of(self, planned: int) -> int:
        """How many of a round's `planned` steps the site takes, if the time lasts."""
        return planned if self.steps is None else min(planned, self.steps)

    def stint(self, part: float) -> Stint:
        """Begin a training that is this part of the round's, and may take that part of its time."""
        return Stint(self.clock, None if self.seconds is None else self.clock() + part * self.seconds)


@dataclass
class Stint:
    """Asked after each step whether the time is up; counts the steps."""

    clock: Callable[[], float]
    until: float | None
    taken: int = field(default=0, init=False)

    def __call__(self) -> bool:
        self.taken += 1
        return self.until is not None and self.clock() >= self.until
