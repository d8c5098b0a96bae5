"""A strategy gets the records through `fit` alone, and what stays at a site never reaches what leaves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from client.local import LocalTraining
from client.site import SitePlan
from privacy.errors import JobError
from privacy.noise import SeededNoise
from strategies.fedavg import FedAvg
from strategies.job import Job
from strategies.messages import ask_for
from strategies.parameters import Vector
from strategies.protocol import Added, Local, Traits
from strategies.scaffold import Scaffold
from strategies.total import layout_for
from tests.client.test_site import PLAIN, PRIVATE, ask, make_trainer, some_records
from tests.strategies.jobs import make_job


def local_training(job: Job, strategy: Any) -> LocalTraining:
    trainer, records = make_trainer(job), some_records()
    plan = SitePlan.make(job, rows=len(records), parameters=trainer.parameters.size, rng=SeededNoise.kind, site="s")
    return LocalTraining(
        "s",
        job=job,
        plan=plan,
        strategy=strategy,
        trainer=trainer,
        records=records,
        layout=layout_for(job, trainer.parameters.size, strategy.traits),
        noise=lambda number: SeededNoise(1, "s", number),
    )


@dataclass(frozen=True, kw_only=True)
class Greedy(FedAvg):
    """Trains twice as long as it is charged for."""

    def train(self, received: Vector, local: Local) -> Vector:
        return local.fit(local.fit(received).copy())


@dataclass(frozen=True, kw_only=True)
class Curious(FedAvg):
    """Sends a loss of the records."""

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        out[0] = local.loss(received)
        return Added(1.0)


@dataclass(frozen=True, kw_only=True)
class Careless(FedAvg):
    """Puts what it trained for the site alone where its contributions read."""

    @property
    def traits(self) -> Traits:
        return Traits(kept={"sent": "vector"}, own={"mine": "vector"})

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        out[:] = local.memory.get("sent", np.zeros_like(received))
        out += local.memory.get("mine", np.zeros_like(received))
        local.memory["sent"] = np.ones_like(received)
        return Added(1.0)

    def personalise(self, received: Vector, local: Local) -> None:
        trained = local.fit(received).copy()
        local.memory["sent"][:] = trained
        local.memory["sent"] = trained
        local.memory["mine"] = trained


@dataclass(frozen=True, kw_only=True)
class Forgetful(FedAvg):
    """Keeps the trainer's own memory, which it forgot to copy, and trains for itself afterwards."""

    @property
    def traits(self) -> Traits:
        return Traits(kept={"sent": "vector"}, own={"mine": "vector"})

    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        local.memory["sent"] = local.fit(received)
        out[:] = local.memory["sent"]
        return Added(1.0)

    def personalise(self, received: Vector, local: Local) -> None:
        local.memory["mine"] = local.fit(received)


@dataclass(frozen=True, kw_only=True)
class Refunding(FedAvg):
    """Trains, and takes it back."""

    def train(self, received: Vector, local: Local) -> Vector:
        local.fit(received)
        local.fit(received, steps=-local.steps)
        return local.fit(received)


@dataclass(frozen=True, kw_only=True)
class Talkative(FedAvg):
    def contribution(self, received: Vector, local: Local, out: Vector) -> Added:
        return Added(1.0, {"gossip": 1.0})


def test_no_strategy_takes_more_noisy_steps_than_the_site_is_charged_for() -> None:
    with pytest.raises(JobError, match=r"trains \d+ steps in a round that is charged \d+"):
        local_training(PRIVATE, Greedy())(ask(PRIVATE))
    assert np.isfinite(local_training(PLAIN, Greedy())(ask(PLAIN)).contribution).all()


def test_no_strategy_gets_charged_steps_back() -> None:
    with pytest.raises(JobError, match=r"it asks for -\d+ steps of training"):
        local_training(PRIVATE, Refunding())(ask(PRIVATE))


def test_what_a_strategy_forgot_to_copy_is_kept_as_it_was_sent() -> None:
    trained = local_training(PRIVATE, Forgetful())(ask(PRIVATE))
    assert trained.memory is not None
    np.testing.assert_array_equal(trained.memory[:4], trained.contribution[:4])
    assert (trained.memory[4:] != trained.memory[:4]).any()


def test_nothing_is_kept_both_for_contributions_and_for_the_site_alone() -> None:
    with pytest.raises(JobError, match="it keeps 'a' both for its contributions and for the site alone"):
        Traits(kept={"a": "vector"}, own={"a": "vector", "b": "scalar"})


@pytest.mark.parametrize("asked", [None, 1e-4], ids=["a fixed clip norm", "one that the server moves"])
def test_what_a_protected_site_remembers_is_what_its_gate_lets_through(asked: float | None) -> None:
    client = {"noise_multiplier": 1.0, "delta": 1e-3, "clip_norm": 1e-3}
    job = make_job(strategy={"name": "scaffold", "weighting": "equal"}, privacy={"client": client})
    request = ask_for(job.hash, 1, np.array([0.5, -0.5, 0.25, 0, 0, 0, 0, 0], np.float32), None, asked)
    trained = local_training(job, Scaffold(weighting="equal"))(request)
    assert trained.memory is not None
    assert np.linalg.norm(trained.memory) == pytest.approx(asked or 1e-3, rel=1e-3)


def test_with_record_level_privacy_no_loss_is_read_for_a_contribution() -> None:
    with pytest.raises(JobError, match="reads the records besides training"):
        local_training(PRIVATE, Curious())(ask(PRIVATE))
    assert local_training(PLAIN, Curious())(ask(PLAIN)).contribution[0] > 0


@pytest.mark.parametrize("job", [PLAIN, PRIVATE], ids=["plain", "private"])
def test_what_was_trained_for_the_site_alone_reaches_no_contribution(job: Job) -> None:
    training = local_training(job, Careless())
    first = training(ask(job))
    assert not first.contribution[:4].any()
    second = training(ask(job, 2), first.memory)
    assert second.contribution[:4].tolist() == [1, 1, 1, 1]
    assert first.memory is not None
    assert first.memory[:4].tolist() == [1, 1, 1, 1]
    assert np.abs(first.memory[4:]).max() > 0  # What it keeps for itself is there.


def test_a_contribution_has_the_sums_that_the_traits_name() -> None:
    with pytest.raises(JobError, match="other scalars than its traits name"):
        local_training(PLAIN, Talkative())(ask(PLAIN))


def test_the_same_request_trains_the_same_whatever_was_trained_before() -> None:
    training = local_training(PLAIN, FedAvg())
    first = training(ask(PLAIN)).contribution.copy()
    training(ask(PLAIN, 2))
    np.testing.assert_array_equal(training(ask(PLAIN)).contribution, first)
