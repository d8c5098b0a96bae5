"""Sites that fail on purpose: they drop out before or after training, answer with something malformed, or lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from client.data import Records
from privacy.errors import FedchorusError
from privacy.noise import NoiseSource
from strategies.job import Faults
from strategies.messages import Answer, Reply, Request, Stage, Step, Stepped
from strategies.parameters import Vector
from strategies.secure import SecureSum


class Handler(Protocol):
    """What answers requests in a site's name."""

    @property
    def name(self) -> str: ...

    def handle(self, request: Request) -> Answer: ...


class DroppedOut(FedchorusError):
    """A simulated site went away without an answer."""


@dataclass(frozen=True)
class FaultySite:
    """Wraps a site's client; what fails, and when, depends only on the seed, the site's number and the round.

    `lie` alters what left the site's gate. In a secure sum it is too late here: see `LyingSum`.
    """

    site: Handler
    number: int
    faults: Faults
    seed: int
    lie: Lie | None = None

    @property
    def name(self) -> str:
        return self.site.name

    def handle(self, request: Request) -> Answer:
        rng = np.random.default_rng([self.seed, self.number, request.round_number, 3])
        fate, kind = rng.random(), int(rng.integers(2**31))
        if fate >= self.faults.dropout + self.faults.malformed:
            answer = self.site.handle(request)
            if self.lie is None or not isinstance(answer, Reply):
                return answer
            return replace(answer, contribution=self.lie(answer.contribution, request.round_number))
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
        if not isinstance(answer, Stepped) or not answer.body:
            return answer
        return replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))


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


# -- lies --------------------------------------------------------------------------------------------------------------


def liars(names: Sequence[str], faults: Faults, *, seed: int) -> frozenset[str]:
    """Which sites lie: the share of them that the job says, the same in every round, drawn by the seed."""
    count = round(faults.byzantine * len(names))
    drawn = np.random.default_rng([seed, 4]).choice(len(names), size=count, replace=False)
    return frozenset(names[index] for index in drawn)


@dataclass(frozen=True)
class Lie:
    """What one lying site does, as `Faults` says; `parameters` is how many numbers its update has."""

    faults: Faults
    number: int
    seed: int
    parameters: int

    @property
    def scale(self) -> float:
        given = self.faults.scale
        return given if given is not None else 1.0 if self.faults.attack == "label-flip" else 10.0

    def told(self, records: Records, classes: int) -> Records:
        """The records that the site trains on: with "label-flip" class c is called (classes - 1 - c)."""
        return replace(records, target=classes - 1 - records.target) if self.faults.attack == "label-flip" else records

    def __call__(self, contribution: Vector, salt: int) -> Vector:
        """What the site sends for its honest `contribution`: a new array, finite, with the weight and metrics of the
        honest one. Noise is drawn by `salt`, which tells rounds apart."""
        lied, update = contribution.copy(), contribution[: self.parameters].astype(np.float64)
        match self.faults.attack:
            case "sign-flip":
                update *= -self.scale
            case "noise":
                drawn = np.random.default_rng([self.seed, self.number, salt, 5]).standard_normal(self.parameters)
                update = drawn * (self.scale * np.linalg.norm(update) / np.linalg.norm(drawn))
            case _:
                update *= self.scale
        most = np.finfo(np.float32).max
        lied[: self.parameters] = np.clip(update, -most, most)
        return lied


@dataclass(frozen=True)
class LyingSum(SecureSum):
    """The plan of a secure sum at a site that lies: the masked update is not the one that its gate let through."""

    lie: Lie | None = None

    @classmethod
    def by(cls, lie: Lie, plan: SecureSum) -> LyingSum:
        return cls(**{field.name: getattr(plan, field.name) for field in fields(plan)}, lie=lie)

    def encode(
        self, contribution: Vector, *, rotation: bytes, source: NoiseSource, clip_norm: float | None = None
    ) -> NDArray[np.uint8]:
        assert self.lie is not None
        lied = self.lie(contribution, int.from_bytes(rotation[:8], "big"))
        if self.distributed is None and self.clipped is None:  # A liar takes care that its words can be masked.
            update = lied[: self.layout.parameters]
            np.clip(update, -self.fixed.reach, self.fixed.reach, out=update)
        return super().encode(lied, rotation=rotation, source=source, clip_norm=clip_norm)
