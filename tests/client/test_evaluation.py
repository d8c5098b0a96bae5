"""A site's test rows become phi of what a model makes of them, of norm at most 1; small groups stay at the site."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data import Records
from client.evaluation import Judge, cells, group_places, left_out, rows_of
from client.scores import roc_auc
from privacy.errors import DataError, JobError
from strategies.evaluation import blocks_of, scale_of
from strategies.job import Job
from strategies.job_task import Group
from strategies.parameters import Vector
from tests.strategies.jobs import make_job

ONE = {"rounds": 1, "learning_rate": 1.0, "local_steps": 1, "batch_size": None, "sampling_rate": 1.0}
SEX = {"sex": {"values": ["F", "M"]}}
MODEL: Vector = np.array([3.0, -0.6], np.float32)  # One weight and a bias.


def evaluation(data: dict[str, Any] | None = None, **changes: Any) -> Job:
    raw = {"data": {"stratify": False, **(data or {})}, "training": ONE, "evaluation": {}, **changes}
    return make_job(**{**raw, "evaluation": {"of": "a" * 64, "model_hash": "a" * 64, **raw["evaluation"]}})


def table(rows: int, **columns: Any) -> pd.DataFrame:
    x = np.linspace(0.05, 0.95, rows)
    made = {"x": x, "y": (np.arange(rows) % 3 > 0).astype(int), "sex": ["F" if n % 4 else "M" for n in range(rows)]}
    return pd.DataFrame({name: [str(v) for v in values] for name, values in {**made, **columns}.items()}, dtype=object)


def phi(frame: pd.DataFrame, job: Job, model: Vector = MODEL) -> dict[tuple[str, str, int], Vector]:
    """Each block's columns of the site's rows, unscaled."""
    made = Judge(job).site_data(rows_of(frame, job, where="a test"), model, site="a").train.features / scale_of(job)
    return {(block.kind, block.group, block.place): made[:, block.slice] for block in blocks_of(job)}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 1e6, np.inf]),
    kind=st.sampled_from(["binary", "classes", "number", "time"]),
    more=st.sampled_from([{}, {"groups": SEX}, {"sites": 5}, {"groups": SEX, "sites": 5, "smallest": 3}]),
)
def test_no_row_has_a_norm_above_one_whatever_the_model(
    rows: int, seed: int, scale: float, kind: str, more: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    kinds: dict[str, dict[str, Any]] = {
        "binary": {},
        "classes": {"classes": [0, 1, 2]},
        "number": {"target_type": "number", "target_range": [-1.0, 2.0]},
        "time": {"target_type": "time", "event": "died"},
    }
    tasks: dict[str, dict[str, Any]] = {"number": LINEAR, "time": TIME}
    extra = {"times": [0.5, 1.0]} if kind == "time" else {}
    job = evaluation(kinds[kind], task=tasks.get(kind, {}), evaluation={**more, **extra})
    frame = table(rows, y=rng.integers(0, 2, rows), died=rng.integers(0, 2, rows))
    judge = Judge(job)
    size = judge._trainer.parameters.size
    with np.errstate(invalid="ignore"):
        model = (rng.normal(size=size) * scale).astype(np.float32)
    made = judge.site_data(rows_of(frame, job, where="a test"), model, site="a").train
    assert np.isfinite(made.features).all()
    assert np.linalg.norm(made.features.astype(np.float64), axis=1).max(initial=0.0) <= 1 + 1e-6


LINEAR: dict[str, Any] = {"name": "tabular-regression", "model": "linear"}
TIME: dict[str, Any] = {"name": "survival", "model": "linear", "loss": "cox"}


def test_a_row_is_counted_in_the_cell_of_its_probability_and_class() -> None:
    job = evaluation({"test_fraction": 0.5}, evaluation={"bins": 10})
    frame = table(40)
    judge = Judge(job)
    rows = judge.site_data(rows_of(frame, job, where="a test"), MODEL, site="a")
    counts = rows.train.features.sum(axis=0)[:20] / scale_of(job)
    assert counts.sum() == pytest.approx(20, rel=1e-5)
    # The job's own test rows, by the model itself.
    test = _test_rows(frame, job)
    probability = 1 / (1 + np.exp(-(MODEL[0] * test.features[:, 0] + MODEL[1])))
    want = np.zeros(20)
    np.add.at(want, test.target * 10 + np.ceil(probability * 10).astype(int) - 1, 1)
    assert counts == pytest.approx(want, abs=1e-4)


def _test_rows(frame: pd.DataFrame, job: Job) -> Records:
    from client.data import encode, split

    return split(encode(frame, job.data, where="a test"), job.data, site="a", stratify=False).test


def test_a_probability_of_a_half_predicts_the_negative_class() -> None:
    assert cells(np.array([0.0, 0.5, 0.5 + 1e-12, 1.0]), 10).tolist() == [0, 4, 5, 9]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_site_without_test_rows_takes_part_with_a_row_of_zeros(rows: int) -> None:
    found = phi(table(rows), evaluation(evaluation={"sites": 4}))
    assert [len(part) for part in found.values()] == [1] * len(found)
    assert not found["scores", "", 0].any()
    # It counts as a site all the same: as one that defines no figure.
    assert found["sites accuracy", "", 0][0] == pytest.approx([0, 0, 0, 0, 1])


def test_a_site_of_one_class_takes_part_and_defines_no_area() -> None:
    found = phi(table(40, y=[1] * 40), evaluation(evaluation={"sites": 4}))
    assert found["scores", "", 0].sum() == pytest.approx(10, rel=1e-5)
    assert found["sites auc", "", 0].sum(axis=0) == pytest.approx([0, 0, 0, 0, 1], abs=1e-5)


def test_a_site_counts_itself_once_in_the_cell_of_its_own_figure() -> None:
    job = evaluation({"test_fraction": 0.5}, evaluation={"sites": 10})
    frame = table(60)
    found, test = phi(frame, job), _test_rows(frame, job)
    logit = MODEL[0] * test.features[:, 0] + MODEL[1]
    auc = roc_auc(logit, test.target == 1)
    want = np.zeros(11)
    want[int(np.ceil(auc * 10)) - 1] = 1
    assert found["sites auc", "", 0].sum(axis=0) == pytest.approx(want, abs=1e-5)
    # Where every site weighs alike, the mean over its rows is that 1.
    alike = evaluation(
        {"test_fraction": 0.5}, evaluation={"sites": 10}, strategy={"weighting": "equal"},
        privacy={"client": {"epsilon": 1.0, "delta": 1e-3}},
    )  # fmt: skip
    assert phi(frame, alike)["sites auc", "", 0].mean(axis=0) == pytest.approx(want, abs=1e-5)


class TestGroups:
    def test_are_counted_each_by_itself(self) -> None:
        found = phi(table(400), evaluation(evaluation={"groups": SEX}))
        whole, parts = found["scores", "", 0], [found["scores", "sex", place] for place in (0, 1)]
        assert sum(part.sum(axis=0) for part in parts) == pytest.approx(whole.sum(axis=0), abs=1e-3)
        assert parts[0].sum() > 2 * parts[1].sum() > 0

    def test_of_too_few_rows_send_nothing_and_neither_does_who_would_tell_of_them(self) -> None:
        sex = ["M" if n % 20 == 0 else "F" for n in range(80)]
        found = phi(table(80, sex=sex), evaluation(evaluation={"groups": SEX, "smallest": 10}))
        assert not found["scores", "sex", 1].any()
        assert not found["scores", "sex", 0].any()
        assert found["scores", "", 0].sum() == pytest.approx(20, rel=1e-5)

    def test_are_all_sent_where_noise_protects_each_row(self) -> None:
        sex = ["M" if n % 20 == 0 else "F" for n in range(80)]
        private = {"record": {"epsilon": 1.0, "delta": 1e-3}}
        found = phi(table(80, sex=sex), evaluation(evaluation={"groups": SEX}, privacy=private))
        assert found["scores", "sex", 0].sum() + found["scores", "sex", 1].sum() == pytest.approx(20, rel=1e-5)

    @settings(max_examples=300, deadline=None)
    @given(
        counts=st.lists(st.integers(0, 30), min_size=1, max_size=6),
        smallest=st.integers(1, 20),
        nowhere=st.integers(0, 30),
    )
    def test_that_are_left_out_are_as_many_rows_as_the_smallest_or_none(
        self, counts: list[int], smallest: int, nowhere: int
    ) -> None:
        rows = np.array(counts)
        out = left_out(rows, smallest, nowhere=nowhere)
        assert (rows[~out & (rows > 0)] >= smallest).all()
        hidden = rows[out].sum() + nowhere
        assert hidden == 0 or hidden >= smallest or out[rows > 0].all()

    def test_of_a_row_in_no_group_are_left_out_too_where_they_would_tell_of_it(self) -> None:
        sex = ["X" if n == 3 else "M" if n % 2 else "F" for n in range(200)]
        assert "X" in table(200, sex=sex)["sex"].tolist()
        job = evaluation({"held_out": {"column": "sex", "values": ["F", "M", "X"]}}, evaluation={"groups": SEX})
        found = phi(table(200, sex=sex), job)
        whole = found["scores", "", 0].sum()
        shown = found["scores", "sex", 0].sum() + found["scores", "sex", 1].sum()
        assert whole - shown >= 10

    def test_of_numbers_are_the_cells_between_edges(self) -> None:
        values = pd.Series(["1", "2", "2.5", "9", None])
        places = group_places(values, Group(edges=[2.0, 5.0]), name="age", where="a test")
        assert places.tolist() == [0, 1, 1, 2, -1]
        assert Group(edges=[2.0, 5.0]).names == ["below 2", "2 to 5", "5 and above"]

    def test_of_values_leave_out_others_and_missing_ones(self) -> None:
        values = pd.Series(["F", "X", None, "M"])
        assert group_places(values, Group(values=["F", "M"]), name="sex", where="a test").tolist() == [0, -1, -1, 1]

    def test_stay_with_their_rows_when_others_are_dropped(self) -> None:
        job = evaluation({"on_missing": "drop"}, evaluation={"groups": SEX})
        frame = table(6, sex=["F", "M", "F", "M", "F", "M"])
        frame.loc[[0, 3], "x"] = None
        found = rows_of(frame, job, where="a test")
        assert found.groups is not None
        assert found.groups[:, 0].tolist() == [1, 0, 0, 1]

    def test_of_a_column_that_is_not_there_are_named(self) -> None:
        with pytest.raises(DataError, match=r"there is no column 'race', which evaluation\.groups names"):
            rows_of(table(9), evaluation(evaluation={"groups": {"race": {"values": [1]}}}), where="a test")


class OwnTask:
    """A user's regression, which says nothing of units."""

    def __init__(self, choice: object) -> None: ...

    def model(self, features: int, classes: int) -> torch.nn.Module:
        return torch.nn.Linear(features, 1)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.squeeze(-1) - targets) ** 2

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.loss(outputs, targets)}


