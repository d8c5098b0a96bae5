"""A sweep runs every combination once, keeps what is finished, and leaves no process behind."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privacy.errors import JobError, RunError
from simulations.headline import HEADLINES
from simulations.scenarios import scenario_path
from simulations.sweep import (
    Grid,
    LeftOut,
    SweepWatcher,
    Swept,
    grid_of,
    parse_sweep,
    parsed_value,
    run_sweep,
)
from simulations.sweep_view import Comparison, csv_text, picture, render_sweep
from simulations.sweep_workers import CHILD, POLL_S, Answer, Processes, Request, answer_to
from tests.simulations.test_command_line import fedchorus

HOSPITALS = scenario_path("hospitals")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PLAIN = ["training.rounds=2", "simulation.baselines=false", "privacy.record=none"]
# No search for the noise: a given multiplier keeps these tests fast.
NOISE = ["simulation.baselines=false", "privacy.record.epsilon=none", "privacy.record.noise_multiplier=5.0"]


class Inline:
    """Workers without processes: one request after the other, here."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def answers(self, requests: Sequence[Request], *, stop: Callable[[], bool]) -> Iterator[tuple[Request, Answer]]:
        for request in requests:
            if stop():
                return
            self.asked.append((request.what, request.path.name))
            words = {"what": request.what, "job": request.job.toml.decode(), "path": str(request.path)}
            yield request, answer_to(words, stop=stop)


def sweep(
    grid: Grid, out: Path, *, workers: Any = None, skip_invalid: bool = False, watcher: SweepWatcher | None = None
) -> Swept | None:
    return run_sweep(
        grid, out=out, parent=out.parent, workers=workers or Inline(), skip_invalid=skip_invalid, now=NOW,
        watcher=watcher or SweepWatcher(),
    )  # fmt: skip


# --- what was typed -------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="ascii", exclude_characters='"\\', categories=("L", "N", "P", "Zs")), max_size=8)
plain = st.from_regex(r"[a-z][a-z0-9.:_-]{0,8}", fullmatch=True)
scalars = st.integers(-(2**40), 2**40) | st.floats(-1e6, 1e6) | st.booleans() | texts | plain
values = scalars | st.lists(scalars, max_size=3)


@given(st.lists(values, min_size=1, max_size=5))
def test_values_are_split_at_commas_outside_quotes_and_brackets_and_read_as_toml(expected: list[Any]) -> None:
    key, found = parse_sweep("a.b=" + ",".join(json.dumps(value) for value in expected))
    assert key == "a.b"
    assert [parsed_value(value) for value in found] == expected


@given(st.lists(plain.filter(lambda word: word not in ("true", "false", "inf", "nan")), min_size=1, max_size=5))
def test_what_is_no_toml_is_a_plain_string(words: list[str]) -> None:
    _, found = parse_sweep("strategy.name= " + " , ".join(words))
    assert [parsed_value(value) for value in found] == words


@pytest.mark.parametrize("text", ["", "a", "a=", "a=1,", "a=,1", "a=1,,2", "=1", 'a="1,2', "a=[1,2", "a=1]", "a='1"])
def test_what_is_no_sweep_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(JobError, match=r"^--sweep .*: expected KEY=V1,V2 as in strategy\.name=fedavg,scaffold"):
        parse_sweep(text)


def test_the_grid_is_the_product_of_all_values_and_seeds_in_the_order_they_were_given() -> None:
    sweeps = ["strategy.name=fedavg,scaffold", "training.learning_rate=0.5,2.0"]
    grid = grid_of(HOSPITALS, [*PLAIN, "seed=40"], sweeps, repeat=2)
    assert [
        (run.job.strategy.name, run.job.training.learning_rate, run.job.seed, run.job.training.rounds)
        for run in grid.runs
    ] == [(name, rate, seed, 2) for name in ("fedavg", "scaffold") for rate in (0.5, 2.0) for seed in (40, 41)]
    assert [run.name for run in grid.runs][:3] == [
        "name-fedavg_learning_rate-0.5_seed-40",
        "name-fedavg_learning_rate-0.5_seed-41",
        "name-fedavg_learning_rate-2.0_seed-40",
    ]
    assert grid.title(grid.runs[1]) == "name=fedavg, learning_rate=0.5, seed=41"
    assert [len(runs) for runs in grid.combinations()] == [2, 2, 2, 2]
    assert len({run.job.hash for run in grid.runs}) == 8


