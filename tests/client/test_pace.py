"""A site does as much of a round as it can: so many steps, so long, on so much of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from client.adjustment import Adjustment
from client.local import LocalTraining
from client.pace import Pace
from client.site import SitePlan
from client.training import Trainer
from privacy.errors import JobError
from privacy.noise import SeededNoise
from strategies.catalogue import strategy_for
from strategies.job import Job
from strategies.messages import ask_for
from strategies.parameters import Vector
from strategies.partial import frozen_first
from strategies.total import layout_for
from tests.client.test_site import make_trainer, some_records
from tests.strategies.jobs import make_job

RECORD = {"record": {"noise_multiplier": 4.0, "delta": 1e-3}}


@dataclass
class Ticks:
    """A clock that goes on by a second whenever it is read."""

    now: float = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def make_job_of(steps: int = 8, **changes: Any) -> Job:
    training = {"local_steps": steps, "batch_size": None, "sampling_rate": 1.0, **changes.pop("training", {})}
    return make_job(**{"training": training, **changes})


def contribution_of(job: Job, *, pace: Pace | None = None, trainer: Trainer | None = None) -> Vector:
    """What site "north" adds in its first round, from a model of halves."""
    trainer, records, strategy = trainer or make_trainer(job), some_records(), strategy_for(job)
    size = trainer.parameters.size
    training = LocalTraining(
        "north",
        job=job,
        plan=SitePlan.make(job, rows=len(records), parameters=size, rng=SeededNoise.kind, site="north"),
        strategy=strategy,
        trainer=trainer,
        records=records,
        layout=layout_for(job, size, strategy.traits),
        noise=lambda number: SeededNoise(1, "north", number),
        pace=pace,
    )
    return training(ask_for(job.hash, 1, np.full(size, 0.5, np.float32), None)).contribution


class TestTime:
    def test_a_site_stops_when_its_time_is_up(self) -> None:
        # The clock is read once to begin with, and after each step: three steps are two seconds and a bit.
        pace = Pace(seconds=2.5, clock=Ticks())
        ours, theirs = contribution_of(make_job_of(8), pace=pace), contribution_of(make_job_of(3))
        np.testing.assert_array_equal(ours, theirs)

    def test_a_site_without_time_takes_one_step(self) -> None:
        ours = contribution_of(make_job_of(8), pace=Pace(seconds=1e-9, clock=Ticks()))
        np.testing.assert_array_equal(ours, contribution_of(make_job_of(1)))

    def test_a_site_with_time_takes_all_its_steps(self) -> None:
        ours = contribution_of(make_job_of(8), pace=Pace(seconds=1e9))
        np.testing.assert_array_equal(ours, contribution_of(make_job_of(8)))

    def test_fednova_is_told_the_steps_that_were_taken(self) -> None:
        nova = {"name": "fednova"}
        ours = contribution_of(make_job_of(8, strategy=nova), pace=Pace(seconds=2.5, clock=Ticks()))
        np.testing.assert_array_equal(ours, contribution_of(make_job_of(3, strategy=nova)))
        assert ours[-3] == 12 * 3  # Rows times steps, before the loss and the examples.

    @pytest.mark.parametrize("name", ["pfedme", "fedrep", "ditto"])
    def test_trainings_of_one_round_share_its_time(self, name: str) -> None:
        job = make_job_of(8, strategy={"name": name}, task={"model": "mlp", "hidden": [2]}, training={"budget_s": 4.0})
        counted = Counted(job)
        contribution_of(job, pace=replace(Pace.of(job, "north"), clock=Ticks()), trainer=counted)
        # Half of the eight steps, and what of a step goes beyond each training's time.
        assert 4 <= sum(counted.steps) <= 4 + len(counted.steps) - 1
        assert len(counted.steps) > 1

    def test_what_a_site_trains_for_itself_alone_has_half_of_the_time(self) -> None:
        job = make_job_of(8, strategy={"name": "ditto"}, training={"budget_s": 6.0})
        counted = Counted(job)
        contribution_of(job, pace=replace(Pace.of(job, "north"), clock=Ticks()), trainer=counted)
        assert counted.steps == [3, 3]
        assert [Pace.of(make_job_of(strategy={"name": name}), "a").trainings for name in ("fedavg", "pfedme")] == [1, 1]

    def test_with_record_level_privacy_it_is_refused_as_the_secret_batches_decide_how_many_steps_fit(self) -> None:
        with pytest.raises(JobError, match=r"training.budget_s with privacy.record: .*take training.work"):
            make_job_of(8, privacy=RECORD, training={"budget_s": 0.5})

    def test_dp_sgd_takes_the_fixed_work_of_a_site(self) -> None:
        ours = contribution_of(make_job_of(8, privacy=RECORD, training={"work": {"north": 3}}))
        np.testing.assert_array_equal(ours, contribution_of(make_job_of(3, privacy=RECORD)))

    def test_what_was_planned_is_charged_however_few_steps_are_taken(self) -> None:
        plans = [
            SitePlan.make(job, rows=12, parameters=4, rng=SeededNoise.kind, site="north")
            for job in (
                make_job_of(8, privacy=RECORD),
                make_job_of(8, privacy=RECORD, training={"work": {"north": 2}}),
            )
        ]
        assert plans[0].events == plans[1].events
        assert plans[1].sgd is not None
        assert plans[1].sgd.steps == 8


class Counted(Trainer):
    """Counts the steps of each training."""

    def __init__(self, job: Job) -> None:
        trainer = make_trainer(job)
        self.__dict__ |= vars(trainer)
        self.steps: list[int] = []

    def train(self, *arguments: Any, enough: Callable[[], bool] = lambda: False, **rest: Any) -> dict[str, float]:
        self.steps.append(0)

        def counted() -> bool:
            self.steps[-1] += 1
            return enough()

        return super().train(*arguments, enough=counted, **rest)


class TestWork:
    def test_a_site_takes_at_most_the_steps_that_the_job_says(self) -> None:
        ours = contribution_of(make_job_of(8, training={"work": {"north": 3, "south": 1}}))
        np.testing.assert_array_equal(ours, contribution_of(make_job_of(3)))
        ours = contribution_of(make_job_of(2, training={"work": {"north": 3}}))
        np.testing.assert_array_equal(ours, contribution_of(make_job_of(2)))

    @pytest.mark.parametrize("given", [{"budget_s": 1.0}, {"work": {"north": 1}}])
    def test_a_strategy_that_counts_on_equal_steps_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(JobError, match=f'training.{next(iter(given))} with strategy.name = "scaffold"'):
            make_job(strategy={"name": "scaffold", "weighting": "equal"}, training=given)

    @pytest.mark.parametrize(
        "given", [{"budget_s": 0}, {"budget_s": -1.0}, {"work": {"north": 0}}, {"work": {"a b": 1}}]
    )
    def test_no_time_no_steps_and_no_name_are_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(JobError, match=next(iter(given))):
            make_job(training=given)


class TestShare:
    @pytest.mark.parametrize("privacy", [{}, RECORD])
    def test_a_weak_site_moves_the_last_share_of_the_model_and_nothing_else(self, privacy: dict[str, Any]) -> None:
        job = make_job_of(2, task={"model": "mlp", "hidden": [4]}, training={"weak": {"north": 0.4}}, privacy=privacy)
        size = make_trainer(job).parameters.size
        sent, first = contribution_of(job), frozen_first(size, 0.4)
        assert not sent[:first].any()
        assert sent[first:size].all()
        assert (sent[size], sent[size + 1]) == (12.0, 12.0)  # Its weight, and once more under its share.

    def test_a_site_that_is_not_weak_says_that_its_weight_is_nobodys_share(self) -> None:
        sent = contribution_of(make_job_of(2, training={"weak": {"south": 0.5}}))
        assert (sent[-4], sent[-3]) == (12.0, 0.0)

    def test_layers_that_rest_are_as_if_their_gradients_were_worked_out_and_thrown_away(self) -> None:
        job = make_job_of(3, task={"model": "mlp", "hidden": [4]})
        trainer, records = make_trainer(job), some_records()
        start, sizes = trainer.read().copy(), trainer.parameters.sizes
        models = []
        for few in (sizes[0] + sizes[1], sizes[0] + sizes[1] - 1):  # Two whole arrays; and all but one number of them.
            frozen = np.arange(len(start)) < few
            trainer.load(start)
            trainer.train(trainer.place(records), seed=1, adjust=Adjustment(frozen=frozen))
            models.append(trainer.read().copy())
        whole = sizes[0] + sizes[1]
        np.testing.assert_array_equal(models[0][:whole], start[:whole])
        assert not np.array_equal(models[0][whole:], start[whole:])
        # One bias that moves changes the rest a little; with none moving the last layers train as on fixed features.
        np.testing.assert_allclose(models[0][whole:], models[1][whole:], atol=0.05)
        arrays = [array for array in vars(trainer)["_arrays"] if isinstance(array, torch.Tensor)]
        assert all(array.requires_grad for array in arrays)