def test_a_task_of_numbers_without_their_unit_is_refused_by_name() -> None:
    job = evaluation({"target_type": "number", "target_range": [0.0, 1.0]}, task={"name": f"{__name__}:OwnTask"})
    with pytest.raises(JobError, match="has no method natural"):
        Judge(job)


class Tattling(OwnTask):
    """Its loss says in an error what its targets are."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise JobError(f"the labels are {targets.tolist()}")


def test_an_error_of_the_task_s_own_code_says_its_kind_and_no_record() -> None:
    job = evaluation(task={"name": f"{__name__}:Tattling"})
    with pytest.raises(JobError) as caught:
        Judge(job).site_data(rows_of(table(9), job, where="a test"), MODEL, site="a")
    assert str(caught.value) == "task.name: a: evaluating the model failed (JobError)"


@pytest.mark.parametrize("complete", [0, 1])
def test_a_site_whose_rows_are_incomplete_takes_part(complete: int) -> None:
    frame = table(8)
    frame.loc[complete:, "x"] = None
    found = phi(frame, evaluation({"on_missing": "drop"}))
    assert len(found["scores", "", 0]) == 1


class Coupled(OwnTask):
    coupled = True


def test_a_loss_that_couples_records_is_refused_with_record_level_privacy() -> None:
    task, private = {"name": f"{__name__}:Coupled"}, {"record": {"epsilon": 1.0, "delta": 1e-3}}
    with pytest.raises(JobError, match=r"evaluation with privacy\.record: the task's loss couples"):
        Judge(evaluation(task=task, privacy=private))
    Judge(evaluation(task=task))


def test_a_model_of_another_job_is_refused() -> None:
    job = evaluation()
    with pytest.raises(JobError, match="the model has 3 parameters, the task 2"):
        Judge(job).site_data(rows_of(table(9), job, where="a test"), np.zeros(3, np.float32), site="a")
