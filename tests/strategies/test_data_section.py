"""What a job says of its data and task must fit together; what does not is refused with the reason."""

from typing import Any

import pytest

from privacy.errors import JobError
from strategies.job_task import TaskChoice
from tests.strategies.jobs import make_job

NUMBER: dict[str, Any] = {"target_type": "number"}
SERIES: dict[str, Any] = {**NUMBER, "target_log": True, "forecast": {"time": "week", "horizon": 2}}
LETTERS = {"type": "characters", "alphabet": "ab", "window": 4}
RECORD = {"record": {"epsilon": 1.0, "delta": 1e-5}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {**NUMBER, "positive": [1]}}, 'positive and classes are for target_type = "class"'),
        ({"data": {"target_log": True}}, 'are for target_type = "number"'),
        ({"data": {"target_range": [0, 1]}}, 'are for target_type = "number"'),
        ({"data": {**NUMBER, "target_range": [2, 1]}}, "[low, high] with low < high"),
        ({"data": {**NUMBER, "target_range": [0, 1], "target_log": True}}, "a target_range above zero"),
        ({"data": {"target_type": "time"}}, "go together"),
        ({"data": {"event": "died"}}, "go together"),
        ({"data": {"target_type": "time", "event": "x"}}, "also listed as another column"),
        ({"data": {"target_type": "time", "event": "y"}}, "also listed as another column"),
        ({"data": {"target_type": "next"}}, "the one column, of characters or tokens"),
        ({"data": {"columns": {"y": LETTERS}}}, "would be its own feature"),
        ({"data": {"columns": {"a": LETTERS, "x": {"range": [0, 1]}}}}, "columns.a is a whole record by itself"),
        ({"data": {"columns": {"a": {"type": "text"}}}}, "a column of type 'text' needs its `buckets`"),
        ({"data": {"columns": {"a": {"type": "characters", "window": 3}}}}, "needs its `alphabet`"),
        ({"data": {"columns": {"a": {**LETTERS, "alphabet": "aba"}}}}, "'a' is listed twice"),
        ({"data": {"columns": {"a": {"type": "image"}}}}, "needs its `shape`"),
        ({"data": {"columns": {"a": {"type": "image", "shape": [4, 5]}}}}, "[side, side]"),
        ({"data": {"columns": {"a": {"type": "id"}}}}, "needs its `count`"),
        ({"data": {"columns": {"a": {"range": [0, 1], "buckets": 3}}}}, "a column of type 'number' has no `buckets`"),
        ({"data": {"columns": {"a": {"type": "id", "count": 3, "shape": [2, 2]}}}}, "has no `shape`"),
        ({"data": {"columns": {"a": {"type": "text", "buckets": 4, "ngrams": [3, 1]}}}}, "[shortest, longest]"),
        (
            {"data": {"columns": {"a": {"type": "text", "buckets": 4}}, "scaling": "site"}},
            "numbers and categories alone",
        ),
        ({"data": {"held_out": {}}}, "exactly one of column, path and arrays"),
        ({"data": {"held_out": {"path": "a", "column": "b", "values": [1]}}}, "exactly one of column, path and arrays"),
        ({"data": {"held_out": {"column": "b"}}}, "column and values go together"),
        ({"data": {**SERIES, "held_out": {"path": "a"}}}, "leave out held_out"),
        ({"data": {**SERIES, "target_log": None}}, "set target_log = true, or give target_range"),
        ({"data": {**SERIES, "forecast": {"time": "x", "horizon": 2}}}, "the time 'x' of the forecast"),
        ({"data": {**SERIES, "forecast": {"time": "week", "horizon": 2, "lags": [1, 1]}}}, "1 is listed twice"),
        ({"data": SERIES, "privacy": RECORD}, "use [privacy.client]"),
        (
            {"data": {**SERIES, "client": None}, "simulation": {"partition": {"clients": 3}}},
            "give data.client or data.files",
        ),
        ({"data": {"path": None, "client": None, "bundled": "banks"}}, "needs a [simulation.partition]"),
        ({"task": {"heads": 2}}, 'heads is for model = "ft-transformer"'),
        ({"task": {"huber_delta": 2.0}}, 'huber_delta is for loss = "huber"'),
        ({"task": {"loss": "discrete-time"}}, "go together"),
        ({"task": {"intervals": [1.0]}}, "go together"),
        ({"task": {"loss": "discrete-time", "intervals": [2.0, 1.0]}}, "intervals must rise"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:70],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as caught:
        make_job(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "data": {**SERIES},
            "privacy": {"client": {"epsilon": 1.0, "delta": 1e-5}},
            "strategy": {"weighting": "equal"},
        },
        {"data": {"columns": {"y": LETTERS}, "target_type": "next"}, "privacy": RECORD},
        {"data": {"path": None, "bundled": "banks", "client": "branch"}},
        {"data": {"target_type": "time", "event": "died"}, "privacy": RECORD},
        {"data": {"columns": {"a": {"type": "image", "shape": [4, 4, 3]}}}},
    ],
    ids=str,
)
def test_what_can_work_is_taken(changes: dict[str, Any]) -> None:
    job = make_job(**changes)
    assert make_job(**changes).hash == job.hash != make_job().hash


def test_a_job_that_uses_none_of_it_says_nothing_of_it() -> None:
    # What is not set is no part of the resolved job, whose hash stands in ledgers.
    text = make_job().toml.decode()
    for key in (*TaskChoice.model_fields, "target_type", "target_log", "held_out", "forecast", "separator", "buckets"):
        assert f"\n{key} =" not in text or key in ("name", "model", "hidden")
