"""Figures that are read from sums of cells: against scikit-learn and all pairs, within the bounds that they state."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from client.scores import c_index
from privacy.errors import JobError, RunError
from strategies.evaluation import blocks_of, scale_of, size_of
from strategies.figures import confusion_figures, pair_figures, read_evaluation, summarise
from strategies.job import Job, check_job, evaluation_job, load_job
from strategies.parameters import Parameters, vector_hash
from tests.strategies.jobs import make_job, raw_job

ONE = {"rounds": 1, "learning_rate": 1.0, "local_steps": 1, "batch_size": None, "sampling_rate": 1.0}
OF = "a" * 64
NUMBER = {"target_type": "number", "target_range": [-10.0, 30.0]}
TIME = {"target_type": "time", "event": "died"}
TEXT: dict[str, Any] = {
    "data": {
        "target_type": "text",
        "target_length": 4,
        "columns": {"said": {"type": "tokens", "length": 8, "tokenizer": "models:tiny"}},
    },
    "task": {"name": "seq2seq", "model": "pretrained", "checkpoint": "models:tiny"},
}
RECORD = {"epsilon": 1.0, "delta": 1e-3}


def evaluation(data: dict[str, Any] | None = None, **changes: Any) -> Job:
    raw = {"training": ONE, "evaluation": {}, **changes, "data": {"stratify": False, **(data or {})}}
    return make_job(**{**raw, "evaluation": {"of": OF, "model_hash": OF, **raw["evaluation"]}})


def weights(job: Job, **told: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean of phi in which the whole's blocks of these kinds hold these means, and all else is zero."""
    mean = np.zeros(size_of(job))
    for block in blocks_of(job):
        if block.kind in told and not block.group:
            mean[block.slice] = told[block.kind].reshape(-1)
    return mean * scale_of(job)


def cells_of(probability: np.ndarray[Any, Any], positive: np.ndarray[Any, Any], bins: int) -> np.ndarray[Any, Any]:
    table = np.zeros((2, bins))
    place = np.clip(np.ceil(probability * bins) - 1, 0, bins - 1).astype(int)
    np.add.at(table, (positive.astype(int), place), 1 / len(positive))
    return table


rows = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


