"""Each parameter is averaged over those who trained it, by what travels in the sum alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privacy.errors import JobError
from strategies.catalogue import strategy_for
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.parameters import Vector
from strategies.partial import PartialAverage, frozen_first, shares_of
from strategies.protocol import Strategy
from tests.strategies.contract import StrategyContract
from tests.strategies.jobs import make_job
from tests.strategies.lent import Lent, contribute, float32, run_round, run_rounds, total_of

START = float32(0, 0, 0, 0)


@dataclass
class Weak(Lent):
    """A site that leaves its first layers as they are, as `client.local` has it."""

    def fit(self, start: Vector, *, frozen: NDArray[np.bool_] | None = None, **rest: Any) -> Vector:
        resting = np.arange(len(start)) < frozen_first(len(start), self.share)
        moved = super().fit(start, frozen=resting if frozen is None else frozen | resting, **rest)
        return np.where(resting, start, moved).astype(np.float32)


class TestPartialAverage(StrategyContract):
    def make(self) -> Strategy:
        return PartialAverage(FedAvg(), (0.25, 0.5))


def test_it_is_the_average_worked_out_by_hand() -> None:
    # Of four parameters the strong site trains all, of weight 10; one of weight 20 the last two; one of 30 the last.
    sites = [
        Weak(goal=START, arrives=float32(1, 1, 1, 1), rows=10),
        Weak(goal=START, arrives=float32(9, 9, 4, 4), rows=20, share=0.5),
        Weak(goal=START, arrives=float32(9, 9, 9, 8), rows=30, share=0.25),
    ]
    strategy = PartialAverage(FedAvg(), (0.25, 0.5))
    model = run_round(strategy, FedAvg().start(START, sites=3), sites).model
    np.testing.assert_allclose(model, [1, 1, (10 + 80) / 30, (10 + 80 + 240) / 60], rtol=1e-6)


@settings(max_examples=30)
@given(
    shares=st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]), min_size=1, max_size=6),
    size=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_it_is_the_average_of_each_parameter_over_those_who_trained_it(
    shares: list[float], size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    start = rng.normal(size=size).astype(np.float32)
    models, rows = rng.normal(size=(len(shares), size)).astype(np.float32), rng.integers(1, 9, len(shares))
    sites = [Weak(goal=start, arrives=m, rows=int(n), share=s) for m, n, s in zip(models, rows, shares, strict=True)]
    strategy = PartialAverage(FedAvg(), tuple(sorted({share for share in shares if share < 1})))
    model = run_round(strategy, FedAvg().start(start, sites=len(sites)), sites).model
    for place in range(size):
        trained = [place >= frozen_first(size, share) for share in shares]
        wanted = np.average(models[trained, place], weights=rows[trained]) if any(trained) else start[place]
        assert model[place] == pytest.approx(wanted, abs=1e-5)


def test_two_shares_that_are_nearly_the_same_are_two() -> None:
    shares = (0.333333, 0.3333333)
    sites = [Weak(goal=START, arrives=float32(1, 1, 1, 1), rows=10)]
    for share, rows in zip(shares, (20, 30), strict=True):
        sites.append(Weak(goal=START, arrives=float32(9, 9, 4, 4), rows=rows, share=share))
    model = run_round(PartialAverage(FedAvg(), shares), FedAvg().start(START, sites=3), sites).model
    np.testing.assert_allclose(model, [1, 1, 210 / 60, 210 / 60], rtol=1e-6)


@pytest.mark.parametrize("inner", [FedAvg(), FedAvgM(momentum=0.5)])
def test_where_nobody_is_weak_it_is_the_strategy_inside(inner: Strategy) -> None:
    sites = [Weak(goal=float32(1, 2, 3, 4)), Weak(goal=float32(-1, 0, 2, 2), rows=30)]
    ours, theirs = (run_rounds(s, START, sites, 3).model for s in (PartialAverage(inner, (0.5,)), inner))
    np.testing.assert_array_equal(ours, theirs)


def test_a_parameter_that_nobody_trained_stays_though_the_sums_are_rounded() -> None:
    strategy = PartialAverage(FedAvg(), (0.5,))
    state = strategy.start(float32(7, 7, 7, 7), sites=1)
    sent = contribute(strategy, state.model, Weak(goal=START, arrives=float32(0, 0, 1, 1), share=0.5))
    total, rounding = total_of(strategy, 4, [sent]), np.zeros(6)
    rounding[[0, 5]] = 1e-11, -1e-11
    total.add_sum(rounding)
    np.testing.assert_allclose(strategy.step(state, total).model, [7, 7, 1, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "share", "frozen"), [(10, 1.0, 0), (10, 0.5, 5), (10, 0.3, 7), (10, 0.01, 9), (3, 0.34, 1)]
)
def test_a_share_is_of_the_last_parameters_and_never_none(parameters: int, share: float, frozen: int) -> None:
    assert frozen_first(parameters, share) == frozen


def test_the_shares_are_those_that_the_job_names_each_once() -> None:
    devices = {"weak": {"share": 0.5, "trains": 0.3}, "strong": {"share": 0.5}}
    job = make_job(training={"weak": {"a": 0.5, "b": 0.3, "c": 0.5}}, simulation={"devices": devices})
    assert shares_of(job) == (0.3, 0.5)
    assert isinstance(strategy_for(job), PartialAverage)
    assert not isinstance(strategy_for(make_job()), PartialAverage)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy": {"name": "fednova"}}, "training.weak with strategy.name"),
        ({"strategy": {"name": "feddyn", "weighting": "equal"}}, "training.weak with strategy.name"),
        ({"strategy": {"name": "q-ffl", "weighting": "equal"}}, "training.weak with strategy.name"),
        (
            {"strategy": {"weighting": "equal"}, "privacy": {"client": {"noise_multiplier": 1.0, "delta": 1e-3}}},
            "training.weak with privacy.client",
        ),
        ({"robust": {"max_norm": 1.0}}, r"training.weak with \[robust\]"),
    ],
)
def test_weak_sites_are_refused_where_the_step_needs_the_whole_model(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(JobError, match=why):
        make_job(training={"weak": {"a": 0.5}}, **changes)


def test_a_site_trains_some_share_of_the_model() -> None:
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(JobError, match=r"training\.weak\.a"):
            make_job(training={"weak": {"a": share}})
