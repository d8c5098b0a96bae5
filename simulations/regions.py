"""Regions of a simulation: each sums its own sites, and the server sums the regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

from server.collect import Collected, PlainCollector, Transport
from strategies.messages import Ask
from strategies.total import Total


@dataclass(frozen=True)
class RegionCollector:
    """A `server.collect.Collector` that holds one total for each region, and hands on their sum.

    The same as one sum over all, up to the rounding of float64. A region of which nobody is asked or answers adds
    nothing.
    """

    transport: Transport
    regions: Mapping[str, Sequence[str]]

    def collect(self, ask: Ask, sites: Sequence[str], total: Total) -> Collected:
        collector = PlainCollector(self.transport)
        regions = [set(region) for region in self.regions.values()]
        own = [[site for site in sites if site in region] for region in regions]
        parts = [collector.collect(ask, members, deepcopy(total)) for members in own]
        for part in parts:
            total.add_total(part.total)
        failures = {site: why for part in parts for site, why in part.failures.items()}
        heads = {site: head for part in parts for site, head in part.heads.items()}
        contributors = sorted(site for part in parts for site in part.contributors)
        return Collected(total, tuple(contributors), dict(sorted(failures.items())), heads)
