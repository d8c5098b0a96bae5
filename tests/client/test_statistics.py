"""A site's rows become phi, of norm at most 1; one step of the task averages them; a private one adds known noise."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data import SiteData
from client.reading import feature_count, records_of, site_data
from client.statistics import class_places, phi, value_places
from client.tables import read_frame
from client.tasks import initial_model, task_for
from client.training import Trainer
from privacy.dpsgd import RecordLevelSgd
from privacy.errors import DataError
from privacy.mechanism import GaussianSum
from privacy.noise import SeededNoise
from strategies.job import Job
from strategies.parameters import Vector
from strategies.statistics import blocks_of, scale_of, summarise
from tests.strategies.jobs import make_job

COLUMNS = {"age": {"range": [0, 100]}, "dose": {"range": [-2, 3]}, "blood": {"type": "category", "values": ["A", "B"]}}
BLOCKS = ["moments", "histogram", "missing", "categories", "labels"]


def statistics_job(
    blocks: list[str] | None = None, bins: int = 4, privacy: dict[str, Any] | None = None, **data: Any
) -> Job:
    task = {"name": "statistics", "statistics": blocks or BLOCKS, "bins": bins}
    return make_job(task=task, training={"rounds": 1, "learning_rate": 1.0, "batch_size": None, "sampling_rate": 1.0},
                    privacy=privacy or {}, data={"path": None, "client": None, "columns": COLUMNS, **data})  # fmt: skip


def table(**columns: list[Any]) -> pd.DataFrame:
    rows = max((len(values) for values in columns.values()), default=1)
    filled = {name: [None] * rows for name in ("age", "dose", "blood", "y")} | columns
    return pd.DataFrame({name: [None if v is None else str(v) for v in values] for name, values in filled.items()},
                        dtype=object)  # fmt: skip


def mean_of_phi(frame: pd.DataFrame, job: Job) -> Vector:
    """What the task's one step makes of a site's rows."""
    task = task_for(job)
    records = records_of(frame, job, where="a test")
    trainer = Trainer(task, initial_model(task, features=feature_count(job), classes=2, seed=0), job.training)
    trainer.try_out(records)
    trainer.train(trainer.place(records), seed=0)
    return trainer.read().copy()


numbers = st.one_of(st.none(), st.floats(-1e6, 1e6), st.sampled_from([0, 100, -2, 3, 25, 50]))
rows = st.lists(
    st.tuples(numbers, numbers, st.sampled_from([None, "A", "B", "C"]), st.sampled_from([None, 0, 1, 2])), min_size=1
)


class TestPhi:
    @given(rows, st.lists(st.sampled_from(BLOCKS), min_size=1, unique=True), st.integers(2, 9))
    @settings(max_examples=60, deadline=None)
    def test_has_a_norm_of_at_most_one_whatever_the_record(self, cells: Any, blocks: list[str], bins: int) -> None:
        job = statistics_job(blocks, bins)
        frame = table(**dict(zip(("age", "dose", "blood", "y"), map(list, zip(*cells, strict=True)), strict=True)))
        features = phi(frame, job, where="a test").features
        assert np.linalg.norm(features.astype(np.float64), axis=1).max() <= 1 + 1e-6

    @pytest.mark.parametrize("low_high", [(1e16, 1e16 + 2), (1e9, 1e9 + 1e-7), (-1e300, 1e300), (-5e-324, 5e-324)])
    def test_has_such_a_norm_over_a_range_of_few_floats_or_all_of_them(self, low_high: tuple[float, float]) -> None:
        low, high = low_high
        job = statistics_job(columns={**COLUMNS, "age": {"range": [low, high]}})
        ages = [low, np.nextafter(low, np.inf), low / 2 + high / 2, np.nextafter(high, -np.inf), high]
        features = phi(table(age=ages, dose=[3] * 5, blood=["A"] * 5, y=[1] * 5), job, where="a test").features
        assert np.isfinite(features).all()
        assert np.linalg.norm(features.astype(np.float64), axis=1).max() <= 1 + 1e-6

    def test_reaches_that_norm_so_no_noise_is_spent_on_room_that_nothing_uses(self) -> None:
        features = phi(table(age=[100], dose=[-2], blood=["A"], y=[1]), statistics_job(), where="a test").features
        assert np.linalg.norm(features) == pytest.approx(1, abs=1e-6)

    def test_says_of_one_record_what_the_blocks_say(self) -> None:
        job = statistics_job()
        record = phi(table(age=[75], dose=[None], blood=["C"], y=[1]), job, where="a test").features[0]
        told = {(b.column, b.kind): (record[b.slice] / scale_of(blocks_of(job.data, job.task))).round(5).tolist()
                for b in blocks_of(job.data, job.task)}  # fmt: skip
        assert told == {
            ("age", "missing"): [0],
            ("age", "moments"): [0.5, 0.25],
            ("age", "histogram"): [0, 0, 0, 0, 1, 0],
            ("dose", "missing"): [1],
            ("dose", "moments"): [0, 0],
            ("dose", "histogram"): [0] * 6,
            ("blood", "categories"): [0, 0, 1, 0],
            ("y", "labels"): [0, 1, 0, 0],
        }

    @pytest.mark.parametrize(("age", "cell"), [(-1, 0), (0, 1), (24.9, 1), (25, 2), (99, 4), (100, 4), (100.5, 5)])
    def test_counts_a_number_in_its_cell_the_ends_of_the_range_within(self, age: float, cell: int) -> None:
        job = statistics_job(["histogram"])
        histogram = blocks_of(job.data, job.task)[0].slice
        assert np.flatnonzero(phi(table(age=[age]), job, where="a test").features[0, histogram]).tolist() == [cell]

    def test_numbers_its_targets_for_a_partition_which_knows_the_declared_classes_alone(self) -> None:
        assert phi(table(y=[1, 0, None, 2]), statistics_job(), where="a test").target.tolist() == [1, 0, 0, 0]

    def test_gives_a_number_as_target_the_blocks_of_a_number(self) -> None:
        job = statistics_job(["moments", "labels"], target_type="number", target_range=[0, 10])
        last = blocks_of(job.data, job.task)[-1]
        assert (last.column, last.kind) == ("y", "moments")
        record = phi(table(y=[10]), job, where="a test").features[0]
        assert record[last.slice] / scale_of(blocks_of(job.data, job.task)) == pytest.approx([1, 1])

    @pytest.mark.parametrize("cell", ["abc", "inf"])
    def test_refuses_what_is_no_finite_number_without_repeating_it(self, cell: str) -> None:
        with pytest.raises(DataError, match=r"column 'age': 1 rows are not a finite number") as refusal:
            phi(table(age=[1, cell]), statistics_job(), where="north.csv")
        assert cell not in str(refusal.value).replace("a finite", "")


@pytest.mark.parametrize(
    ("declared", "value", "place"),
    [
        ([1, 2], "1.0", 0),
        ([1, 2], "3", 2),
        ([1, 2], "x", 2),
        (["a", 2], "2", 1),
        (["a", 2], "2.0", 2),
        ([1, 2], None, 3),
    ],
)
def test_a_value_is_found_by_number_where_all_are_numbers_else_by_text(
    declared: list[str | int | float], value: str | None, place: int
) -> None:
    assert value_places(pd.Series([value], dtype=object), declared).tolist() == [place]


def test_what_is_not_positive_is_the_other_class_and_missing_is_neither() -> None:
    data = statistics_job(positive=[3, 4]).data
    assert class_places(pd.Series(["3", "0", None, "4"], dtype=object), data).tolist() == [1, 0, 3, 1]


class TestSites:
    """Each is averaged with a big one, weighted by rows as federated averaging does."""

    big = table(
        age=[10, 20, None, 150] * 5, dose=[0.5, -3, 1, None] * 5, blood=["A", "B", "C", None] * 5, y=[0, 1, 1, None] * 5
    )

    @pytest.mark.parametrize(
        "small",
        [
            table(age=[40], dose=[1], blood=["B"], y=[1]),
            table(age=[None, None], dose=[None, None], blood=[None, None], y=[None, None]),
            table(age=[1, 2, 3], dose=[1, 2, 3], blood=["A", "A", "A"], y=[1, 1, 1]),
        ],
        ids=["one row", "all missing", "one class"],
    )
    def test_take_part_whatever_they_hold(self, small: pd.DataFrame) -> None:
        job = statistics_job()
        both = pd.concat([self.big, small], ignore_index=True)
        parts = [mean_of_phi(self.big, job) * len(self.big), mean_of_phi(small, job) * len(small)]
        pooled = phi(both, job, where="a test").features.astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(sum(parts) / len(both), pooled, atol=2e-7)

    def test_without_rows_change_no_mean_and_no_share_of_what_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "empty.csv").write_text("age,dose,blood,y\n")
        job = statistics_job()
        empty = read_frame(tmp_path / "empty.csv", job.data)
        weighted = mean_of_phi(self.big, job) * len(self.big) + mean_of_phi(empty, job)
        told = summarise(job, (weighted / (len(self.big) + 1)).astype(np.float32), noise=0.0)
        alone = summarise(job, mean_of_phi(self.big, job), noise=0.0)
        for key in ("mean", "sd", "quartiles", "histogram"):
            assert told["columns"]["age"][key] == pytest.approx(alone["columns"]["age"][key], abs=1e-3)
        assert told["target"]["shares"] == pytest.approx(alone["target"]["shares"], abs=1e-6)
        assert told["columns"]["age"]["missing"] == pytest.approx(6 / 21, abs=1e-6)

    @pytest.mark.parametrize("privacy", [{}, {"record": {"epsilon": 1.0, "delta": 1e-3}}], ids=["open", "private"])
    def test_are_measured_where_a_training_job_trains(self, privacy: dict[str, Any]) -> None:
        rows = pd.DataFrame({"age": np.arange(40.0), "dose": 0.5, "blood": "A", "y": np.arange(40) % 3 == 0})
        rows["y"] = rows["y"].astype(int)
        ours, theirs = statistics_job(privacy=privacy), make_job(
            data={"path": None, "client": None, "columns": COLUMNS}, privacy=privacy
        )  # fmt: skip
        ages = [
            site_data(records_of(rows, job, where="a test"), job, site="a").train.features for job in (ours, theirs)
        ]
        block = next(b for b in blocks_of(ours.data, ours.task) if b.kind == "moments")
        scale = scale_of(blocks_of(ours.data, ours.task))
        np.testing.assert_allclose(ages[0][:, block.start] / scale, ages[1][:, 0], atol=1e-6)

    @pytest.mark.parametrize("rows", [0, 1, 2, 3])
    def test_with_few_rows_or_one_class_are_measured_all_the_same(self, rows: int) -> None:
        frame = table(age=[40] * rows, dose=[1] * rows, blood=["A"] * rows, y=[1] * rows).iloc[:rows]
        parts: SiteData = site_data(records_of(frame, statistics_job(), where="a test"), statistics_job(), site="a")
        assert len(parts.train) == max(1, rows - 1)
        assert len(parts.test) == 1

    def test_with_all_rows_laid_down_for_testing_take_part_like_one_without_rows(self) -> None:
        job = statistics_job(held_out={"column": "dose", "values": [1]})
        frame = table(age=[1, 2], dose=[1, 1], blood=["A"] * 2, y=[1, 0])
        parts = site_data(records_of(frame, job, where="a test"), job, site="a")
        empty = phi(frame.iloc[:0], job, where="a test")
        np.testing.assert_array_equal(parts.train.features, empty.features)
        assert (len(parts.train), len(parts.test)) == (1, 2)

    @pytest.mark.parametrize("testing", ["", "5,1,A,1\n6,1,B,0\n"])
    def test_without_rows_beside_a_second_file_of_test_rows_train_on_the_one_in_which_all_is_missing(
        self, tmp_path: Path, testing: str
    ) -> None:
        (tmp_path / "train.csv").write_text("age,dose,blood,y\n")
        (tmp_path / "test.csv").write_text("age,dose,blood,y\n" + testing)
        job = statistics_job(held_out={"path": "test.csv"})
        records = records_of(read_frame(tmp_path / "train.csv", job.data), job, where="a test")
        parts = site_data(records, job, site="a")
        assert (len(parts.train), len(parts.test)) == (1, testing.count("\n"))
        told = summarise(job, parts.train.features[0], noise=0.0)
        assert told["columns"]["age"]["missing"] == pytest.approx(1)
        assert told["target"]["missing"] == pytest.approx(1)

    def test_with_rows_laid_down_for_testing_are_measured_without_them(self) -> None:
        job = statistics_job(["labels"], held_out={"column": "dose", "values": [1]})
        frame = table(age=[1, 2, 3], dose=[1, 0, 0], blood=["A"] * 3, y=[1, 0, 0])
        parts = site_data(records_of(frame, job, where="a test"), job, site="a")
        assert parts.train.features.tolist() == [[1, 0, 0, 0]] * 2


def test_a_private_step_adds_the_noise_of_its_mechanism_to_the_mean_and_clips_nothing() -> None:
    job, frame = statistics_job(), TestSites.big
    sgd = RecordLevelSgd(mechanism=GaussianSum(clip_norm=1.0, noise_multiplier=4.0), sampling_rate=1.0, steps=1)
    exact, task = mean_of_phi(frame, job), task_for(job)
    trainer = Trainer(task, initial_model(task, features=feature_count(job), classes=2, seed=0), job.training)
    placed = trainer.place(records_of(frame, job, where="a test"))
    errors = []
    for seed in range(60):
        trainer.load(np.zeros_like(exact))
        trainer.train_privately(placed, sgd, SeededNoise(seed, "north"))
        errors.append((trainer.read() - exact) * len(frame) / 4.0)
    scores = np.concatenate(errors)  # Standard normal if the noise is the stated one and nothing is clipped.
    assert abs(scores.mean()) < 5 / np.sqrt(scores.size)
    assert scores.std() == pytest.approx(1, abs=5 / np.sqrt(2 * scores.size))