def test_a_swept_job_is_the_job_that_the_same_override_makes() -> None:
    from strategies.job import load_job

    sweeps = ["cohort.size=3,none", 'data.columns."mean radius".range=[5, 30],[5, 31]']
    grid = grid_of(HOSPITALS, ["cohort.minimum=4"], sweeps, repeat=1)
    # Fewer sites than have to answer: only the combinations without a size are jobs.
    assert [list(one.settings.values()) for one in grid.left_out] == [["3", "[5, 30]"], ["3", "[5, 31]"]]
    assert "cohort.minimum (4) is larger than cohort.size (3)" in grid.left_out[0].why
    expected = [
        load_job(HOSPITALS, ["cohort.minimum=4", f'data.columns."mean radius".range={r}'])
        for r in ("[5, 30]", "[5,31]")
    ]
    assert [run.job.hash for run in grid.runs] == [job.hash for job in expected]


def test_repetitions_alone_are_a_sweep_and_the_first_is_the_job_itself() -> None:
    from strategies.job import load_job

    grid = grid_of(HOSPITALS, [], [], repeat=3)
    assert [run.name for run in grid.runs] == ["seed-7", "seed-8", "seed-9"]
    assert grid.runs[0].job.hash == load_job(HOSPITALS).hash
    assert grid.runs[2].job.hash == load_job(HOSPITALS, ["seed=9"]).hash


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (["strategy.name", "privacy.record.epsilon"], ["name", "epsilon"]),
        (["privacy.client.epsilon", "privacy.record.epsilon"], ["client.epsilon", "record.epsilon"]),
        (["name", "strategy.name"], ["name", "strategy.name"]),
    ],
)
def test_a_key_is_called_by_as_few_of_its_last_parts_as_tell_it_from_the_others(
    keys: list[str], labels: list[str]
) -> None:
    grid = grid_of(HOSPITALS, [], [f"{key}=none" for key in keys], repeat=1)
    assert list(grid.labels.values()) == labels


@given(st.lists(texts.filter(lambda text: text.strip()), min_size=1, max_size=6, unique=True))
@example(["a", "A"])  # One folder on some disks.
def test_folder_names_are_safe_and_differ(purposes: list[str]) -> None:
    from simulations.sweep import LONGEST_NAME, SweepRun, _named

    job = grid_of(HOSPITALS, [], [], repeat=1).runs[0].job
    runs = [SweepRun("", {"purpose": json.dumps(purpose * 30)}, job) for purpose in purposes]
    names = [run.name for run in _named(runs, {"purpose": "purpose"}, 1)]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
        assert len(name) <= LONGEST_NAME + 3


def test_a_setting_without_a_safe_letter_still_has_a_folder() -> None:
    from simulations.sweep import SweepRun, _named

    job = grid_of(HOSPITALS, [], [], repeat=1).runs[0].job
    runs = [SweepRun("", {"北": value}, job) for value in ("東", "西")]
    assert [run.name for run in _named(runs, {"北": "北"}, 1)] == ["run", "run-2"]


# --- what cannot run ------------------------------------------------------------------------------------------------

