"""FedBuff counts what is old for less, and is refused where rounds are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from privacy.errors import JobError
from strategies.catalogue import strategy_for
from strategies.composition import check_sites
from strategies.fedavg import FedAvg
from strategies.fedbuff import FedBuff
from strategies.protocol import Strategy, Traits
from tests.strategies.contract import StrategyContract
from tests.strategies.jobs import make_job

DEVICES = {"simulation": {"devices": {"all": {"share": 1.0}}}}


class TestFedBuff(StrategyContract):
    def make(self) -> Strategy:
        return FedBuff()


@pytest.mark.parametrize(("exponent", "steps", "counts"), [(0.5, 0, 1.0), (0.5, 3, 0.5), (1.0, 3, 0.25), (0.0, 9, 1.0)])
def test_an_update_counts_the_less_the_older_it_is(exponent: float, steps: int, counts: float) -> None:
    assert FedBuff(staleness=exponent).discount(steps) == pytest.approx(counts)


def test_it_runs_on_the_clock_of_a_simulation_with_privacy_for_records() -> None:
    private = {"record": {"noise_multiplier": 1.0, "delta": 1e-3}}
    job = make_job(strategy={"name": "fedbuff"}, privacy=private, **DEVICES)
    assert strategy_for(job).traits.asynchronous
    assert job.privacy.record is not None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"secure_aggregation": {}}, "with secure_aggregation"),
        (
            {
                "strategy": {"name": "fedbuff", "weighting": "equal"},
                "privacy": {"client": {"noise_multiplier": 1.0, "delta": 1e-3}},
            },
            "with privacy.client",
        ),
        ({"cohort": {"deadline_s": 5}}, "with cohort.deadline_s"),
        ({"cohort": {"separation": 2}}, "cohort.separation"),
        ({"regions": {"north": ["a"]}}, "with regions"),
        ({"training": {"weak": {"a": 0.5}}}, "with training.weak"),
        ({"robust": {"reduce": "median"}}, r"with \[robust\]"),
        ({"simulation": {}}, r"without \[simulation.devices\]"),
        ({"cohort": {"minimum": 6}}, r"with cohort\.minimum = 6: .*set strategy\.buffer = 6 or more"),
    ],
)
def test_what_needs_a_cohort_is_refused_with_what_would_do(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(JobError, match=why):
        make_job(**{"strategy": {"name": "fedbuff"}, **DEVICES, **changes})


def test_a_least_number_of_answers_that_fills_the_buffer_is_taken() -> None:
    job = make_job(strategy={"name": "fedbuff", "buffer": 7}, cohort={"minimum": 7}, **DEVICES)
    assert strategy_for(job).traits.asynchronous


@dataclass(frozen=True, kw_only=True)
class Hasty(FedAvg):
    """A strategy of a user's own that only says that it has no rounds."""

    @property
    def traits(self) -> Traits:
        return Traits(asynchronous=True)


@dataclass(frozen=True, kw_only=True)
class Fresh(FedBuff):
    """One that is derived from FedBuff."""


def test_only_what_is_derived_from_it_may_say_that_it_has_no_rounds() -> None:
    with pytest.raises(JobError, match=r"its traits say asynchronous, .*derive it from that, or leave asynchronous"):
        strategy_for(make_job(strategy={"name": f"{__name__}:Hasty"}, **DEVICES))
    assert strategy_for(make_job(strategy={"name": f"{__name__}:Fresh"}, **DEVICES)) == Fresh()


def test_a_buffer_of_more_than_all_sites_is_refused_before_anything_is_written() -> None:
    job = make_job(strategy={"name": "fedbuff", "buffer": 4}, **DEVICES)
    with pytest.raises(JobError, match=r"strategy\.buffer: a step takes 4 contributions, .* has 3; lower it to 3"):
        check_sites(job, ["a", "b", "c"], strategy_for(job))
    check_sites(job, ["a", "b", "c", "d"], strategy_for(job))


def test_a_job_that_travels_to_a_deployment_is_refused_there() -> None:
    with pytest.raises(JobError, match="a deployment has rounds; take"):
        strategy_for(make_job(strategy={"name": "fedbuff"}, **DEVICES).portable)
