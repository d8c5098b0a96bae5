"""An evaluation's one sum says what the simulator, who sees all rows, computes; whatever protects it on the way."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fedchorus import app
from privacy.audit import audit_run
from privacy.errors import JobError
from simulations.report import render_report
from simulations.simulate import Watcher, start_run
from strategies.figures import read_evaluation
from strategies.job import Job, check_job, evaluation_job
from tests.simulations.test_task_runs import job_of, tables

SITES, EACH = ("east", "north", "south", "west"), 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(11)
    path = tmp_path_factory.mktemp("evaluated")
    rows = len(SITES) * EACH
    x = rng.uniform(0, 1, rows)
    table = pd.DataFrame({"x": x, "site": np.repeat(SITES, EACH), "sex": rng.choice(["F", "M"], rows, p=[0.8, 0.2])})
    table["ill"] = (rng.random(rows) < x).astype(int)
    table["kind"] = np.where(x < 0.3, "a", np.where(rng.random(rows) < 0.7, "b", "c"))
    table["amount"] = (3 + 4 * x + rng.normal(0, 0.5, rows)).clip(1, 9)
    table["months"] = (rng.exponential(size=rows) / np.exp(2 * x)).round(3) + 0.001
    table["died"] = (rng.random(rows) < 0.7).astype(int)
    table.to_csv(path / "table.csv", index=False)
    return path


TARGETS: dict[str, dict[str, Any]] = {
    "binary": {"data": {"target": "ill"}},
    "classes": {"data": {"target": "kind", "classes": ["a", "b", "c"]}},
    "number": {
        "data": {"target": "amount", "target_type": "number", "target_range": [1, 9]},
        "task": {"name": "tabular-regression", "model": "linear"},
    },
    "time": {
        "data": {"target": "months", "target_type": "time", "event": "died"},
        "task": {"name": "survival", "model": "linear", "loss": "cox"},
    },
}
# What the cells tell exactly, and what they tell within bounds; by the simulator's name.
EXACT = {"binary": ("accuracy", "f1", "loss"), "classes": ("accuracy",), "number": ("rmse", "mae")}
WITHIN = {"binary": ("auc",), "number": ("r2",), "time": ("c_index",)}


def trained(folder: Path, kind: str = "binary", **changes: Any) -> tuple[Path, dict[str, Any]]:
    own = TARGETS[kind]
    data = {"folder": str(folder), "path": "table.csv", "client": "site", "columns": {"x": {"range": [0, 1]}},
            "stratify": False}  # fmt: skip
    training = {"rounds": 6, "local_steps": 8, "sampling_rate": 0.5, "learning_rate": 0.5, "device": "cpu"}
    raw = {"name": f"trained-{kind}", "data": {**data, **own["data"]}, "task": own.get("task", {}),
           "training": training, "simulation": {"baselines": False}, **changes}  # fmt: skip
    return run(check_job(raw, where="a test"), folder)


def run(job: Job, folder: Path) -> tuple[Path, dict[str, Any]]:
    summary = start_run(job, out=None, parent=folder / "runs", watcher=Watcher(), now=datetime.now(UTC))
    assert summary is not None
    return Path(summary["run"]), summary


def evaluated(folder: Path, of: Path, *settings: str) -> dict[str, Any]:
    where, _ = run(evaluation_job(of, settings), folder)
    return read_evaluation(where)


@pytest.mark.parametrize("kind", TARGETS)
def test_says_what_the_simulator_sees_on_all_rows(folder: Path, kind: str) -> None:
    path, summary = trained(folder, kind)
    ends = [round(0.02 * 1.12**n, 4) for n in range(40)]
    settings = [f"evaluation.times={ends}"] if kind == "time" else []
    said = evaluated(folder, path, *settings)
    for name in EXACT.get(kind, ()):
        assert said["figures"][name]["value"] == pytest.approx(summary["metrics"][name], rel=1e-4)
        assert said["figures"][name]["low"] == said["figures"][name]["high"]
    for name in WITHIN.get(kind, ()):
        figure = said["figures"][name]
        assert figure["low"] <= summary["metrics"][name] <= figure["high"]
        assert figure["value"] == pytest.approx(summary["metrics"][name], abs=0.02)
    assert said["rows"] == sum(site["test_rows"] for site in summary["sites"].values())


def test_secure_sums_say_the_same(folder: Path) -> None:
    path, _ = trained(folder)
    plain = evaluated(folder, path)["figures"]
    secure = evaluated(folder, path, "secure_aggregation={colluders=1, reach=100.0}")["figures"]
    for name, figure in plain.items():
        assert secure[name]["value"] == pytest.approx(figure["value"], abs=1e-3)


def test_with_record_level_privacy_is_off_by_its_stated_noise_and_is_in_the_ledgers(folder: Path) -> None:
    path, summary = trained(folder)
    where, ran = run(evaluation_job(path, ["privacy.record={epsilon=8.0, delta=1e-3}", "evaluation.bins=20"]), folder)
    said = read_evaluation(where)
    accuracy = said["figures"]["accuracy"]
    assert 0 < accuracy["se"] < 0.2
    assert abs(accuracy["value"] - summary["metrics"]["accuracy"]) < 5 * accuracy["se"]
    assert said["epsilon"]["record"] == pytest.approx(8.0, rel=0.05)
    assert ran["measures"] == "evaluation"
    assert audit_run(where).ok


def test_its_report_and_card_speak_of_test_rows(folder: Path) -> None:
    path, _ = trained(folder)
    where, _ = run(evaluation_job(path, ["privacy.record={epsilon=8.0, delta=1e-3}"]), folder)
    page, card = (where / "report.html").read_text(), (where / "MODEL_CARD.md").read_text()
    assert "one such change of its test rows" in page
    assert "nothing here bounds what it tells about the rows that it was trained on" in page
    assert "for the site's test rows" in card
    assert "Not a model that predicts" in card


def test_with_client_level_privacy_the_spread_over_sites_is_covered_too(folder: Path) -> None:
    path, _ = trained(folder)
    private = ["privacy.client={epsilon=30.0, delta=1e-3, placement='local'}", "strategy.weighting=equal"]
    said = evaluated(folder, path, *private, "evaluation.sites=4", "evaluation.bins=10")
    assert said["epsilon"]["client"] <= 30.0
    assert "worst" not in said["by_site"]["accuracy"]  # Whose cell is the last one that is not empty noise would hide.


def test_counts_sites_by_their_own_figures(folder: Path) -> None:
    path, summary = trained(folder)
    spread = evaluated(folder, path, "evaluation.sites=50")["by_site"]["accuracy"]
    own = sorted(site["accuracy"] for site in summary["sites"].values())
    assert spread["worst"]["low"] <= own[0] <= spread["worst"]["high"] + 1e-9
    assert spread["worst_tenth"]["low"] <= own[0] <= spread["worst_tenth"]["high"] + 1e-9
    cells = np.array(spread["shares"])
    want = np.bincount([max(0, int(np.ceil(a * 50)) - 1) for a in own], minlength=50) / len(own)
    assert cells == pytest.approx(want, abs=1e-6)


def test_groups_add_up_and_small_ones_stay_at_their_sites(folder: Path) -> None:
    path, _ = trained(folder)
    groups = "evaluation.groups.sex.values=['F', 'M']"
    every = evaluated(folder, path, groups, "evaluation.smallest=1")["groups"]["sex"]
    assert every["F"]["share"] + every["M"]["share"] == pytest.approx(1.0, abs=1e-6)
    assert every["F"]["figures"]["accuracy"] is not None
    # Each site has 15 test rows: where a few are of men it leaves both groups out.
    few = evaluated(folder, path, groups, "evaluation.smallest=10")["groups"]["sex"]
    assert few["M"] == {"share": 0.0, "figures": {}}
    assert few["F"]["share"] < every["F"]["share"]


@pytest.mark.parametrize("strategy", [{"name": "fedper", "keep": ["0.bias"]}, {"name": "ditto"}])
def test_own_models_are_each_site_s(folder: Path, strategy: dict[str, Any]) -> None:
    path, summary = trained(folder, strategy=strategy)
    own = evaluated(folder, path, "evaluation.model=own")["figures"]
    shared = evaluated(folder, path)["figures"]
    assert own["loss"]["value"] == pytest.approx(summary["personal"]["loss"], rel=1e-4)
    assert shared["loss"]["value"] == pytest.approx(summary["metrics"]["loss"], rel=1e-4)
    assert own["loss"]["value"] != pytest.approx(shared["loss"]["value"], rel=1e-6)


def test_a_site_of_no_row_and_one_of_one_class_take_part(folder: Path, tmp_path: Path) -> None:
    path, _ = trained(folder)
    table = pd.read_csv(folder / "table.csv")
    files = {name: table[table["site"] == name] for name in SITES}
    files["south"] = files["south"].iloc[:0]
    files["west"] = files["west"].assign(ill=1)
    for name, part in files.items():
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    named = "{" + ", ".join(f'{name}="{name}.csv"' for name in SITES) + "}"
    said = evaluated(folder, path, f'data.folder="{tmp_path}"', f"data.files={named}", "evaluation.sites=10")
    assert said["sites"] == 4
    assert said["figures"]["accuracy"]["value"] > 0
    assert said["by_site"]["auc"]["undefined"] == pytest.approx(0.5, abs=1e-6)
    assert said["by_site"]["accuracy"]["undefined"] == pytest.approx(0.25, abs=1e-6)


def test_a_model_that_is_not_the_job_s_is_refused(folder: Path) -> None:
    job = evaluation_job(trained(folder)[0])
    assert job.evaluation is not None
    for choice, data, said in (
        ({"model_hash": "b" * 64}, {}, "the model of .* is another"),
        ({}, {"test_fraction": 0.5}, "data and task are not those of"),
    ):
        wrong = job.model_copy(
            update={"evaluation": job.evaluation.model_copy(update=choice), "data": job.data.model_copy(update=data)}
        )
        with pytest.raises(JobError, match=said):
            run(wrong, folder)


def test_a_run_whose_job_was_another_is_refused(folder: Path) -> None:
    path, _ = trained(folder)
    other, _ = trained(folder, seed=9)
    job = evaluation_job(path)
    assert job.evaluation is not None
    wrong = job.model_copy(update={"evaluation": job.evaluation.model_copy(update={"run": str(other)})})
    with pytest.raises(JobError, match="is another job's"):
        run(wrong, folder)


def test_without_its_run_a_simulation_says_what_is_missing(folder: Path) -> None:
    job = evaluation_job(trained(folder)[0])
    assert job.evaluation is not None
    bare = job.model_copy(update={"evaluation": job.evaluation.model_copy(update={"run": None})})
    with pytest.raises(JobError, match=r"give evaluation\.run"):
        run(bare, folder)


def test_the_command_measures_a_run_and_shows_it_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, summary = trained(folder)
    monkeypatch.chdir(tmp_path)
    asked = ["evaluate", str(path), "--json", "--out", "mine", "--set", "evaluation.sites=10"]
    first = CliRunner().invoke(app, asked)
    assert first.exit_code == 0, first.output
    said = json.loads(first.stdout.splitlines()[-1])
    assert said["figures"]["accuracy"]["value"] == pytest.approx(summary["metrics"]["accuracy"], abs=1e-5)
    again = CliRunner().invoke(app, ["evaluate", "mine", "--json"])
    assert json.loads(again.stdout) == said
    shown = CliRunner().invoke(app, ["evaluate", "mine"])
    assert "the shared model" in shown.stdout
    assert "Calibration" in shown.stdout
    assert "worst tenth" in shown.stdout
    page = (tmp_path / "mine" / "report.html").read_text()
    assert "What was measured" in page
    assert "Accuracy reached" not in page
    refused = CliRunner().invoke(app, ["evaluate", "mine", "--set", "evaluation.bins=10"])
    assert refused.exit_code != 0


@pytest.mark.parametrize("kind", ["next character", "images", "forecast", "ratings"])
def test_every_kind_of_record_can_be_evaluated(kind: str, tmp_path: Path) -> None:
    path, summary = run(job_of(kind, tables(tmp_path)), tmp_path)
    settings = ["evaluation.target_range=[1.0, 40.0]"] if kind == "forecast" else []
    figures = evaluated(tmp_path, path, *settings)["figures"]
    name = "accuracy" if "accuracy" in summary["metrics"] else "mae"
    assert figures[name]["value"] == pytest.approx(summary["metrics"][name], rel=1e-3, abs=1e-5)


def test_a_report_of_what_was_measured_has_no_figure_of_learning() -> None:
    page = render_report(job_toml="", summary={"measures": "statistics", "run": "runs/a"}, rounds=[])
    assert "fedchorus statistics runs/a" in page
    assert "How it learnt" not in page