BAD_INPUT: list[tuple[Sequence[str], Sequence[str]]] = [
    (["--sweep", "strategy.name"], ["--sweep strategy.name", "KEY=V1,V2"]),
    (["--sweep", "training.rounds=1,"], ["KEY=V1,V2"]),
    (["--sweep", "training.rounds=2,3", "--sweep", "training.rounds=4"], ["training.rounds", "twice"]),
    (["--sweep", "training.rounds=2,2"], ["rounds=2 and rounds=2", "same job"]),
    (["--sweep", "training.learning_rate=2,2.0"], ["learning_rate=2 and learning_rate=2.0", "same job"]),
    (["--sweep", "seed=1,2", "--repeat", "2"], ["--sweep seed and --repeat"]),
    (["--repeat", "10001"], ["10,001 runs", "10,000"]),
    (["--sweep", "strategy.weighting=rows,rwos"], ["weighting=rwos: ", "rows", "--skip-invalid runs the others"]),
    (["--sweep", "training.ruonds=2,3"], ["ruonds=2: ", "training.rounds", "(and 1 more)", "no combination can run"]),
    (["--sweep", "training.rounds=0,-1", "--skip-invalid"], ["rounds=0: ", "(and 1 more)", "no combination can run"]),
    (["--sweep", "training.rounds=2,3", "--after", "run"], ["--after", "--sweep"]),
    (["--repeat", "2", "--track", "tensorboard"], ["--track", "fedchorus track"]),
    (["--repeat", "0"], ["--repeat 0", "1 or more"]),
    (["--repeat", "2", "--jobs", "-1"], ["--jobs -1", "1 or more"]),
    (["--jobs", "2"], ["--jobs", "--sweep or --repeat"]),
    (["--skip-invalid"], ["--skip-invalid", "--sweep or --repeat"]),
    (["--sweep", "training.rounds=1," + "9" * 5000], ["training.rounds"]),
    (["--sweep", "strategy.name=" + "[" * 3000 + "]" * 3000], ["strategy.name"]),
    (["--sweep", "purpose=\udcff,b"], ["purpose"]),
    (["absent.toml", "--repeat", "2"], ["absent.toml", "no such job file"]),
    (["hospitls", "--repeat", "2"], ["hospitls", "hospitals"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT, ids=[ascii(" ".join(a))[:60] for a, _ in BAD_INPUT])
def test_a_mistake_gets_one_line_that_names_it_and_leaves_nothing_behind(
    arguments: Sequence[str], words: Sequence[str], tmp_path: Path
) -> None:
    done = fedchorus("simulate", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_combination_that_its_data_refuse_is_found_before_anything_runs(tmp_path: Path) -> None:
    sweeps, workers = ["cohort.minimum=1,9", "training.rounds=2,3"], Inline()
    with pytest.raises(JobError, match=r"^minimum=9, rounds=2: cohort.minimum is 9.*and 1 more.*--skip-invalid runs"):
        sweep(grid_of(HOSPITALS, PLAIN, sweeps, repeat=2), tmp_path / "sweep", workers=workers)
    assert [what for what, _ in workers.asked] == ["check"] * 4
    assert list(tmp_path.iterdir()) == []


def test_the_others_run_if_that_is_wished_and_what_was_left_out_is_listed(tmp_path: Path) -> None:
    # With a multiplier too, epsilon = 1 is the limit of the budget.
    grid = grid_of(
        HOSPITALS, ["simulation.baselines=false", "training.rounds=1"],
        ["privacy.record.noise_multiplier=5.0,0.9", "cohort.minimum=0,1,9"], repeat=1,
    )  # fmt: skip
    told: list[str] = []
    swept = sweep(grid, tmp_path / "sweep", skip_invalid=True, watcher=SweepWatcher(tell=told.append))
    assert swept is not None
    expected = {
        "noise_multiplier=5.0, minimum=0": "cohort.minimum",
        "noise_multiplier=0.9, minimum=0": "cohort.minimum",
        "noise_multiplier=5.0, minimum=9": "5 sites",
        "noise_multiplier=0.9, minimum=1": "limit is 1",
        "noise_multiplier=0.9, minimum=9": "5 sites",
    }
    for line, (title, why) in zip(told, expected.items(), strict=False):
        assert line.startswith(f"left out {title}: ")
        assert why in line
    assert len(told) == 6
    (name,) = swept.summaries
    assert [path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()] == [name]
    recorded = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(recorded["runs"]) == 4
    assert [one["settings"] for one in recorded["left_out"]] == [dict(one.settings) for one in swept.left_out]
    (row,) = Comparison.of(swept).rows
    assert row.epsilon_record == swept.summaries[name]["epsilon"]["record"] is not None


# --- running, and running again -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Two learning rates over two seeds. Never changed: tests take a copy."""
    grid = grid_of(HOSPITALS, PLAIN, ["training.learning_rate=0.1,2"], repeat=2)
    swept = sweep(grid, tmp_path_factory.mktemp("swept") / "sweep")
    assert swept is not None
    return swept


def test_each_run_is_an_ordinary_run_folder_and_the_same_run_as_alone(finished: Swept, tmp_path: Path) -> None:
    assert set(finished.summaries) == {run.name for run in finished.grid.runs}
    run = finished.grid.runs[3]
    overrides = [word for setting in [*PLAIN, "training.learning_rate=2", "seed=8"] for word in ("--set", setting)]
    assert fedchorus("simulate", "--out", "alone", *overrides, cwd=tmp_path).returncode == 0
    here, alone = finished.path / run.name, tmp_path / "alone"
    assert {path.name for path in alone.iterdir()} == {path.name for path in here.iterdir()}
    metrics = [json.loads((folder / "summary.json").read_text())["metrics"] for folder in (here, alone)]
    assert metrics[0] == metrics[1]
    assert (here / "job.toml").read_bytes() == (alone / "job.toml").read_bytes()


def test_the_comparison_is_what_the_summaries_say(finished: Swept) -> None:
    compared = Comparison.of(finished)
    assert [dict(row.settings) for row in compared.rows] == [{"training.learning_rate": v} for v in ("0.1", "2")]
    for row, runs in zip(compared.rows, finished.grid.combinations(), strict=True):
        summaries = [json.loads((finished.path / run.name / "summary.json").read_text()) for run in runs]
        reached = [summary["metrics"]["accuracy"] for summary in summaries]
        assert (row.finished, row.asked) == (2, 2)
        assert row.mean == pytest.approx(statistics.fmean(reached))
        assert row.deviation == pytest.approx(abs(reached[0] - reached[1]) / 2**0.5)
        worst = [min(site["accuracy"] for site in summary["sites"].values()) for summary in summaries]
        assert row.worst_site == pytest.approx(statistics.fmean(worst))
        assert row.epsilon_record is None
        assert row.upload_bytes == 4 * (31 + 1 + 2)  # The model, the weight, the loss and the number of examples.


def test_one_line_a_run_says_how_far_the_sweep_is(finished: Swept, tmp_path: Path) -> None:
    told: list[str] = []
    path = tmp_path / "sweep"
    shutil.copytree(finished.path, path)
    shutil.rmtree(path / finished.grid.runs[1].name)
    assert sweep(finished.grid, path, watcher=SweepWatcher(tell=told.append)) is not None
    accuracy = f"{finished.summaries[finished.grid.runs[1].name]['metrics']['accuracy']:.1%}"
    assert told[0] == "kept 3 finished runs of 4"
    assert re.fullmatch(rf"4/4  learning_rate=0\.1, seed=8: accuracy {accuracy}, \d+\.\d s", told[1])
    assert len(told) == 2


def test_the_same_sweep_again_keeps_finished_runs_and_asks_nobody(finished: Swept, tmp_path: Path) -> None:
    path, workers = tmp_path / "sweep", Inline()
    shutil.copytree(finished.path, path)
    again = sweep(finished.grid, path, workers=workers)
    assert again is not None
    assert workers.asked == []
    assert again.summaries == finished.summaries


def test_a_sweep_that_was_stopped_goes_on_where_it_ended(tmp_path: Path) -> None:
    grid = grid_of(HOSPITALS, [*NOISE, "training.rounds=3"], ["training.learning_rate=1,2"], repeat=1)
    path, questions = tmp_path / "sweep", iter([False] * 4 + [True] * 9)
    # Asked before each check, before the run and after its rounds: it ends after its first round.
    assert sweep(grid, path, watcher=SweepWatcher(stop=lambda: next(questions))) is None
    first, second = (path / run.name for run in grid.runs)
    lines = (first / "metrics.jsonl").read_bytes()
    assert 1 <= lines.count(b"\n") < 3
    assert not second.exists()
    ledgers = {file.name: file.read_bytes() for file in (first / "ledgers").iterdir()}
    workers = Inline()
    swept = sweep(grid, path, workers=workers)
    assert swept is not None
    assert workers.asked == [("check", second.name), ("run", first.name), ("run", second.name)]
    assert (first / "metrics.jsonl").read_bytes().startswith(lines)
    for name, old in ledgers.items():
        assert (first / "ledgers" / name).read_bytes().startswith(old), "what was spent did not stay spent"
    assert [summary["rounds"] for summary in swept.summaries.values()] == [3, 3]


@pytest.mark.parametrize("left", [{"job.toml": b""}, {"job.toml": None, "plans.json": b"{}"}], ids=["empty", "half"])
def test_a_run_that_was_killed_before_it_released_anything_begins_anew(
    left: Mapping[str, bytes | None], finished: Swept, tmp_path: Path
) -> None:
    path = tmp_path / "sweep"
    shutil.copytree(finished.path, path)
    broken = path / finished.grid.runs[0].name
    shutil.rmtree(broken)
    broken.mkdir()
    for name, content in left.items():
        (broken / name).write_bytes(finished.grid.runs[0].job.toml if content is None else content)
    swept = sweep(finished.grid, path)
    assert swept is not None
    assert swept.failed == {}
    assert swept.summaries[broken.name]["metrics"] == finished.summaries[broken.name]["metrics"]


def test_a_run_that_fails_is_told_once_and_the_others_go_on(finished: Swept, tmp_path: Path) -> None:
    path, told = tmp_path / "sweep", list[str]()
    shutil.copytree(finished.path, path)
    first, last = finished.grid.runs[0].name, finished.grid.runs[3].name
    (path / first / "summary.json").unlink()
    (path / first / "metrics.jsonl").write_bytes(b"damaged\n")
    shutil.rmtree(path / last)
    swept = sweep(finished.grid, path, watcher=SweepWatcher(tell=told.append))
    assert swept is not None
    assert list(swept.failed) == [first]
    assert "metrics.jsonl is damaged" in swept.failed[first]
    assert [line.partition(":")[0] for line in told[1:]] == [
        "3/4  learning_rate=0.1, seed=7",
        "4/4  learning_rate=2, seed=8",
    ]
    assert last in swept.summaries
    rows = list(csv.DictReader(csv_text(Comparison.of(swept)).splitlines()))
    assert [row["state"] for row in rows] == ["failed", "finished", "finished", "finished"]
    assert Comparison.of(swept).rows[0].deviation is None


def put_another_job(path: Path, swept: Swept) -> None:
    (path / swept.grid.runs[0].name / "summary.json").unlink()
    (path / swept.grid.runs[0].name / "job.toml").write_bytes(swept.grid.runs[1].job.toml)


def test_another_job_in_a_runs_folder_is_not_touched(finished: Swept, tmp_path: Path) -> None:
    path, name = tmp_path / "sweep", finished.grid.runs[0].name
    shutil.copytree(finished.path, path)
    put_another_job(path, finished)
    before = sorted(file.name for file in (path / name).iterdir())
    swept = sweep(finished.grid, path)
    assert swept is not None
    assert "holds a run of another job" in swept.failed[name]
    assert sorted(file.name for file in (path / name).iterdir()) == before
    shutil.copy(path / finished.grid.runs[1].name / "summary.json", path / name / "summary.json")
    with pytest.raises(RunError, match="another job than the sweep's"):
        sweep(finished.grid, path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sweep.json", "[]", "sweep.json is damaged"),
        ("sweep.json", '{"v": 1, "keys": [], "runs": {}}', "holds another sweep"),
        ("notes.txt", "mine", "neither a sweep nor an empty folder"),
        ("job.toml", "", "neither a sweep nor an empty folder"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    name: str, content: str, words: str, finished: Swept, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    workers = Inline()
    with pytest.raises(RunError, match=words):
        sweep(finished.grid, tmp_path, workers=workers)
    assert workers.asked == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_sweep_with_other_values_is_another_sweep(finished: Swept) -> None:
    other = grid_of(HOSPITALS, PLAIN, ["training.learning_rate=0.1,3"], repeat=2)
    with pytest.raises(RunError, match="holds another sweep"):
        sweep(other, finished.path)


def test_two_processes_never_run_the_same_sweep(finished: Swept) -> None:
    from privacy.record_folder import RecordFolder

    with RecordFolder(finished.path).locked(), pytest.raises(RunError, match="another process"):
        sweep(finished.grid, finished.path)


# --- what is shown --------------------------------------------------------------------------------------------------


def made(grid: Grid, accuracies: Sequence[float | None], **more: Any) -> Swept:
    """A sweep with these figures; None is a run that failed."""
    summaries = {
        run.name: {
            "metrics": {"loss": 0.5, "accuracy": accuracy},
            "sites": {"a": {"accuracy": accuracy}, "b": {"accuracy": accuracy - 0.25}},
            "personal": None,
            "epsilon": {"record": 1.0 + accuracy, "client": None},
            "secure_aggregation": {"upload_bytes": 2300.0},
            "seconds": 4.0,
            **more,
        }
        for run, accuracy in zip(grid.runs, accuracies, strict=True)
        if accuracy is not None
    }
    failed = {run.name: "gone" for run in grid.runs if run.name not in summaries}
    return Swept(Path("swept"), grid, grid.left_out, summaries, failed)


def epsilons(*values: str, repeat: int = 2) -> Grid:
    sweeps = [f"privacy.record.epsilon={','.join(values)}", "strategy.name=fedavg,fedprox"]
    return grid_of(HOSPITALS, [], sweeps, repeat=repeat)


def test_the_figures_of_a_small_sweep_checked_by_hand() -> None:
    compared = Comparison.of(made(epsilons("1", "8"), [0.5, 0.75, 0.5, None, 0.875, 0.625, None, None]))
    cells = [[form(row) for form in compared.columns().values()] for row in compared.rows]
    assert list(compared.columns()) == ["runs", "Accuracy", "worst site", "epsilon spent", "KB up", "seconds"]
    assert cells == [
        ["2/2", "62.5% ± 17.7%", "37.5%", "1.75", "2.3", "4.0"],
        ["1/2", "50.0%", "25.0%", "1.50", "2.3", "4.0"],
        ["2/2", "75.0% ± 17.7%", "50.0%", "1.88", "2.3", "4.0"],
        ["0/2", "-", "-", "-", "-", "-"],
    ]
    assert any("these" not in note and "5 runs at the price of one" in note for note in compared.notes)
    assert json.loads(json.dumps(compared.record(), allow_nan=False))["comparison"][0]["mean"] == 0.625


def test_the_price_of_many_tries_is_said_where_any_run_is_private() -> None:
    figures = [0.5] * 8
    public = made(epsilons("1", "8"), figures, epsilon={"record": None, "client": None})
    assert "add up" in render_sweep(Comparison.of(made(epsilons("1", "8"), figures)))
    assert "add up" not in render_sweep(Comparison.of(public))


def test_a_run_that_defines_no_figure_is_in_no_mean_and_is_told_of() -> None:
    swept = made(grid_of(HOSPITALS, [], [], repeat=3), [0.5, 0.75, 0.5])
    next(iter(swept.summaries.values()))["metrics"]["accuracy"] = None
    compared = Comparison.of(swept)
    assert compared.metric.name == "accuracy"
    assert compared.rows[0].mean == 0.625
    assert "Runs in which Accuracy is not defined, so that no mean has them: 1." in compared.notes
    assert not [note for note in Comparison.of(made(epsilons("1"), [0.5] * 4)).notes if "no mean has them" in note]


def test_of_an_error_the_worst_site_is_the_largest() -> None:
    grid = grid_of(HOSPITALS, [], [], repeat=2)
    sites = {"a": {"rmse": 2.0}, "b": {"rmse": 3.0}, "c": {"rmse": None}}
    compared = Comparison.of(made(grid, [0.5, 0.5], metrics={"rmse": 2.5}, sites=sites))
    assert compared.metric == HEADLINES[3]
    assert compared.rows[0].worst_site == 3.0


def test_the_csv_has_one_row_a_run_with_its_settings_and_metrics() -> None:
    grid = replace(epsilons("1", "8", repeat=1), left_out=[])
    skipped = LeftOut(grid.runs[3].settings, "no")
    swept = replace(made(grid, [0.5, None, 0.75, None]), left_out=[skipped])
    rows = list(csv.DictReader(csv_text(Comparison.of(swept)).splitlines()))
    assert [(r["privacy.record.epsilon"], r["strategy.name"], r["state"], r["accuracy"]) for r in rows] == [
        ("1", "fedavg", "finished", "0.5"),
        ("1", "fedprox", "failed", ""),
        ("8", "fedavg", "finished", "0.75"),
        ("8", "fedprox", "left out", ""),
    ]
    assert rows[0] == {**rows[0], "seed": "7", "worst_site_accuracy": "0.25", "epsilon_record": "1.5"}
    assert rows[0] == {**rows[0], "upload_bytes": "2300.0", "seconds": "4.0", "run": "epsilon-1_name-fedavg"}


def drawn(compared: Comparison) -> ElementTree.Element:
    return ElementTree.fromstring(picture(compared))


def points(root: ElementTree.Element, line: str) -> list[tuple[float, float]]:
    (group,) = [group for group in root.iter("g") if (group.findtext("title") or "") == line]
    return [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in group.iter("circle")]


def test_the_picture_has_a_line_for_each_other_setting_over_the_first_key_of_numbers() -> None:
    accuracies = [0.5, 0.75, 0.5, 0.5, 0.875, 0.625, 0.75, 0.75]
    root = drawn(Comparison.of(made(epsilons("1", "8"), accuracies)))
    fedavg, fedprox = points(root, "fedavg"), points(root, "fedprox")
    assert len(fedavg) == len(fedprox) == 2
    assert fedavg[0][0] < fedavg[1][0]
    assert fedavg[0][1] > fedavg[1][1]  # Up is better, and SVG counts from the top.
    assert fedprox[0][1] > fedavg[0][1]
    paths = {g.findtext("title"): len(g.findall("path")) for g in root.iter("g")}
    assert paths == {"fedavg": 2, "fedprox": 1}  # Equal seeds have no error bars.
    texts = {text.text for text in root.iter("text")}
    assert {"1", "8", "epsilon", "fedavg", "fedprox"} <= texts


@pytest.mark.parametrize(("numbers", "middle"), [(("1", "3", "5"), 0.5), (("1", "10", "100"), 0.5), (("1", "4"), None)])
def test_numbers_that_are_far_apart_stand_on_a_logarithmic_axis(numbers: tuple[str, ...], middle: float | None) -> None:
    root = drawn(Comparison.of(made(epsilons(*numbers, repeat=1), [0.5, 0.6] * len(numbers))))
    places = [x for x, _ in points(root, "fedavg")]
    if middle is not None:
        assert (places[1] - places[0]) / (places[2] - places[0]) == pytest.approx(middle, abs=0.01)


def test_none_stands_apart_and_no_line_leads_to_it() -> None:
    sweeps = ["training.schedule.warmup=1,2,none"]
    root = drawn(Comparison.of(made(grid_of(HOSPITALS, [], sweeps, repeat=1), [0.5, 0.6, 0.7])))
    places = points(root, "all runs")
    assert len(places) == 3
    (line,) = [path.attrib["d"] for path in root.iter("path") if "line" in path.attrib["class"]]
    assert line.count("L") == 1
    assert f"{places[2][0]:.1f}," not in line


@pytest.mark.parametrize("names", ["fedavg,fedprox", "fedavg,scaffold,fednova,feddyn"])
def test_without_numbers_there_is_a_bar_for_each_combination(names: str) -> None:
    grid = grid_of(HOSPITALS, ["privacy.record=none"], [f"strategy.name={names}"], repeat=1)
    root = drawn(Comparison.of(made(grid, [0.5] * len(grid.runs))))
    assert len(list(root.iter("rect"))) == len(grid.runs)


SMALL = epsilons("1", "8")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.none() | st.floats(0, 1), min_size=8, max_size=8))
def test_the_page_is_whole_whatever_failed(accuracies: list[float | None]) -> None:
    swept = made(SMALL, accuracies)
    text = render_sweep(Comparison.of(swept))
    (svg,) = re.findall(r"<svg.*</svg>", text, flags=re.DOTALL)
    for number in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width)="([^"]*)"', svg):
        assert float(number) > -100
    assert ElementTree.fromstring(svg).attrib["role"] == "img"
    assert re.findall(r'href="([^"]*)"', text) == [f"{name}/report.html" for name in swept.summaries]
    assert text.count("failed: gone") == len(swept.failed)
    assert "default-src &#x27;none&#x27;" in text
    assert "<script" not in text


