"""FedBuff counts what is old for less, and is refused where rounds are needed."""

from __future__ import annotations

from typing import Any

import pytest

from privacy.errors import JobError
from strategies.catalogue import strategy_for
from strategies.fedbuff import FedBuff
from strategies.protocol import Strategy
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
    ],
)
def test_what_needs_a_cohort_is_refused_with_what_would_do(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(JobError, match=why):
        make_job(**{"strategy": {"name": "fedbuff"}, **DEVICES, **changes})


def test_a_job_that_travels_to_a_deployment_is_refused_there() -> None:
    with pytest.raises(JobError, match="a deployment has rounds; take"):
        strategy_for(make_job(strategy={"name": "fedbuff"}, **DEVICES).portable)
