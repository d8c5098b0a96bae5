"""How much of a round's work one site does: at most so many steps, for so long, on so much of the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from strategies.catalogue import strategy_for
from strategies.job import Job


@dataclass(frozen=True, kw_only=True)
class Pace:
    """At most `steps` a round (None: as many as the job says), for at most `seconds` of `clock`, in which a training
    takes one step at least; of the model's parameters only the last `share` moves. With `trainings` of 2 a site trains
    as many steps again for itself alone, and each training may take half of the time."""

    steps: int | None = None
    trainings: int = 1
    seconds: float | None = None
    share: float = 1.0
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def of(cls, job: Job, site: str, *, trainings: int | None = None) -> Pace:
        """What the job says of `site`; `trainings` is what its strategy takes, where that is known already."""
        training = job.training
        steps, share = (training.work or {}).get(site), (training.weak or {}).get(site, 1.0)
        trainings = trainings_of(job) if trainings is None else trainings
        return cls(steps=steps, trainings=trainings, seconds=training.budget_s, share=share)

    def steps_of(self, planned: int) -> int:
        """How many of a round's `planned` steps the site takes, if the time lasts."""
        return planned if self.steps is None else min(planned, self.steps)

    def stint(self, part: float) -> Stint:
        """Begin a training that is this part of the round's, and may take that part of its time."""
        seconds = None if self.seconds is None else part * self.seconds / self.trainings
        return Stint(self.clock, None if seconds is None else self.clock() + seconds)


def trainings_of(job: Job) -> int:
    """How often a site takes a round's steps: twice where it also trains what is its own alone (Ditto)."""
    return 2 if strategy_for(job).traits.own else 1


@dataclass
class Stint:
    """Asked after each step whether the time is up; counts the steps."""

    clock: Callable[[], float]
    until: float | None
    taken: int = field(default=0, init=False)

    def __call__(self) -> bool:
        self.taken += 1
        return self.until is not None and self.clock() >= self.until
