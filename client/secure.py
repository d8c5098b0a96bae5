"""The gate of a job whose updates are summed securely: what leaves a site is masked, once, after it was paid for.

The order within the stage `mask` is the guarantee: check the request -> check that enough peers hold shares -> reserve
in the site's own ledger -> train -> bound -> encode with this site's share of the noise -> claim the release in the
journal -> mask -> commit -> reply. The other stages move keys and shares, and touch no data.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from client.gate import Gate
from privacy.errors import BudgetExceeded
from privacy.noise import NoiseSource
from privacy.secagg.client import SecureClient
from strategies.messages import MalformedMessage, Refusal, Step, Stepped
from strategies.parameters import Vector
from strategies.secure import SecureSum, rotation_of


@dataclass(frozen=True)
class InFile:
    """A session's secrets in a file of the site's own, for a client that is a new process at each message.

    Readable by its owner alone; overwritten with zeros before it is removed.
    """

    path: Path

    def load(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def save(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In place, not by renaming: a file that is replaced leaves its secrets on the disk. What a crash cuts short
        # is refused when it is read, and only this round is lost.
        with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            file.write(bytes(max(os.fstat(file.fileno()).st_size - len(content), 0)))  # What was longer before.
            file.truncate(len(content))

    def wipe(self) -> None:
        try:
            with open(self.path, "r+b") as file:
                file.write(bytes(os.fstat(file.fileno()).st_size))
                file.flush()
                os.fsync(file.fileno())
            self.path.unlink()
        except FileNotFoundError:
            pass


@dataclass
class Stopwatch:
    """Adds up how long something took in this process."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


@dataclass(frozen=True)
class SecureGate:
    """One site's gate for one job with secure aggregation: `gate` is what any job has, `member` the site's protocol.

    `noise` makes the source of a round's rounding and noise share; `stopwatch` says how long encoding and masking took.
    """

    gate: Gate
    plan: SecureSum
    member: SecureClient
    noise: Callable[[int], NoiseSource]
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def answer(self, step: Step, train: Callable[[], Vector]) -> Stepped | Refusal:
        """Answer one step; `train` is called in the stage `mask` alone.

        Raises `Refused` for whatever the protocol does not allow, and `MalformedMessage` for another job. A spent
        budget gives a `Refusal`, before any data are touched.
        """
        if step.job != self.gate.job:
            raise MalformedMessage("the request is for another job than this site has approved")
        if step.stage == "mask":
            return self._mask(step, train)
        return Stepped(self.gate.site, step.job, step.round_number, step.stage, self._moved(step))

    def _moved(self, step: Step) -> bytes:
        match step.stage:
            case "advertise":
                return self.member.advertise(step.body)
            case "share":
                return self.member.share(step.body)
            case "agree":
                return self.member.agree(step.body)
            case "reveal":
                return self.member.reveal(step.body)
            case _:  # It may come late, when the next round has begun.
                self.member.forget(until=step.round_number)
                return b""

    def _mask(self, step: Step, train: Callable[[], Vector]) -> Stepped | Refusal:
        ask, gate = step.ask, self.gate
        if ask is None:
            raise MalformedMessage("the stage mask comes without a request to train")
        try:
            gate.check(ask)
            self.member.admit(step.body, round_number=ask.round_number, model=ask.model_hash)
            reservation = gate.reserve(ask)
            contribution = gate.checked(train(), ask)
            with self.stopwatch.running():
                rotation = rotation_of(ask.round_number, ask.model_hash)
                source = self.noise(ask.round_number)
                words = self.plan.encode(contribution, rotation=rotation, source=source, clip_norm=ask.clip_norm)
                body = self.member.mask(words)
            head = gate.commit(reservation, hashlib.sha256(words.data).hexdigest())
        except BudgetExceeded:
            self.member.forget()
            return Refusal(gate.site, gate.job, ask.round_number)
        except BaseException:  # Whatever went wrong: the session is over for this site, and its secrets go.
            self.member.forget()
            raise
        return Stepped(gate.site, gate.job, ask.round_number, "mask", body, words, head)
