"""A statistics job is one exact round or is refused; its model reads back as statistics, and they become constants."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import JobError, RunError
from strategies.job import Job, load_job
from strategies.statistics import Block, blocks_of, read_statistics, scale_of, size_of, summarise, with_statistics
from tests.strategies.jobs import make_job, raw_job

COLUMNS = {"age": {"range": [0, 100]}, "blood": {"type": "category", "values": ["A", "B", "O"]}}
RECORD = {"epsilon": 1.0, "delta": 1e-3}


def raw_statistics(**changes: Any) -> dict[str, Any]:
    return {**raw_job(**{"data": {"columns": COLUMNS}, "task": {"name": "statistics"}, **changes})}


def statistics_job(**changes: Any) -> Job:
    raw = {"data": {"columns": COLUMNS}, "task": {"name": "statistics"}, "training": None, **changes}
    job = raw_job(**{name: change for name, change in raw.items() if change is not None})
    return make_job(**{**job, "training": changes.get("training", ONE)})


ONE = {"rounds": 1, "learning_rate": 1.0, "local_steps": 1, "batch_size": None, "sampling_rate": 1.0}


def weights_of(job: Job, **told: list[float]) -> Any:
    """The model whose named blocks (column_kind) hold these means of phi, and all others zero."""
    blocks = blocks_of(job.data, job.task)
    weights = np.zeros(size_of(blocks), dtype=np.float32)
    for block in blocks:
        weights[block.slice] = told.get(f"{block.column}_{block.kind}", [0.0] * block.size)
    return weights * np.float32(scale_of(blocks))


class TestJob:
    def test_needs_nothing_but_its_name_and_says_in_full_what_it_does(self) -> None:
        raw = raw_statistics()
        del raw["training"]
        job = Job.model_validate(raw)
        assert job.training.model_dump(exclude_none=True) == {
            "rounds": 1, "local_steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0, "weight_decay": 0.0,
            "device": "auto",
        }  # fmt: skip
        assert (job.task.bins, len(job.task.statistics or [])) == (20, 5)
        assert not job.simulation.baselines
        assert raw["task"] == {"name": "statistics"}  # What was passed in is left alone.

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"training": {**ONE, "rounds": 2}}, r"training\.rounds: .*leave out \[training\], or give rounds = 1"),
            ({"training": {**ONE, "learning_rate": 0.5}}, r"training\.learning_rate: .*learning_rate = 1.0"),
            ({"training": {**ONE, "sampling_rate": 0.5}}, r"training\.sampling_rate: .*sampling_rate = 1.0"),
            ({"training": {**ONE, "local_steps": 2}}, r"training\.local_steps"),
            ({"training": {**ONE, "weight_decay": 0.1}}, r"training\.weight_decay"),
            ({"training": {**ONE, "sampling_rate": None, "batch_size": 10**6}}, r"training\.sampling_rate"),
            ({"training": {**ONE, "schedule": {"warmup": 1}}}, r"training\.schedule: .*leave out \[training\]"),
            ({"training": {**ONE, "weak": {"a": 0.5}}}, r"training\.weak: "),
            ({"training": {**ONE, "work": {"a": 1}}}, r"training\.work: "),
            ({"cohort": {"size": 2}}, r"cohort\.size: statistics are of all sites"),
            ({"robust": {"reduce": "median"}}, r"robust: statistics are a mean"),
            ({"robust": {"max_norm": 0.1}}, r"leave \[robust\] out"),
            ({"simulation": {"devices": {"a": {"share": 1.0, "trains": 0.5}}}}, r"leave out trains"),
            ({"strategy": {"weighting": "equal"}}, r'a mean over rows: .*weighting = "rows"'),
            ({"strategy": {"server_learning_rate": 0.5}}, r"no server_learning_rate"),
            ({"privacy": {"record": {**RECORD, "clip_norm": 0.5}}}, r"a smaller clip_norm would clip them"),
            ({"privacy": {"record": {**RECORD, "clip_norm": 2.0}}}, r"a larger one only adds noise"),
            ({"privacy": {"record": {**RECORD, "clipping": "per-layer"}}}, r"leave out clip_norm and clipping"),
            (
                {"privacy": {"record": RECORD, "client": RECORD}, "strategy": {"weighting": "equal"}},
                r"\[privacy\.record\] or \[privacy\.client\]",
            ),
            ({"privacy": {"client": RECORD}}, r'a mean over clients: .*weighting = "equal"'),
            (
                {"privacy": {"client": {**RECORD, "adaptive_clip": {}}}, "strategy": {"weighting": "equal"}},
                r"leave out adaptive_clip",
            ),
            ({"data": {"columns": {"age": {}}, "scaling": "site"}}, r"need a public `range`"),
            ({"task": {"name": "statistics", "statistics": []}}, r"name one or more blocks, each once"),
            ({"task": {"name": "statistics", "statistics": ["labels", "labels"]}}, r"each once"),
            ({"task": {"name": "statistics", "statistics": ["median"]}}, r"task\.statistics"),
            ({"task": {"name": "tabular-classification", "bins": 9}}, r'are for name = "statistics"'),
        ],
    )
    def test_that_would_not_be_one_exact_mean_is_refused_with_what_works(
        self, changes: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(JobError, match=said) as refusal:
            statistics_job(**changes)
        assert "\n" not in str(refusal.value)

    def test_without_a_column_of_the_chosen_blocks_is_refused(self) -> None:
        job = statistics_job(
            task={"name": "statistics", "statistics": ["categories"]}, data={"columns": {"x": {"range": [0, 1]}}}
        )
        with pytest.raises(JobError, match="no column of that kind"):
            blocks_of(job.data, job.task)

    @pytest.mark.parametrize(
        ("chosen", "kinds"),
        [
            ("missing", ["age missing 1", "blood missing 1"]),
            ("moments", ["age missing 1", "age moments 2"]),
            ("histogram", ["age histogram 22"]),
            ("categories", ["blood categories 5"]),
            ("labels", ["y labels 4"]),
        ],
    )
    def test_measures_the_chosen_blocks_and_no_others(self, chosen: str, kinds: list[str]) -> None:
        job = statistics_job(task={"name": "statistics", "statistics": [chosen], "bins": 20})
        assert [f"{b.column} {b.kind} {b.size}" for b in blocks_of(job.data, job.task)] == kinds

    def test_fewer_blocks_leave_less_noise_on_each_number(self) -> None:
        scales = [
            scale_of(blocks_of(job.data, job.task))
            for job in (
                statistics_job(task={"name": "statistics", "statistics": chosen})
                for chosen in (["labels"], ["missing", "labels"], ["moments", "labels"], ["moments", "histogram"])
            )
        ]
        assert scales == pytest.approx([1, 3**-0.5, 3**-0.5, 3**-0.5])
        assert scale_of(blocks_of(statistics_job().data, statistics_job().task)) == pytest.approx(5**-0.5)


class TestSummary:
    def test_reads_a_hand_made_model(self) -> None:
        job = statistics_job(task={"name": "statistics", "bins": 4})
        told = summarise(
            job,
            # Of 4 rows: ages 25, 75 and 75, one missing; blood A, A, undeclared, missing; classes 0, 1, 1, 1.
            weights_of(
                job, age_missing=[0.25], age_moments=[0.125, 3 / 16], age_histogram=[0, 0, 0.25, 0, 0.5, 0],
                blood_categories=[0.5, 0, 0, 0.25, 0.25], y_labels=[0.25, 0.75, 0, 0],
            ), noise=0.0,
        )  # fmt: skip
        age, blood = told["columns"]["age"], told["columns"]["blood"]
        assert age["missing"] == pytest.approx(0.25)
        assert age["mean"] == pytest.approx(np.mean([25, 75, 75]), rel=1e-6)
        assert age["sd"] == pytest.approx(np.std([25, 75, 75]), rel=1e-6)
        assert age["histogram"] == pytest.approx([0, 1 / 3, 0, 2 / 3], abs=1e-6)
        assert age["quartiles"] == pytest.approx([25 + 25 * 0.75, 75 + 25 * 0.25, 75 + 25 * 0.625], rel=1e-5)
        assert (age["cell"], age["below"], age["above"]) == (25, 0, 0)
        assert blood["shares"] == pytest.approx({"A": 2 / 3, "B": 0, "O": 0}, abs=1e-6)
        assert (blood["undeclared"], blood["missing"]) == pytest.approx((1 / 3, 0.25), rel=1e-6)
        assert told["target"]["shares"] == pytest.approx({"0": 0.25, "1": 0.75})

    @given(st.lists(st.floats(-20, 120, width=32), min_size=1, max_size=40), st.integers(2, 30))
    @settings(max_examples=80, deadline=None)
    def test_quartiles_are_off_by_at_most_a_cell(self, ages: list[float], bins: int) -> None:
        job = statistics_job(task={"name": "statistics", "statistics": ["histogram"], "bins": bins})
        edges = np.linspace(0, 100, bins + 1)
        inside = [age for age in ages if 0 <= age <= 100]
        cells = np.array([sum(a < 0 for a in ages), *np.histogram(inside, edges)[0], sum(a > 100 for a in ages)])
        told = summarise(job, weights_of(job, age_histogram=(cells / len(ages)).tolist()), noise=0.0)["columns"]["age"]
        for p, quartile in zip((0.25, 0.5, 0.75), told["quartiles"], strict=True):
            # Between two records, where that is the quantile's place, every value is one.
            least, most = np.clip(np.quantile(ages, [p - 1e-6, p + 1e-6], method="inverted_cdf"), 0, 100)
            assert least - 100 / bins - 1e-3 <= quartile <= most + 100 / bins + 1e-3

    def test_standard_errors_are_those_of_the_noise(self) -> None:
        job, noise = statistics_job(task={"name": "statistics", "bins": 4}), 0.002
        exact = weights_of(
            job, age_missing=[0.2], age_moments=[0.1, 0.15], age_histogram=[0, 0.1, 0.3, 0.3, 0.1, 0],
            blood_categories=[0.4, 0.3, 0.1, 0.1, 0.1], y_labels=[0.25, 0.75, 0, 0],
        )  # fmt: skip
        rng = np.random.default_rng(0)
        drawn = [
            summarise(job, (exact + rng.normal(0, noise, len(exact))).astype(np.float32), noise=noise)
            for _ in range(300)
        ]
        truth = summarise(job, exact, noise=0.0)["columns"]["age"]
        ages = [told["columns"]["age"] for told in drawn]
        for key in ("mean", "sd"):
            values = np.array([age[key] for age in ages])
            assert abs(values.mean() - truth[key]) < 0.3 * values.std()
            assert np.median([age["se"][key] for age in ages]) == pytest.approx(values.std(), rel=0.15)
        for at in range(3):
            values = np.array([age["quartiles"][at] for age in ages])
            assert np.median([age["se"]["quartiles"][at] for age in ages]) == pytest.approx(values.std(), rel=0.3)
        bloods = [told["columns"]["blood"] for told in drawn]
        for value in ("A", "B", "O"):
            shares = np.array([blood["shares"][value] for blood in bloods])
            assert np.median([blood["se"]["shares"][value] for blood in bloods]) == pytest.approx(
                shares.std(), rel=0.15
            )
        missing = np.array([age["missing"] for age in ages])
        assert drawn[0]["se_of_a_share"] == pytest.approx(missing.std(), rel=0.15)

    @pytest.mark.parametrize(("top", "values"), [(0.9, 20), (0.95, 50), (0.9, 2), (0.1, 8)])
    def test_the_standard_error_of_a_share_counts_the_noise_of_all_cells_in_the_sum(
        self, top: float, values: int
    ) -> None:
        names = [f"v{number}" for number in range(values)]
        column = {"c": {"type": "category", "values": names}, "x": {"range": [0, 1]}}
        job, noise = statistics_job(data={"columns": column}, task={"name": "statistics", "bins": values}), 1e-3
        cells = [0.9 * top, *[0.9 * (1 - top) / (values - 1)] * (values - 1)]
        exact = weights_of(job, c_categories=[*cells, 0.0, 0.1], x_histogram=[0.0, *cells, 0.0], x_missing=[0.1])
        rng = np.random.default_rng(0)
        drawn = [
            summarise(job, (exact + rng.normal(0, noise, len(exact))).astype(np.float32), noise=noise)["columns"]
            for _ in range(600)
        ]
        for at in (0, 1):
            shares = [told["c"]["shares"][names[at]] for told in drawn if 0 < told["c"]["shares"][names[at]] < 1]
            stated = np.median([told["c"]["se"]["shares"][names[at]] for told in drawn])
            if at == 0:  # A small share is cut off at zero.
                assert stated == pytest.approx(np.std(shares), rel=0.1)
            cells_of = [told["x"]["histogram"][at] for told in drawn]
            stated = np.median([told["x"]["se"]["histogram"][at] for told in drawn])
            assert stated == pytest.approx(np.std(cells_of), rel=0.1)

    @pytest.mark.parametrize("noise", [1.0, 1e3])
    def test_what_is_lost_in_noise_is_none_and_never_nonsense(self, noise: float) -> None:
        job = statistics_job()
        size = size_of(blocks_of(job.data, job.task))
        for seed in range(30):
            weights = np.random.default_rng(seed).normal(0, noise, size).astype(np.float32)
            told = summarise(job, weights, noise=noise)
            age = told["columns"]["age"]
            assert age["sd"] is None or age["sd"] > 0
            assert age["mean"] is None or 0 <= age["mean"] <= 100
            assert all(q is None or 0 <= q <= 100 for q in age["quartiles"])
            json.dumps(told, allow_nan=False)

    def test_a_column_that_is_missing_everywhere_has_no_mean_and_a_constant_one_no_spread(self) -> None:
        job = statistics_job(task={"name": "statistics", "statistics": ["moments"]})
        assert summarise(job, weights_of(job, age_missing=[1.0]), noise=0.0)["columns"]["age"]["mean"] is None
        constant = summarise(job, weights_of(job, age_moments=[0.5, 0.25]), noise=0.0)["columns"]["age"]
        # Whether there is none at all, float32 weights do not tell.
        assert (constant["mean"], constant["sd"]) == (pytest.approx(75), None)

    @pytest.mark.parametrize("noise", [0.0, None])
    def test_a_spread_that_is_small_in_a_wide_range_is_unknown_and_not_zero(self, noise: float | None) -> None:
        job = statistics_job(data={"columns": {"age": {"range": [0, 10_000]}}})
        u = (np.random.default_rng(1).normal(500, 1, 1000) - 5000) / 5000
        moments = {"age_moments": [float(u.mean()), float((u * u).mean())]}
        told = summarise(job, weights_of(job, **moments), noise=noise)["columns"]["age"]
        assert (told["mean"], told["sd"], told["se"]["sd"]) == (pytest.approx(500, abs=0.1), None, None)

    def test_a_column_that_is_missing_at_every_site_reads_as_unknown(self) -> None:
        job = statistics_job(task={"name": "statistics", "bins": 4})
        told = summarise(job, weights_of(job, age_missing=[1.0], blood_categories=[0, 0, 0, 0, 1.0]), noise=0.0)
        age, blood = told["columns"]["age"], told["columns"]["blood"]
        assert (age["missing"], age["mean"], age["quartiles"]) == (pytest.approx(1), None, [None] * 3)
        assert age["histogram"] == age["se"]["histogram"] == [None] * 4
        assert (blood["shares"]["A"], blood["se"]["shares"]["A"]) == (None, None)

    def test_a_model_of_another_job_is_refused(self) -> None:
        with pytest.raises(RunError, match="not its model"):
            summarise(statistics_job(), np.zeros(3, np.float32), noise=0.0)


SAID: dict[str, Any] = {
    "v": 1,
    "columns": {
        "age": {"type": "number", "range": [0, 100], "mean": 54.5, "sd": 9.25},
        "blood": {"type": "category", "shares": {"A": 0.2, "B": 0.5, "O": 0.3}},
    },
}


def write_job(folder: Path, **data: Any) -> Path:
    raw = raw_job(data={"columns": COLUMNS, "statistics": "stats.json", "on_missing": "fill", **data})
    (folder / "job.toml").write_text(tomli_w.dumps(raw))
    return folder / "job.toml"


class TestUse:
    def test_one_line_in_a_job_becomes_constants_that_its_hash_covers(self, tmp_path: Path) -> None:
        (tmp_path / "stats.json").write_text(json.dumps(SAID))
        job = load_job(write_job(tmp_path))
        age, blood = job.data.columns["age"], job.data.columns["blood"]
        assert (age.mean, age.sd, age.fill, blood.fill) == (54.5, 9.25, 54.5, "B")
        assert "stats.json" not in job.toml.decode()
        assert "mean = 54.5" in job.toml.decode()
        (tmp_path / "again.toml").write_bytes(job.toml)  # As a run folder keeps it: nothing is looked up again.
        (tmp_path / "stats.json").unlink()
        assert load_job(tmp_path / "again.toml").hash == job.hash

    def test_what_a_column_says_itself_stands(self, tmp_path: Path) -> None:
        (tmp_path / "stats.json").write_text(json.dumps(SAID))
        own = {**COLUMNS, "blood": {"type": "category", "values": ["A", "B", "O"], "fill": "O"}}
        assert load_job(write_job(tmp_path, columns=own)).data.columns["blood"].fill == "O"

    def test_what_no_statistics_job_measures_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "stats.json").write_text(json.dumps(SAID))
        others = {"note": {"type": "text", "buckets": 8}, "article": {"type": "id", "count": 9}}
        columns = load_job(write_job(tmp_path, columns={**COLUMNS, **others}, on_missing="refuse")).data.columns
        assert (columns["age"].mean, columns["note"].fill, columns["article"].fill) == (54.5, None, None)

    def test_a_number_whose_spread_is_lost_in_noise_keeps_its_range(self, tmp_path: Path) -> None:
        age = {**SAID["columns"]["age"], "sd": None}
        (tmp_path / "stats.json").write_text(json.dumps({**SAID, "columns": {**SAID["columns"], "age": age}}))
        column = load_job(write_job(tmp_path)).data.columns["age"]
        assert (column.mean, column.sd, column.fill) == (None, None, 54.5)

    @pytest.mark.parametrize(
        ("content", "columns", "said"),
        [
            (None, COLUMNS, "no run folder and no file of statistics"),
            ("[]", COLUMNS, "not a JSON object"),
            ("{", COLUMNS, "cannot be read as JSON"),
            ('{"v": 2, "columns": {}}', COLUMNS, "not what `fedchorus statistics --json` writes"),
            (json.dumps(SAID), {**COLUMNS, "x": {"range": [0, 1]}}, "did not measure 'x' as a number"),
            (json.dumps(SAID), {"blood": {"range": [0, 1]}}, "did not measure 'blood' as a number"),
            (json.dumps(SAID), {"age": {"range": [0, 120]}}, "measured 'age' over another range"),
            (json.dumps(SAID), {"age": 3}, "should be a table"),
            (json.dumps(SAID), 5, r"data\.columns: should be a table"),
            (json.dumps(SAID), "abc", r"data\.columns: should be a table"),
            (json.dumps(SAID), {"age": {"range": 5}}, r"columns\.age\.range"),
            (json.dumps(SAID), {"age": {"range": ["a", "b"]}}, r"columns\.age\.range"),
            (json.dumps(SAID), {"blood": {"type": "category", "values": 5}}, r"columns\.blood\.values"),
            (json.dumps(SAID), {"blood": {"type": ["category"], "values": ["A"]}}, r"columns\.blood\.type"),
            *(
                (json.dumps({"v": 1, "columns": {"blood": own}}), COLUMNS, "its figures of 'blood' are not as")
                for own in (
                    5,
                    {"type": "category", "shares": [1]},
                    {"type": "category", "shares": {"A": "z", "B": 1}},
                    {"type": "category", "shares": {"A": [1]}},
                    {"type": "number", "mean": "m", "sd": 1},
                    {"type": "number", "mean": True},
                )
            ),
        ],
    )
    def test_what_does_not_fit_the_job_is_refused(
        self, tmp_path: Path, content: str | None, columns: Any, said: str
    ) -> None:
        if content is not None:
            (tmp_path / "stats.json").write_text(content)
        with pytest.raises(JobError, match=said) as refusal:
            load_job(write_job(tmp_path, columns=columns))
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize(
        ("column", "said"),
        [
            ({"range": [0, 1], "mean": 0.5}, "mean and sd go together"),
            ({"range": [0, 1], "mean": 0.5, "sd": 0.0}, "sd"),
            ({"range": [0, 1], "fill": "x"}, "fill must be a number"),
            ({"type": "category", "values": [1, 2], "fill": 3}, "one of the category's `values`"),
        ],
    )
    def test_constants_that_make_no_sense_are_refused(self, column: dict[str, Any], said: str) -> None:
        with pytest.raises(JobError, match=said):
            make_job(data={"columns": {"x": column}})

    def test_filling_needs_something_to_fill_with(self) -> None:
        with pytest.raises(JobError, match=r'on_missing = "fill": columns\.x has no `fill`; give data\.statistics'):
            make_job(data={"on_missing": "fill"})


class TestRuns:
    def test_of_another_task_or_unfinished_are_refused(self, tmp_path: Path) -> None:
        for name, job in (("other", make_job()), ("unfinished", statistics_job())):
            (tmp_path / name).mkdir()
            (tmp_path / name / "job.toml").write_bytes(job.toml)
        with pytest.raises(RunError, match="is not one of statistics"):
            read_statistics(tmp_path / "other")
        with pytest.raises(RunError, match="this run is not finished"):
            read_statistics(tmp_path / "unfinished")
        with pytest.raises(RunError, match="no run folder and no file of statistics"):
            read_statistics(tmp_path)


def test_a_columns_table_is_left_alone_where_it_is_not_asked_to_change(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(SAID))
    data = {"columns": {"age": {"range": [0, 100]}}, "statistics": "s.json"}
    with_statistics(data, tmp_path / "s.json", where="job.toml")
    assert data == {"columns": {"age": {"range": [0, 100]}}, "statistics": "s.json"}


def test_a_block_is_where_it_says() -> None:
    assert np.arange(9)[Block("x", "moments", 3, 2).slice].tolist() == [3, 4]