def test_a_setting_of_a_strange_name_is_a_text_on_the_page() -> None:
    hostile = """<script>alert('1')</script>"""
    grid = replace(SMALL, labels=dict.fromkeys(SMALL.keys, hostile))
    assert "<script" not in render_sweep(Comparison.of(made(grid, [0.5] * 8)))


# --- processes ------------------------------------------------------------------------------------------------------

TOY = """
import json, os, signal, subprocess, sys, time
for line in sys.stdin:
    request = json.loads(line)
    does, answer = request.get("path"), {"ended": "done", "why": str(os.getpid())}
    if does == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "exits":
        sys.exit(3)
    if does == "babbles":
        answer = ["nothing"]
    if does == "waits":
        assert json.loads(sys.stdin.readline()) == {"what": "stop"}
        answer["ended"] = "stopped"
    if does == "hangs":
        child = subprocess.Popen(["sleep", "1000"])
        print(json.dumps({"ended": "done", "why": f"{os.getpid()} {child.pid}"}), flush=True)
        continue
    time.sleep(0.05)
    print(json.dumps(answer), flush=True)
"""
JOB = SMALL.runs[0].job


def toys(number: int) -> Processes:
    return Processes(number, child=[sys.executable, "-c", TOY])


def asked(*what: str) -> list[Request]:
    return [Request("run", JOB, Path(path)) for path in what]


