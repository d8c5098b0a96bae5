"""The losses of survival are their likelihoods; only the one of a single record may be private."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.scores import c_index
from client.survival import Survival, negative_partial_likelihood
from client.tasks import task_for
from privacy.errors import JobError
from strategies.job_task import TaskChoice
from tests.strategies.jobs import make_job

DATA = {"target_type": "time", "event": "e"}
HAZARDS: dict[str, Any] = {"model": "linear", "loss": "discrete-time", "intervals": [1, 3, 6]}


def by_hand(log_hazard: list[float], time: list[float], event: list[bool]) -> list[float]:
    """Breslow's partial likelihood from its definition, an event at a time."""
    return [
        math.log(sum(math.exp(b) for b, t in zip(log_hazard, time, strict=True) if t >= time[i])) - log_hazard[i]
        if event[i]
        else 0.0
        for i in range(len(time))
    ]


ROWS = st.lists(
    st.tuples(st.floats(-3, 3, width=32), st.integers(0, 5).map(float), st.booleans()), min_size=1, max_size=20
)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
def test_cox_is_breslows_partial_likelihood_whatever_the_ties(rows: list[tuple[float, float, bool]]) -> None:
    log_hazard, time, event = (list(column) for column in zip(*rows, strict=True))
    found = negative_partial_likelihood(torch.tensor(log_hazard), torch.tensor(time), torch.tensor(event).float())
    assert found.tolist() == pytest.approx(by_hand(log_hazard, time, event), rel=1e-4, abs=1e-5)


def test_cox_of_three_by_hand() -> None:
    # All with the same hazard: at time 1 three are at risk, at time 2 two of whom one is censored.
    losses = negative_partial_likelihood(torch.zeros(3), torch.tensor([2.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert losses.tolist() == pytest.approx([math.log(2), math.log(3), 0])


def test_cox_has_the_gradient_of_its_definition() -> None:
    log_hazard = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    time, event = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 1.0])

    def loss(values: Tensor) -> Tensor:
        return negative_partial_likelihood(values, time, event).sum()

    assert torch.autograd.gradcheck(loss, (log_hazard,))


@pytest.mark.parametrize(
    ("time", "event", "likelihood"),
    [
        (0.5, 1, lambda h: h[0]),
        (1.0, 1, lambda h: h[0]),  # An interval has its end.
        (2.0, 1, lambda h: (1 - h[0]) * h[1]),
        (6.0, 1, lambda h: (1 - h[0]) * (1 - h[1]) * h[2]),
        (7.0, 1, lambda h: (1 - h[0]) * (1 - h[1]) * (1 - h[2])),  # After the last interval: survived them all.
        (0.5, 0, lambda h: 1.0),  # Censored within an interval: nothing is known of it.
        (1.0, 0, lambda h: 1 - h[0]),
        (5.9, 0, lambda h: (1 - h[0]) * (1 - h[1])),
        (9.0, 0, lambda h: (1 - h[0]) * (1 - h[1]) * (1 - h[2])),
    ],
)
def test_discrete_time_is_the_likelihood_of_one_record(
    time: float, event: int, likelihood: Callable[[list[float]], float]
) -> None:
    task = Survival(TaskChoice.model_validate({"name": "survival", **HAZARDS}))
    logits = torch.tensor([[-1.0, 0.5, 0.2]])
    expected = -math.log(likelihood(torch.sigmoid(logits)[0].tolist()))
    assert task.loss(logits, torch.tensor([[time, float(event)]])).item() == pytest.approx(expected, abs=1e-6)


def test_risk_is_minus_the_expected_time_within_the_intervals() -> None:
    task = Survival(TaskChoice.model_validate({"name": "survival", **HAZARDS}))
    hazard = [0.5, 0.25, 0.1]
    logits = torch.tensor([[math.log(h / (1 - h)) for h in hazard]])
    # 1 * 1 + 0.5 * 2 + 0.5 * 0.75 * 3: who begins an interval lives through it.
    assert task.risk(logits).item() == pytest.approx(-(1 + 0.5 * 2 + 0.375 * 3))


@pytest.mark.parametrize("choice", [{"model": "linear"}, HAZARDS], ids=["cox", "discrete-time"])
def test_either_loss_finds_who_dies_earlier(choice: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(300, 3)).astype(np.float32)
    death = rng.exponential(size=300) / np.exp(1.5 * rows[:, 0] - rows[:, 1]) * 3
    censored = rng.uniform(1, 8, 300)
    times = np.stack([np.minimum(death, censored), death <= censored], axis=1).astype(np.float32)
    task = Survival(TaskChoice.model_validate({"name": "survival", **choice}))
    model, features, targets = task.model(3, 0), torch.from_numpy(rows), torch.from_numpy(times)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(60):
        optimiser.zero_grad()
        task.loss(model(features), targets).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        found = task.scores(model(features), targets)["c_index"]
    truth = 1.5 * rows[:, 0] - rows[:, 1]
    assert found > c_index(truth, times[:, 0], times[:, 1]) - 0.02


class TestRecordLevelPrivacy:
    def test_is_refused_for_a_loss_that_couples_records_with_what_works(self) -> None:
        privacy = {"record": {"epsilon": 1.0, "delta": 1e-3}}
        with pytest.raises(JobError) as caught:
            task_for(make_job(data=DATA, task={"name": "survival", "model": "linear"}, privacy=privacy))
        assert "couples the records of a batch" in str(caught.value)
        assert 'task.loss = "discrete-time"' in str(caught.value)
        assert "[privacy.client]" in str(caught.value)
        task_for(make_job(data=DATA, task={"name": "survival", **HAZARDS}, privacy=privacy))

    def test_of_whole_clients_goes_with_either(self) -> None:
        privacy = {"client": {"epsilon": 1.0, "delta": 1e-3}}
        job = make_job(
            data=DATA,
            task={"name": "survival", "model": "linear"},
            strategy={"weighting": "equal"},
            privacy=privacy,
        )
        assert getattr(task_for(job), "coupled", None) is True