class TestFigures:
    @settings(max_examples=200, deadline=None)
    @given(rows=rows, bins=st.sampled_from([10, 20, 100]))
    def test_of_two_classes_are_scikit_learn_s_within_their_bounds(
        self, rows: list[tuple[float, bool]], bins: int
    ) -> None:
        p, y = np.array([a for a, _ in rows]), np.array([b for _, b in rows])
        job = evaluation(evaluation={"bins": bins})
        said = summarise(job, weights(job, scores=cells_of(p, y, bins)), noise=0.0)["figures"]
        predicted = p > 0.5
        exact = {
            "accuracy": metrics.accuracy_score(y, predicted),
            "positive": y.mean(),
            "f1": metrics.f1_score(y, predicted, zero_division=np.nan),
            "precision": metrics.precision_score(y, predicted, zero_division=np.nan),
            "recall": metrics.recall_score(y, predicted, zero_division=np.nan) if y.any() else None,
        }
        for name, value in exact.items():
            if value is None or np.isnan(value):
                assert said[name] is None
            else:
                assert said[name]["value"] == pytest.approx(value, abs=1e-9)
                assert said[name]["low"] == said[name]["high"] == said[name]["value"]
        within = {"brier": np.mean((p - y) ** 2), "predicted": p.mean()}
        if y.any() and not y.all():
            within["auc"] = metrics.roc_auc_score(y, p)
        else:
            assert said["auc"] is None
        for name, value in within.items():
            assert said[name]["low"] - 1e-9 <= value <= said[name]["high"] + 1e-9

    def test_the_area_comes_as_close_as_its_cells_are_fine(self) -> None:
        rng = np.random.default_rng(0)
        y = rng.random(4000) < 0.3
        p = 1 / (1 + np.exp(-(rng.normal(size=4000) + 1.5 * y - 1)))
        exact, off, wide = metrics.roc_auc_score(y, p), [], []
        for bins in (10, 100, 1000):
            job = evaluation(evaluation={"bins": bins})
            said = summarise(job, weights(job, scores=cells_of(p, y, bins)), noise=0.0)["figures"]["auc"]
            off.append(abs(said["value"] - exact))
            wide.append(said["high"] - said["low"])
        assert wide[0] > 5 * wide[1] > 25 * wide[2]
        assert off[1] < 1e-3

    @settings(max_examples=100, deadline=None)
    @given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
    def test_of_many_classes_are_scikit_learn_s(self, pairs: list[tuple[int, int]]) -> None:
        true, said = [a for a, _ in pairs], [b for _, b in pairs]
        table = metrics.confusion_matrix(true, said, labels=range(4)).astype(float)
        value, low, high = confusion_figures(table.reshape(-1))
        present = sorted(set(true) | set(said))
        assert value["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))
        assert value["f1"] == pytest.approx(metrics.f1_score(true, said, labels=present, average="macro"))
        assert value["recall"] == pytest.approx(
            metrics.recall_score(true, said, labels=sorted(set(true)), average="macro")
        )
        assert value == low == high

    @given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=40))
    def test_of_texts_are_those_of_their_tokens(self, shares: list[float]) -> None:
        own, job = np.array(shares), evaluation(**TEXT)
        cells = np.bincount(np.clip(np.ceil(own * 100) - 1, 0, 99).astype(int), minlength=100) / len(own)
        counted = np.append(cells, own.mean())
        said = summarise(job, weights(job, tokens=counted, loss=np.array([0.3])), noise=0.0)["figures"]
        assert said["accuracy"]["value"] == pytest.approx(own.mean())
        assert said["mostly"]["value"] == pytest.approx(np.mean(own > 0.5))
        assert said["loss"]["value"] == pytest.approx(3.0), "of a largest loss of 10"
        assert said["perplexity"]["value"] == pytest.approx(np.exp(3.0))

    def test_of_a_number_are_those_of_its_rows(self) -> None:
        rng = np.random.default_rng(1)
        y = rng.uniform(-10, 30, 500)
        predicted = np.clip(y + rng.normal(size=500) * 4, -10, 30)
        e, u = np.abs(predicted - y), (y - 10) / 20
        cells = np.bincount(np.clip(np.ceil(e / 40 * 100) - 1, 0, 99).astype(int), minlength=100) / 500
        moments = [np.mean(x) for x in (e / 40, (e / 40) ** 2, u, u * u, np.abs(y) / 30, 0 * y)]
        job = evaluation(NUMBER)
        said = summarise(job, weights(job, errors=np.concatenate([cells, moments])), noise=0.0)["figures"]
        assert said["rmse"]["value"] == pytest.approx(metrics.root_mean_squared_error(y, predicted))
        assert said["mae"]["value"] == pytest.approx(metrics.mean_absolute_error(y, predicted))
        assert said["r2"]["value"] == pytest.approx(metrics.r2_score(y, predicted))
        assert said["wape"]["value"] == pytest.approx(e.sum() / np.abs(y).sum())
        for name, share in (("median_error", 0.5), ("error_90", 0.9)):
            exact = np.quantile(e, share, method="inverted_cdf")
            assert said[name]["low"] <= exact <= said[name]["high"] + 1e-9

    @settings(max_examples=200, deadline=None)
    @given(
        rows=st.lists(st.tuples(st.floats(0, 10), st.booleans(), st.floats(0, 1)), min_size=2, max_size=30),
        times=st.sampled_from([[5.0], [2.0, 4.0, 6.0, 8.0]]),
    )
    def test_a_concordance_lies_within_its_bounds_whatever_the_rows(
        self, rows: list[tuple[float, bool, float]], times: list[float]
    ) -> None:
        time, event, risk = (np.array(column) for column in zip(*rows, strict=True))
        table = np.zeros((len(times) + 1, 2, 10))
        place = np.clip(np.ceil(risk * 10) - 1, 0, 9).astype(int)
        np.add.at(table, (np.searchsorted(times, time, side="left"), event.astype(int), place), 1 / len(rows))
        _, low, high = pair_figures(table)
        exact = c_index(risk, time, event)
        if not np.isnan(exact) and not np.isnan(low["c_index"]):
            assert low["c_index"] - 1e-9 <= exact <= high["c_index"] + 1e-9

    def test_standard_errors_are_those_of_the_noise(self) -> None:
        rng = np.random.default_rng(2)
        y = rng.random(3000) < 0.4
        p = 1 / (1 + np.exp(-(rng.normal(size=3000) + 1.2 * y)))
        job = evaluation(evaluation={"bins": 20}, privacy={"record": RECORD})
        mean, noise = weights(job, scores=cells_of(p, y, 20)), 2e-4
        told = summarise(job, mean, noise=noise)["figures"]
        drawn: dict[str, list[float]] = {"auc": [], "f1": [], "accuracy": [], "brier": []}
        for _ in range(400):
            said = summarise(job, mean + rng.normal(0, noise, mean.shape), noise=0.0)["figures"]
            for name, values in drawn.items():
                values.append(said[name]["value"])
        for name, values in drawn.items():
            assert told[name]["se"] == pytest.approx(np.std(values), rel=0.15)
            assert told[name]["value"] == pytest.approx(np.mean(values), abs=3 * told[name]["se"])

    @pytest.mark.parametrize("largest", [1.0, 10.0])
    def test_the_noise_of_a_mean_loss_is_that_of_its_rows_too(self, largest: float) -> None:
        rng = np.random.default_rng(4)
        job = evaluation(evaluation={"largest_loss": largest}, privacy={"record": RECORD})
        p, y = rng.random(2000), rng.random(2000) < 0.5
        mean, noise = weights(job, scores=cells_of(p, y, 100), loss=np.array([0.7 / largest])), 2e-4
        told = summarise(job, mean, noise=noise)["figures"]["loss"]
        drawn = [
            summarise(job, mean + rng.normal(0, noise, mean.shape), noise=noise)["figures"]["loss"]["value"]
            for _ in range(300)
        ]
        assert told["value"] == pytest.approx(0.7)
        assert told["se"] == pytest.approx(np.std(drawn), rel=0.15)

    def test_quantiles_of_an_error_have_the_noise_of_their_cells(self) -> None:
        rng = np.random.default_rng(5)
        job = evaluation(NUMBER, evaluation={"bins": 50}, privacy={"record": RECORD})
        cells = np.exp(-np.arange(50) / 10)
        mean, noise = weights(job, errors=np.concatenate([cells / cells.sum(), np.zeros(6)])), 4e-4
        told = summarise(job, mean, noise=noise)["figures"]
        drawn = [summarise(job, mean + rng.normal(0, noise, mean.shape), noise=noise)["figures"] for _ in range(200)]
        for name in ("median_error", "error_90"):
            assert told[name]["se"] == pytest.approx(np.std([said[name]["value"] for said in drawn]), rel=0.4)

    def test_a_calibration_error_is_none_under_noise_which_only_adds_to_it(self) -> None:
        job = evaluation(privacy={"record": RECORD})
        p = np.linspace(0.01, 0.99, 500)
        mean = weights(job, scores=cells_of(p, p > 0.5, 100))
        assert summarise(job, mean, noise=1e-6)["figures"]["calibration_error"] is None
        assert summarise(job, mean, noise=0.0)["figures"]["calibration_error"]["value"] > 0.1

    @settings(max_examples=300, deadline=None)
    @given(errors=st.lists(st.floats(0, 40), min_size=1, max_size=30))
    def test_a_quantile_of_errors_lies_between_its_bounds_also_in_float32(self, errors: list[float]) -> None:
        e = np.array(errors)
        cells = np.bincount(np.clip(np.ceil(e / 40 * 10) - 1, 0, 9).astype(int), minlength=10) / len(e)
        job = evaluation(NUMBER, evaluation={"bins": 10})
        mean = weights(job, errors=np.concatenate([cells, np.zeros(6)])).astype(np.float32).astype(float)
        said = summarise(job, mean, noise=0.0)["figures"]
        for name, share in (("median_error", 0.5), ("error_90", 0.9)):
            exact = np.quantile(e, share, method="inverted_cdf")
            assert said[name]["low"] - 1e-6 <= exact <= said[name]["high"] + 1e-6

    def test_a_fit_of_targets_that_float32_cannot_tell_apart_is_none_or_within_its_bounds(self) -> None:
        rng = np.random.default_rng(6)
        for middle, wide in ((37.0, 1.0), (5e4, 300.0), (5e5, 1e5)):
            low, high = 0.0, 1e6 if middle > 1000 else 1000.0
            y = middle + rng.uniform(-wide, wide, 500)
            predicted = y + rng.normal(0, wide / 4, 500)
            u, e = (y - (low + high) / 2) / ((high - low) / 2), np.abs(predicted - y) / (high - low)
            moments = np.array([e.mean(), (e**2).mean(), u.mean(), (u * u).mean(), np.abs(y).mean() / high, 0])
            job = evaluation({"target_type": "number", "target_range": [low, high]}, evaluation={"bins": 10})
            errors = np.concatenate([np.eye(10)[0], moments])
            told = summarise(job, weights(job, errors=errors).astype(np.float32).astype(float), noise=0.0)["figures"]
            if told["r2"] is not None:
                assert told["r2"]["low"] <= metrics.r2_score(y, predicted) <= told["r2"]["high"]

    @settings(max_examples=200, deadline=None)
    @given(own=st.lists(st.floats(0, 1), min_size=1, max_size=25))
    def test_sites_are_spread_as_their_cells_say(self, own: list[float]) -> None:
        job, figures = evaluation(evaluation={"sites": 10}), np.array(own)
        cells = np.append(np.bincount(np.clip(np.ceil(figures * 10) - 1, 0, 9).astype(int), minlength=10), 0)
        mean = np.zeros(size_of(job))
        for block in blocks_of(job):
            if block.kind == "sites accuracy":
                mean[block.slice] = cells / 1000
        said = summarise(job, (mean * scale_of(job)).astype(np.float32).astype(float), noise=0.0)["by_site"]["accuracy"]
        for key, share in (("lowest_tenth", 0.1), ("median", 0.5), ("highest_tenth", 0.9)):
            exact = np.quantile(figures, share, method="inverted_cdf")
            assert said[key]["low"] - 1e-6 <= exact <= said[key]["high"] + 1e-6
        assert said["worst"]["low"] - 1e-6 <= figures.min() <= said["worst"]["high"] + 1e-6
        assert said["undefined"] == 0

    def test_that_noise_drowns_are_none(self) -> None:
        job = evaluation(privacy={"record": RECORD})
        said = summarise(job, np.zeros(size_of(job)), noise=1.0)
        assert set(said["figures"].values()) == {None}
        assert "calibration" not in said

    def test_of_another_model_are_refused(self) -> None:
        with pytest.raises(RunError, match="the model has 3 weights"):
            summarise(evaluation(), np.zeros(3), noise=0.0)


