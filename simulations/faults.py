"""Sites that fail on purpose: they drop out before or after training, or answer with something malformed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, get_args

import numpy as np

from privacy.errors import FedchorusError
from strategies.job import Faults
from strategies.messages import Answer, Reply, Request, Stage, Step, Stepped


class Handler(Protocol):
    """What answers requests in a site's name."""

    @property
    def name(self) -> str: ...

    def handle(self, request: Request) -> Answer: ...


class DroppedOut(FedchorusError):
    """A simulated site went away without an answer."""


@dataclass(frozen=True)
class FaultySite:
    """Wraps a site's client; what fails, and when, depends only on the seed, the site's number and the round."""

    site: Handler
    number: int
    faults: Faults
    seed: int

    @property
    def name(self) -> str:
        return self.site.name

    def handle(self, request: Request) -> Answer:
        rng = np.random.default_rng([self.seed, self.number, request.round_number, 3])
        fate, kind = rng.random(), int(rng.integers(2**31))
        if fate >= self.faults.dropout + self.faults.malformed:
            return self.site.handle(request)
        drops = fate < self.faults.dropout
        if isinstance(request, Step):
            return self._step(request, drops, kind)
        if drops:
            if kind % 2:  # Every other one trains first and loses the connection then: its budget is spent.
                self.site.handle(request)
            raise DroppedOut("dropped out")
        answer = self.site.handle(request)
        return MALFORMATIONS[kind % len(MALFORMATIONS)](answer) if isinstance(answer, Reply) else answer

    def _step(self, step: Step, drops: bool, kind: int) -> Answer:
        """In a secure sum a site drops out from some stage on, or answers one stage with something malformed."""
        *stages, over = get_args(Stage)
        at, now = kind % len(stages), get_args(Stage).index(step.stage)
        if step.stage == over or now < at or (now > at and not drops):
            return self.site.handle(step)
        if drops and (now > at or kind // len(stages) % 2 == 0):
            raise DroppedOut("dropped out")
        answer = self.site.handle(step)  # It works, and the connection is lost then; or something else arrives.
        if drops:
            raise DroppedOut("dropped out")
        return replace(answer, body=answer.body[:-1] + b"?") if isinstance(answer, Stepped) else answer


def _with(reply: Reply, position: int, value: float) -> Reply:
    contribution = reply.contribution.copy()
    contribution[position] = value
    return replace(reply, contribution=contribution)


MALFORMATIONS: tuple[Callable[[Reply], Reply], ...] = (
    lambda reply: replace(reply, contribution=reply.contribution[:-1]),
    lambda reply: replace(reply, contribution=reply.contribution.astype(np.float64)),
    lambda reply: _with(reply, 0, float("nan")),
    lambda reply: _with(reply, len(reply.contribution) // 2, float("inf")),
    lambda reply: replace(reply, round_number=reply.round_number - 1),
    lambda reply: replace(reply, job="0" * 64),
    lambda reply: replace(reply, site="somebody-else"),
)
