"""Rounds without waiting, on the virtual clock: devices train on the model that was newest when they began, and the
server steps whenever its buffer is full (FedBuff)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from privacy.ledger import Head
from server.collect import Collected, PlainCollector, Transport
from simulations.devices import Devices, VirtualClock
from strategies.fedbuff import FedBuff
from strategies.messages import Ask
from strategies.parameters import Vector
from strategies.total import Layout, Total


@dataclass
class BufferedCollector:
    """A `server.collect.Collector` whose round is one filling of the strategy's buffer.

    At most `cohort.size` devices train at once. Who answered or failed waits for the next model, so it takes part at
    most once in each step and trains at most once on each model. Where all who could answer are away, time goes on
    until the first of them is back: it looks in each time that it would have trained. If nobody is left, the step is
    taken on a buffer that is not full. A device trains when its answer is due, so what is kept meanwhile is only each
    model that somebody is at work on; what is still being trained at the end, or when a run is cut off, never counted
    and is not charged.
    """

    transport: Transport
    strategy: FedBuff
    devices: Devices
    clock: VirtualClock
    began: dict[str, int] = field(default_factory=dict)
    """For each contributor of the last step: the round of the model that it trained on."""
    _busy: list[tuple[float, str, Ask]] = field(default_factory=list)

    def collect(self, ask: Ask, sites: Sequence[str], total: Total) -> Collected:
        contributors: list[str] = []
        failures: dict[str, str] = {}
        heads: dict[str, Head] = {}
        self.began = {}
        rng = np.random.default_rng([self.devices.job.seed, ask.round_number, 8])
        free = sorted(set(self.devices.rows) - {site for _, site, _ in self._busy})
        free = [free[place] for place in rng.permutation(len(free))]
        looks = {site: self.devices.away(site, ask.round_number) for site in free}
        waiting = [site for site in free if not looks[site]]
        away = [(self.clock.now + n * self.devices.seconds(site), site) for site, n in looks.items() if n]
        heapq.heapify(away)
        at_once = self.devices.job.cohort.size or len(self.devices.rows)
        while len(contributors) < self.strategy.buffer:
            if away and not waiting and not self._busy:
                back, site = heapq.heappop(away)
                self.clock.now = max(self.clock.now, back)
                waiting.append(site)
            while waiting and len(self._busy) < at_once:
                site = waiting.pop()
                heapq.heappush(self._busy, (self.clock.now + self.devices.seconds(site), site, ask))
            if not self._busy:
                break
            self.clock.now, site, asked = heapq.heappop(self._busy)
            aged = _Aged(total, self.strategy.discount(ask.round_number - asked.round_number))
            one = PlainCollector(self.transport).collect(asked, [site], aged)
            failures |= one.failures
            heads |= one.heads
            contributors += one.contributors
            self.began |= dict.fromkeys(one.contributors, asked.round_number)
        return Collected(total, tuple(sorted(contributors)), dict(sorted(failures.items())), heads)

    def staleness(self, round_number: int) -> float:
        """How many steps old the models of the last step's contributors were, on average."""
        ages = [round_number - began for began in self.began.values()]
        return sum(ages) / len(ages) if ages else 0.0


class _Aged(Total):
    """Hands contributions on to another total, their updates times `share`; weights and metrics are as they came."""

    def __init__(self, total: Total, share: float) -> None:
        super().__init__(Layout(0))
        self.layout, self._total, self._share = total.layout, total, np.float32(share)

    def add(self, contribution: Vector) -> None:
        aged = contribution.copy()
        aged[: self.layout.parameters] *= self._share
        self._total.add(aged)
