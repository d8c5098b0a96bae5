"""A statistics job over whole runs: the pooled figures, exact or within the stated errors; one line uses them."""

import json
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
from sklearn.model_selection import train_test_split
from typer.testing import CliRunner

from fedchorus import app
from privacy.audit import audit_run
from privacy.errors import BudgetExceeded, DataError
from simulations.federation import Federation
from simulations.planning import parameter_count
from simulations.simulate import Watcher, start_run
from strategies.job import load_job
from strategies.parameters import Parameters
from strategies.statistics import read_statistics

COLUMNS: dict[str, Any] = {
    "age": {"range": [0, 100]},
    "dose": {"range": [0, 1]},
    "blood": {"type": "category", "values": ["A", "B", "O"]},
}
ONE_ROUND = {"training": None, "task": {"name": "statistics"}}
TRAINING = {"rounds": 2, "learning_rate": 0.5, "local_steps": 2, "sampling_rate": 1.0}


@cache
def pooled() -> pd.DataFrame:
    """Three sites that differ; `west` has one row."""
    rng = np.random.default_rng(5)
    parts = []
    for site, rows, age in (("north", 400, 40), ("south", 250, 65), ("west", 1, 50)):
        ages = rng.normal(age, 12, rows).round(1)
        parts.append(pd.DataFrame({
            "site": site, "age": np.where(rng.random(rows) < 0.1, np.nan, ages), "dose": rng.beta(2, 5, rows).round(3),
            "blood": rng.choice(np.array(["A", "B", "O", "AB", None]), rows, p=[0.4, 0.1, 0.35, 0.05, 0.1]),
            "y": (rng.random(rows) < 0.3).astype(int),
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def training_rows() -> pd.DataFrame:
    """Those of the pooled rows that are not for testing; of `west` its one row."""
    rows = pooled()
    groups = [own.index.to_numpy() for _, own in rows.groupby("site")]
    return rows.loc[
        np.concatenate([own if len(own) == 1 else train_test_split(own, random_state=0)[0] for own in groups])
    ]


def job_file(folder: Path, **changes: Any) -> Path:
    """A job over `records.csv` beside it; `changes` as the file has them."""
    pooled().to_csv(folder / "records.csv", index=False)
    data = {"path": "records.csv", "client": "site", "target": "y", "columns": COLUMNS, "stratify": False}
    data |= changes.pop("data", {})
    raw: dict[str, Any] = {"name": "stats", "data": data, **ONE_ROUND, **changes}
    path = folder / f"{raw['name']}.toml"
    path.write_text(tomli_w.dumps({key: value for key, value in raw.items() if value is not None}))
    return path


def run(job: Path, out: Path, *settings: str, after: Path | None = None) -> dict[str, Any]:
    summary = start_run(
        load_job(job, settings), out=out, parent=out, watcher=Watcher(), now=datetime.now(UTC), after=after
    )
    assert summary is not None
    return summary


def test_the_figures_are_those_of_the_pooled_rows(tmp_path: Path) -> None:
    run(job_file(tmp_path), tmp_path / "run")
    said, rows = read_statistics(tmp_path / "run"), training_rows()
    assert (said["rows"], said["sites"], said["epsilon"], said["se_of_a_share"]) == (len(rows), 3, {}, 0.0)
    for name in ("age", "dose"):
        low, high = COLUMNS[name]["range"]
        own, clipped = said["columns"][name], rows[name].clip(low, high)
        assert own["missing"] == pytest.approx(rows[name].isna().mean(), abs=1e-6)
        assert own["mean"] == pytest.approx(clipped.mean(), rel=1e-5)
        assert own["sd"] == pytest.approx(clipped.std(ddof=0), rel=1e-4)
        assert own["above"] == pytest.approx((rows[name] > high).sum() / rows[name].count(), abs=1e-6)
        quartiles = clipped.quantile([0.25, 0.5, 0.75])
        assert np.abs(np.array(own["quartiles"]) - quartiles).max() <= own["cell"]
    blood, known = said["columns"]["blood"], rows["blood"].dropna()
    assert blood["missing"] == pytest.approx(rows["blood"].isna().mean(), abs=1e-6)
    assert blood["undeclared"] == pytest.approx((known == "AB").mean(), abs=1e-6)
    assert blood["shares"] == pytest.approx({v: (known == v).mean() for v in ("A", "B", "O")}, abs=1e-6)
    assert said["target"]["shares"]["1"] == pytest.approx(rows["y"].mean(), abs=1e-6)


def test_a_plan_counts_the_statistics_and_the_model_card_names_them(tmp_path: Path) -> None:
    job = job_file(tmp_path)
    run(job, tmp_path / "run")
    assert parameter_count(load_job(job)) == len(weights_of(tmp_path / "run"))
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert "Not a model that predicts: the mean of a public function of the training rows" in card
    assert "Blocks: `missing of age`, `moments of age`" in card


def weights_of(run: Path) -> Any:
    return Parameters.load(run / "model.safetensors")[1]


def test_a_secure_sum_says_the_same_to_the_step_of_its_encoding(tmp_path: Path) -> None:
    job = job_file(tmp_path)
    run(job, tmp_path / "plain")
    run(job, tmp_path / "secure", "secure_aggregation={colluders=0, dropouts=0, reach=512.0}")
    # 32 bits for sums of three sites of reach 512, and a mean over 488 rows.
    step = 512 * 3 / 2**30
    assert np.abs(weights_of(tmp_path / "secure") - weights_of(tmp_path / "plain")).max() < 3 * step / 488 + 1e-6


PROTECTED = {
    "records": ["privacy.record={noise_multiplier=3.0, delta=1e-4}"],
    "clients, by the server": ["privacy.client={noise_multiplier=1.0, delta=1e-4}", "strategy.weighting=equal"],
    "clients, by themselves": [
        "privacy.client={noise_multiplier=1.0, delta=1e-4, placement='local'}", "strategy.weighting=equal",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", PROTECTED)
def test_private_figures_are_off_by_the_noise_that_is_stated(kind: str, tmp_path: Path) -> None:
    job, settings = job_file(tmp_path), PROTECTED[kind]
    exact = ["strategy.weighting=rows"] if kind == "records" else []
    run(job, tmp_path / "run", *settings)
    private, noise = weights_of(tmp_path / "run"), read_statistics(tmp_path / "run")
    if exact:
        run(job, tmp_path / "exact")
        truth = weights_of(tmp_path / "exact")
    else:  # The mean over sites of each site's mean: the plain run cannot weigh so, its parts can.
        federation = Federation.load(load_job(job))
        truth = np.mean([own.train.features.mean(axis=0) for own in federation.data.values()], axis=0)
    from strategies.statistics import blocks_of, scale_of

    loaded = load_job(job)
    deviation = noise["se_of_a_share"] * scale_of(blocks_of(loaded.data, loaded.task))
    scores = (private - truth) / deviation
    assert scores.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(scores)))
    assert np.abs(scores).max() < 6
    assert list(noise["epsilon"]) == ["record" if kind == "records" else "client"]
    assert noise["weighting"] == ("rows" if kind == "records" else "equal")


class TestUse:
    def test_all_sites_encode_alike_by_the_measured_constants(self, tmp_path: Path) -> None:
        run(job_file(tmp_path), tmp_path / "run")
        used = {"statistics": "run", "on_missing": "fill", "allow_one_class": True}
        declared = {**COLUMNS, "blood": {"type": "category", "values": ["A", "B", "O", "AB"]}}
        with pytest.raises(DataError, match=r"column 'blood': \d+ rows are not among"):
            Federation.load(load_job(job_file(tmp_path, name="t", data=used, task=None, training=TRAINING)))
        rows, measured = pooled(), training_rows()["age"].clip(0, 100)
        del declared["blood"]
        job = load_job(job_file(tmp_path, name="t", data={**used, "columns": declared}, task=None, training=TRAINING),
                       ["data.client=site"])  # fmt: skip
        from client.reading import records_of
        from client.tables import read_frame

        features = records_of(read_frame(tmp_path / "records.csv", job.data), job, where="a test").features
        ages = rows["age"].clip(0, 100)
        expected = ((ages - measured.mean()) / measured.std(ddof=0)).fillna(0.0)
        np.testing.assert_allclose(features[:, 0], expected, atol=1e-3)

    def test_a_missing_target_is_never_filled(self, tmp_path: Path) -> None:
        column = {"age": {"range": [0, 100], "fill": 50}}
        job = load_job(job_file(tmp_path, task=None, training=TRAINING, data={"columns": column, "on_missing": "fill"}))
        from client.data import encode

        with pytest.raises(DataError, match=r"1 of 2 rows have missing values \(most in column 'y'\)"):
            encode(pd.DataFrame({"age": [None, "3"], "y": ["1", None]}), job.data, where="north.csv")

    def test_is_charged_in_the_same_ledgers_and_refused_where_both_cost_too_much(self, tmp_path: Path) -> None:
        private = {"record": {"epsilon": 1.0, "delta": 1e-4}}
        columns = {"columns": {"dose": COLUMNS["dose"]}, "allow_one_class": True}
        rows = pooled()
        statistics = job_file(tmp_path, privacy=private, data={"columns": {"dose": COLUMNS["dose"]}})
        rows[rows["site"] != "west"].to_csv(tmp_path / "records.csv", index=False)
        run(statistics, tmp_path / "run")
        training = job_file(tmp_path, name="training", task=None, training=TRAINING, privacy=private,
                            data={**columns, "statistics": "run", "on_missing": "fill"})  # fmt: skip
        rows[rows["site"] != "west"].to_csv(tmp_path / "records.csv", index=False)
        summary = run(training, tmp_path / "after", "simulation.baselines=false", after=tmp_path / "run")
        assert summary["epsilon"]["record"] > 1.2  # Both together.
        assert audit_run(tmp_path / "after").ok
        with pytest.raises(BudgetExceeded):
            run(statistics, tmp_path / "again", "name=again", "privacy.record.noise_multiplier=0.5")


class TestCommand:
    def test_shows_tables_and_the_same_as_json(self, tmp_path: Path) -> None:
        run(job_file(tmp_path), tmp_path / "run", *PROTECTED["records"])
        shown = CliRunner().invoke(app, ["statistics", str(tmp_path / "run")])
        assert shown.exit_code == 0
        for words in ("age", "blood", "y (target)", "A: ", "488 rows of 3 sites", "record-level epsilon", "±"):
            assert words in shown.stdout
        told = CliRunner().invoke(app, ["statistics", str(tmp_path / "run"), "--json"])
        (tmp_path / "stats.json").write_text(told.stdout)
        assert json.loads(told.stdout) == read_statistics(tmp_path / "run") == read_statistics(tmp_path / "stats.json")

    def test_says_so_where_the_noise_is_not_known(self, tmp_path: Path) -> None:
        run(job_file(tmp_path), tmp_path / "run", *PROTECTED["records"])
        (tmp_path / "run" / "summary.json").unlink()  # What a coordinator's job folder lacks.
        shown = CliRunner().invoke(app, ["statistics", str(tmp_path / "run")])
        assert "how much noise is in the figures is not known here" in shown.stdout
        assert "±" not in shown.stdout