def lives(process: int) -> bool:
    """Whether it is there and no zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def await_that(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_as_many_processes_as_asked_for_answer_every_request_once() -> None:
    paths = [f"run-{i}" for i in range(7)]
    with toys(2) as workers:
        found = {str(request.path): answer for request, answer in workers.answers(asked(*paths), stop=lambda: False)}
    assert sorted(found) == sorted(paths)
    assert {answer.ended for answer in found.values()} == {"done"}
    assert len({answer.why for answer in found.values()}) == 2


@pytest.mark.parametrize(
    ("how", "why"), [("dies", "was killed by SIGKILL"), ("exits", "ended with exit code 3"), ("babbles", "was killed")]
)
def test_a_process_that_dies_or_babbles_fails_its_own_run_alone(how: str, why: str) -> None:
    with toys(1) as workers:
        found = [(str(request.path), answer) for request, answer in workers.answers(
            asked("a", how, "b", "c"), stop=lambda: False)]  # fmt: skip
    assert [path for path, _ in found] == ["a", how, "b", "c"]
    assert [answer.ended for _, answer in found] == ["done", "failed", "done", "done"]
    assert why in found[1][1].why
    assert found[0][1].why != found[2][1].why == found[3][1].why


def test_an_idle_process_that_dies_is_replaced() -> None:
    with toys(1) as workers:
        ((_, first),) = workers.answers(asked("a"), stop=lambda: False)
        os.kill(int(first.why), signal.SIGKILL)
        await_that(lambda: not lives(int(first.why)))
        ((_, second),) = workers.answers(asked("b"), stop=lambda: False)
    assert second.ended == "done"
    assert second.why != first.why


def test_a_wish_to_stop_reaches_those_that_run_and_begins_no_more() -> None:
    wishes = iter([False, False, False])
    began = time.monotonic()
    with toys(2) as workers:
        found = list(workers.answers(asked("waits", "waits", "a", "b"), stop=lambda: next(wishes, True)))
    assert [answer.ended for _, answer in found] == ["stopped", "stopped"]
    assert time.monotonic() - began < 20 * POLL_S


def test_leaving_the_context_kills_every_process_and_what_it_started() -> None:
    with toys(1) as workers:
        ((_, answer),) = workers.answers(asked("hangs"), stop=lambda: False)
        processes = [int(process) for process in answer.why.split()]
        assert all(map(lives, processes))
    await_that(lambda: not any(map(lives, processes)))


def test_what_cannot_be_started_is_said() -> None:
    with Processes(1, child=["/absent/python"]) as workers, pytest.raises(RunError, match="/absent/python"):
        list(workers.answers(asked("a"), stop=lambda: False))


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    tells = 'import json, os; input(); print(json.dumps({"ended": "done", "why": os.environ["OMP_NUM_THREADS"]}))'
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("simulations.sweep_workers.cores", lambda: 8)
    for number, threads in ((8, "1"), (3, "2"), (1, "8"), (20, "1")):
        with Processes(number, child=[sys.executable, "-c", tells]) as workers:
            ((_, answer),) = workers.answers(asked("a"), stop=lambda: False)
        assert answer.why == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with Processes(2, child=[sys.executable, "-c", tells]) as workers:
        ((_, answer),) = workers.answers(asked("a"), stop=lambda: False)
    assert answer.why == "5"


def test_a_child_kills_itself_when_its_parent_is_gone() -> None:
    with subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(timeout=60) == -signal.SIGKILL


def test_a_child_kills_itself_when_its_parent_went_in_the_middle_of_a_request() -> None:
    with subprocess.Popen(
        CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as child:
        assert child.stdin is not None
        child.stdin.write(b'{"what": "ru')
        child.stdin.close()
        assert child.wait(timeout=60) == -signal.SIGKILL


def test_a_child_answers_a_job_that_is_none_with_the_reason() -> None:
    answer = answer_to({"what": "check", "job": "name = 1", "path": "here"}, stop=lambda: False)
    assert answer.ended == "failed"
    assert answer.why.startswith("here: ")


def test_ctrl_c_ends_after_the_round_leaves_no_process_and_the_same_command_goes_on(tmp_path: Path) -> None:
    rounds = ["training.rounds=2000", "simulation.baselines=false", "privacy.record=none"]
    mark = f"FEDCHORUS_TEST_SWEEP={os.getpid()}-{time.time_ns()}"
    arguments = [word for setting in rounds for word in ("--set", setting)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedchorus", "simulate", *arguments, "--repeat", "2", "--jobs", "1", "--out", "sweep"],
        cwd=tmp_path, env={**os.environ, **dict([mark.split("=")])}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    metrics = tmp_path / "sweep" / "seed-7" / "metrics.jsonl"
    await_that(lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out.splitlines()[-1] == "stopped; go on with: the same command with --out sweep"
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if mark.encode() in environment(path)]
    finished_rounds = metrics.read_bytes()
    assert 1 <= finished_rounds.count(b"\n") < 2000
    assert not (tmp_path / "sweep" / "seed-8").exists()
    grid = grid_of(HOSPITALS, rounds, [], repeat=2)
    questions = iter([False] * 3)
    assert sweep(grid, tmp_path / "sweep", watcher=SweepWatcher(stop=lambda: next(questions, True))) is None
    assert metrics.read_bytes().startswith(finished_rounds)
    assert metrics.read_bytes() != finished_rounds


def environment(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def test_the_command_ends_with_one_json_object_and_code_1_where_a_run_failed(
    finished: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.path, tmp_path / "sweep")
    overrides = [word for setting in PLAIN for word in ("--set", setting)]
    command = ["simulate", *overrides, "--sweep", "training.learning_rate=0.1,2", "--repeat", "2", "--out", "sweep"]
    done = fedchorus(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {key: len(said[key]) for key in ("comparison", "runs", "failed", "left_out")} == {
        "comparison": 2, "runs": 4, "failed": 0, "left_out": 0,
    }  # fmt: skip
    assert "kept 4 finished runs of 4" in done.stderr
    assert "learning_rate" in done.stderr
    assert {"sweep.csv", "sweep.html"} <= {path.name for path in (tmp_path / "sweep").iterdir()}
    shutil.rmtree(tmp_path / "sweep" / finished.grid.runs[2].name)
    dying = partial(Processes, child=[sys.executable, "-c", "input()"])
    monkeypatch.setattr("simulations.sweep_workers.Processes", dying)
    done = fedchorus(*command, "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["failed"] == {
        finished.grid.runs[2].name: "its process ended with exit code 0; fewer --jobs need less memory, and the run by "
        "itself shows more"
    }
    assert "the same command with --out sweep" in done.stderr