class TestJob:
    @pytest.mark.parametrize(
        ("job", "kinds"),
        [
            ({}, ["scores", "loss"]),
            ({"data": {"classes": [1, 2, 3]}}, ["confusion", "confidence", "loss"]),
            ({"data": {"classes": list(range(40))}}, ["confidence", "loss"]),
            ({"data": NUMBER}, ["errors", "loss"]),
            ({"data": TIME, "evaluation": {"times": [1.0, 2.0]}}, ["pairs"]),
            (TEXT, ["tokens", "loss"]),
            ({"evaluation": {"sites": 9}}, ["scores", "loss", "sites accuracy", "sites auc"]),
            ({"evaluation": {"groups": {"sex": {"values": ["F", "M"]}}}}, ["scores", "loss", "scores", "scores"]),
        ],
    )
    def test_counts_what_its_target_has_figures_for(self, job: dict[str, Any], kinds: list[str]) -> None:
        assert [block.kind for block in blocks_of(evaluation(**job))] == kinds

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"training": {**ONE, "rounds": 2}}, "training.rounds: evaluations are one exact step"),
            ({"task": {"name": "statistics"}}, 'a job of task "statistics" has no model'),
            ({"data": {"target_type": "number"}}, "give evaluation.target_range"),
            ({"evaluation": {"target_range": [0, 1]}}, 'target_range is for target_type = "number"'),
            ({"data": TIME}, "give evaluation.times"),
            ({"evaluation": {"times": [1.0]}}, 'times is for target_type = "time"'),
            ({"data": TIME, "evaluation": {"times": [2.0, 1.0]}}, "times must rise"),
            ({"evaluation": {"bins": 12}}, "evaluation.bins"),
            ({"evaluation": {"of": "mine"}}, "evaluation.of"),
            ({"evaluation": {"groups": {"sex": {}}}}, "exactly one of values and edges"),
            ({"evaluation": {"groups": {"sex": {"edges": [3, 1]}}}}, "edges must rise"),
            ({"evaluation": {"groups": {"sex": {"values": [1, 1.0]}}}}, "listed twice"),
            (
                {"evaluation": {"sites": 9}, "privacy": {"record": RECORD}},
                "evaluation.sites with privacy.record.*take privacy.client",
            ),
            (
                {"evaluation": {"model": "own"}, "privacy": {"record": RECORD}},
                'model = "own" with privacy.record.*model = "shared"',
            ),
            (
                {
                    "data": {**NUMBER, "target_log": None, "forecast": {"time": "week", "horizon": 2}},
                    "evaluation": {"groups": {"sex": {"values": ["F"]}}},
                },
                "evaluation.groups with data.forecast",
            ),
        ],
    )
    def test_that_cannot_work_is_refused_with_both_settings(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(JobError, match=said) as refusal:
            evaluation(**changes)
        assert "\n" not in str(refusal.value)


class TestRun:
    """A job file names a run, and is told what that run's job says."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        return finished(tmp_path / "run", make_job(seed=7, data={"folder": "/records"}))

    def test_gives_the_job_its_data_its_task_and_its_hash(self, run: Path) -> None:
        trained, job = make_job(seed=7, data={"folder": "/records"}), evaluation_job(run)
        assert job.evaluation is not None
        assert (job.evaluation.of, job.evaluation.run) == (trained.hash, str(run.resolve()))
        assert job.evaluation.model_hash == vector_hash(MODEL)
        assert (job.task, job.seed, job.name) == (trained.task, 7, "smallest-evaluation")
        assert job.data == trained.data.model_copy(update={"stratify": True})
        assert job.evaluated.data == job.data
        assert check_job(job.model_dump(mode="json", exclude_none=True), where="a test").hash == job.hash

    def test_with_privacy_splits_as_the_model_s_job_did(self, tmp_path: Path) -> None:
        private = finished(tmp_path / "private", make_job(privacy={"record": RECORD}))
        assert evaluation_job(private).data.stratify is False
        plain, settings = finished(tmp_path / "plain", make_job()), ["privacy.record={epsilon=1.0, delta=1e-5}"]
        assert evaluation_job(plain).data.stratify is True
        # There the label of a row decides which others are tested: noise for one row would not cover it.
        with pytest.raises(JobError, match=r"privacy.record with data.stratify: .*train the model"):
            evaluation_job(plain, settings)
        # Nor may whether one row is complete; of numbers the others' places are the same whatever it is.
        number = {"target_type": "number", "target_range": [0, 1]}
        with pytest.raises(JobError, match=r"or that it is complete, would decide which others"):
            evaluation({**number, "stratify": True, "on_missing": "drop"}, privacy={"record": RECORD})
        assert evaluation({**number, "stratify": True}, privacy={"record": RECORD}).stratified
        apart = finished(tmp_path / "apart", make_job(data={"stratify": False}))
        assert evaluation_job(apart, settings).privacy.record is not None

    def test_is_found_beside_the_file_that_names_it(self, run: Path) -> None:
        (run.parent / "job.toml").write_text('name = "mine"\n[evaluation]\nrun = "run"\n[data]\npath = "other.csv"\n')
        job = load_job(run.parent / "job.toml")
        assert (job.name, job.data.path, job.data.client) == ("mine", "other.csv", "hospital")
        files = ['data.files={a="a.csv"}', "data.path=none"]
        assert load_job(run.parent / "job.toml", files).data.client is None

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            (["data.target=z"], r"data\.target: an evaluation reads rows as the model's job did"),
            (["simulation=3"], "simulation: should be a table, got 3"),
            (["data=3"], "data: should be a table, got 3"),
            (["data.folder=3"], "data.folder: should be text, got 3"),
            (["task.model=mlp"], "task: an evaluation has the task of the job"),
            (["evaluation.model=own"], 'strategy.name = "fedavg" leaves no site a model of its own'),
        ],
    )
    def test_is_not_told_otherwise(self, run: Path, settings: list[str], said: str) -> None:
        with pytest.raises(JobError, match=said):
            evaluation_job(run, settings)

    def test_that_is_unfinished_or_none_is_refused(self, tmp_path: Path, run: Path) -> None:
        with pytest.raises(JobError, match="is no run folder"):
            evaluation_job(tmp_path / "nowhere")
        (run / "model.safetensors").unlink()
        with pytest.raises(JobError, match="is not finished"):
            evaluation_job(run)

    def test_that_measured_trained_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(JobError, match="is itself a measurement"):
            evaluation_job(finished(tmp_path / "measured", evaluation()))

    def test_that_trained_is_no_evaluation_to_read(self, run: Path) -> None:
        with pytest.raises(RunError, match="is not one of an evaluation"):
            read_evaluation(run)

    def test_file_of_figures_is_read_again_and_no_other(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"v": 1, "model": "own", "of": "a", "figures": {"auc": null}, "groups": {}}')
        assert read_evaluation(tmp_path / "a.json")["figures"] == {"auc": None}
        (tmp_path / "b.json").write_text('{"v": 1, "columns": {}}')
        with pytest.raises(RunError, match="not what `fedchorus evaluate --json` writes"):
            read_evaluation(tmp_path / "b.json")


MODEL = np.array([1.0, 2.0], np.float32)


def finished(folder: Path, job: Job) -> Path:
    folder.mkdir()
    (folder / "job.toml").write_bytes(job.toml)
    Parameters({"x": (2,)}).save(MODEL, folder / "model.safetensors", {"job": job.hash, "round": "2"})
    return folder


def test_the_smallest_job_measures_nothing() -> None:
    assert "evaluation" not in raw_job()
    assert make_job().evaluation is None
