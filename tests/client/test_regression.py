"""Regression trains on a public scale and is measured in the target's own unit."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.regression import Forecasting, Recommendation, TabularRegression
from client.tasks import task_for
from privacy.errors import JobError
from strategies.job_task import TaskChoice
from tests.strategies.jobs import make_job


def regression(data: dict[str, Any] | None = None, **task: Any) -> TabularRegression:
    job = make_job(
        data={"target_type": "number", **(data or {})}, task={"name": "tabular-regression", "model": "linear", **task}
    )
    made = task_for(job)
    assert isinstance(made, TabularRegression)
    return made


@pytest.mark.parametrize(
    ("data", "target", "scaled"),
    [
        ({}, 3.5, 3.5),
        ({"target_range": [0, 10]}, 10.0, 1.0),
        ({"target_range": [0, 10]}, 2.5, -0.5),
        ({"target_range": [0, 10]}, 20.0, 3.0),  # Beyond its range a target is not bent.
        ({"target_log": True}, math.e, 1.0),
        ({"target_range": [1, 100], "target_log": True}, 10.0, 0.0),
    ],
)
def test_the_public_scale(data: dict[str, Any], target: float, scaled: float) -> None:
    task, targets = regression(data), torch.tensor([target])
    assert task.scaled(targets).item() == pytest.approx(scaled, abs=1e-6)
    assert task.natural(torch.tensor([[scaled]]), targets).item() == pytest.approx(target, rel=1e-5)
    assert task.loss(torch.tensor([[scaled + 0.5]]), targets).item() == pytest.approx(0.125, rel=1e-4)


def test_huber_is_quadratic_near_and_linear_far() -> None:
    task = regression(loss="huber", huber_delta=0.5)
    losses = task.loss(torch.tensor([[0.25], [4.0]]), torch.zeros(2))
    assert losses.tolist() == pytest.approx([0.25**2 / 2, 0.5 * (4 - 0.25)])


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.floats(-1, 1), st.floats(0.1, 9)), min_size=2, max_size=9))
def test_errors_are_in_the_unit_of_the_target(rows: list[tuple[float, float]]) -> None:
    task = regression({"target_range": [0, 10]})
    outputs, targets = torch.tensor([[a] for a, _ in rows]), torch.tensor([b for _, b in rows])
    errors = [abs(5 + 5 * a - b) for a, b in rows]
    assert task.metrics(outputs, targets)["mae"].tolist() == pytest.approx(errors, rel=1e-3, abs=1e-4)
    scores = task.scores(outputs, targets)
    assert scores["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)), rel=1e-3, abs=1e-4)


FORECAST = {"time": "t", "lags": [1], "horizon": 1, "spread": 0.5}


@pytest.mark.parametrize(
    ("data", "value", "level", "scaled"),
    [
        ({"target_log": True}, 200.0, 100.0, math.log(2) / 0.5),
        ({"target_range": [0, 400]}, 200.0, 100.0, 100 / 100),
    ],
)
def test_a_forecast_is_relative_to_the_level_of_its_series(
    data: dict[str, Any], value: float, level: float, scaled: float
) -> None:
    job = make_job(
        data={"target_type": "number", "forecast": FORECAST, **data}, task={"name": "forecast", "model": "linear"}
    )
    task, targets = task_for(job), torch.tensor([[value, level]])
    assert isinstance(task, Forecasting)
    assert task.scaled(targets).item() == pytest.approx(scaled)
    assert task.natural(torch.tensor([[scaled]]), targets).item() == pytest.approx(value, rel=1e-5)
    assert task.natural(torch.tensor([[0.0]]), targets).item() == pytest.approx(level)
    assert task.metrics(torch.tensor([[0.0]]), targets)["mae"].item() == pytest.approx(value - level)
    assert task.scores(torch.tensor([[0.0]]), targets)["wape"] == pytest.approx((value - level) / value)


def test_a_rating_is_kept_within_its_range_when_measured_and_not_when_trained() -> None:
    job = make_job(
        data={"target_type": "number", "target_range": [1, 5], "columns": {"x": {"type": "id", "count": 3}}},
        task={"name": "recommendation", "model": "matrix-factorisation", "hidden": [2]},
    )
    task = task_for(job)
    assert isinstance(task, Recommendation)
    outputs, targets = torch.tensor([[3.0, 2.0]]), torch.tensor([5.0])
    assert task.metrics(outputs, targets)["mae"].item() == 0
    assert task.loss(outputs, targets).item() == pytest.approx(2.0)


def test_a_penalty_is_on_the_squared_length_of_what_made_a_rating_and_not_in_the_metric() -> None:
    data = {"target_type": "number", "target_range": [1, 5], "columns": {"x": {"type": "id", "count": 3}}}
    chosen = {"name": "recommendation", "model": "matrix-factorisation", "hidden": [2], "penalty": 0.5}
    task, targets = task_for(make_job(data=data, task=chosen)), torch.tensor([5.0, 1.0])
    model, rows = task.model(1, 0), torch.tensor([[0.0], [2.0]])
    outputs = model(rows)
    parts = {name: p.detach() for name, p in model.named_parameters()}
    plain = 0.5 * (outputs[:, 0].detach() - torch.tensor([1.0, -1.0])) ** 2
    for row, item in enumerate((0, 2)):
        length = parts["items.weight"][item].square().sum() + parts["item_bias.weight"][item].square().sum()
        length += parts["user.weight"].square().sum() + parts["user.bias"].square().sum()
        assert task.loss(outputs, targets)[row].item() == pytest.approx(float(plain[row] + 0.25 * length), rel=1e-5)
    assert task.metrics(outputs, targets)["loss"].tolist() == pytest.approx(plain.tolist())


NUMBER = {"target_type": "number"}
ITEM = {"x": {"type": "id", "count": 3}}


@pytest.mark.parametrize(
    ("data", "task", "said"),
    [
        ({}, {"name": "tabular-regression", "model": "linear"}, 'needs data.target_type = "number"'),
        (NUMBER, {}, 'task.name = "tabular-classification" needs data.target_type = "class"'),
        (
            NUMBER,
            {"name": "tabular-regression"},
            '"logistic-regression" is not for tabular-regression; use one of linear',
        ),
        (NUMBER, {"name": "tabular-regression", "model": "cnn"}, '"cnn" is not for tabular-regression'),
        (NUMBER, {"name": "tabular-regression", "model": "linear", "loss": "cox"}, "use squared or huber"),
        ({}, {"loss": "squared"}, 'task.loss = "squared" is not for tabular-classification; use none'),
        (NUMBER, {"name": "forecast", "model": "linear"}, 'task.name = "forecast" needs a table [data.forecast]'),
        (NUMBER, {"name": "recommendation", "model": "matrix-factorisation"}, 'needs a column of type "id"'),
        (
            {**NUMBER, "columns": ITEM},
            {"name": "recommendation", "model": "matrix-factorisation", "hidden": [2]},
            "needs data.target_range",
        ),
        ({"columns": ITEM}, {}, 'a column of type "id" is not for task.name = "tabular-classification"'),
        ({}, {"name": "text-classification"}, 'needs a column of type "text"'),
        ({}, {"name": "image-classification", "model": "cnn"}, 'needs a column of type "image"'),
    ],
)
def test_what_does_not_go_together_is_refused(data: dict[str, Any], task: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as caught:
        task_for(make_job(data=data, task=task))
    assert said in str(caught.value)


def test_a_users_own_task_is_built_from_the_table_alone() -> None:
    assert isinstance(
        task_for(make_job(task={"name": "client.regression:TabularRegression", "model": "cnn"})), TabularRegression
    )
    assert TabularRegression(TaskChoice()).scaled(torch.tensor([2.0])).item() == 2
