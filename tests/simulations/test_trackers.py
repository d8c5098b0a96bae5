"""Runs written into experiment trackers, and read back by the trackers' own readers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedchorus import main
from privacy.errors import RunError
from privacy.record_folder import RecordFolder
from simulations import trackers
from simulations.report import MANY_SITES
from simulations.scenarios import scenario_path
from simulations.simulate import Watcher, start_run
from simulations.trackers import Choice, Kind, Public, Start, Tracking, choices, of_run, track_run
from strategies.job import check_job, load_job, stored_job

QUICK = [
    "training.rounds=3",
    "simulation.baselines=false",
    'simulation.noise="seeded"',
    "privacy.record.epsilon=none",
    "privacy.record.noise_multiplier=4.0",
]
CLIENT_LEVEL = [
    "training.rounds=2",
    "simulation.baselines=false",
    'simulation.noise="seeded"',
    "privacy.record=none",
    "privacy.client={noise_multiplier=4.0, delta=0.01, clip_norm=1.0}",
    'strategy.weighting="equal"',
]
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def simulated(out: Path, *settings: str, watcher: Watcher | None = None) -> dict[str, Any]:
    job = load_job(scenario_path("hospitals"), [*(settings or QUICK)])
    summary = start_run(job, out=out, parent=out.parent, watcher=watcher or Watcher(), now=NOW)
    assert summary is not None
    return summary


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    simulated(run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the package {module} is not installed")


class Noted:
    """A tracker that keeps what it gets, and fails where it is told to."""

    shown_by = "noted"

    def __init__(self, start: Start, where: str | None) -> None:
        self.start, self.where = start, where
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[tuple[dict[str, float], dict[str, str], bool]] = []

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.logged.append((step, dict(figures)))

    def end(self, figures: Mapping[str, float], texts: Mapping[str, str], *, finished: bool) -> None:
        self.ended.append((dict(figures), dict(texts), finished))


Plant = Callable[..., list[Noted]]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Makes the tracker `tensorboard` one of these, which raises `error` in the part `at`."""

    def planted(at: str = "", error: BaseException | None = None) -> list[Noted]:
        made: list[Noted] = []

        def fails(*_: Any, **__: Any) -> None:
            assert error is not None
            raise error

        def opened(start: Start, where: str | None) -> Noted:
            if at == "open":
                fails()
            made.append(Noted(start, where))
            if at in ("log", "end"):
                setattr(made[-1], at, fails)
            return made[-1]

        monkeypatch.setitem(trackers.KINDS, "tensorboard", Kind(opened, "FOLDER"))
        return made

    return planted


FIGURE = st.floats(allow_nan=True) | st.none() | st.integers(-5, 5)
SITE = st.from_regex(r"site-[a-z]{1,8}", fullmatch=True)
LINES = st.builds(
    lambda n, top, sites, spent, there, secure: {
        "round": n,
        **top,
        "worst_site": next(iter(sites), None),
        "sites": sites,
        "epsilon": spent,
        "epsilon_client": 1.5,
        "contributors": there,
        "failures": dict.fromkeys(there, "away"),
        "seconds": 0.1,
        "secure": secure,
    },
    n=st.integers(1, 99),
    top=st.dictionaries(st.sampled_from(["loss", "accuracy", "training_loss"]), FIGURE),
    sites=st.dictionaries(SITE, st.dictionaries(st.sampled_from(["loss", "auc", "rows"]), FIGURE), max_size=16),
    spent=st.dictionaries(SITE, st.floats(0, 9), max_size=16),
    there=st.lists(SITE, max_size=4),
    secure=st.none() | st.just({"upload_bytes": 3.0, "seconds": 0.1}),
)


@given(line=LINES, sites=st.booleans(), cohort=st.booleans())
def test_what_is_written_of_a_round_is_finite_and_says_no_more_than_may_be_said(
    line: dict[str, Any], sites: bool, cohort: bool
) -> None:
    figures = Public(sites=sites, cohort=cohort).of_round(line)
    assert all(math.isfinite(value) for value in figures.values())
    named = {name.split("/")[1] for name in figures if name.startswith("sites/")}
    assert named <= {*line["sites"], *line["epsilon"]}
    if not sites:
        assert "site-" not in json.dumps(figures)
    if not cohort:
        assert {name.partition("/")[0] for name in figures} <= {"metrics", "privacy", "personal", "sites"}
        assert not any("epsilon_record" in name for name in figures)
    for name in ("loss", "accuracy", "training_loss"):
        value = line.get(name)
        known = isinstance(value, int | float) and math.isfinite(value)
        assert figures.get(f"metrics/{name}") == (value if known else None)


def test_the_largest_epsilon_of_a_round_is_written_and_how_many_answered() -> None:
    line = {"round": 1, "epsilon": {"a": 0.5, "b": 0.75}, "contributors": ["a"], "failures": {"b": "away"}}
    assert Public(sites=True, cohort=True).of_round(line) == {
        "privacy/epsilon_record": 0.75,
        "cohort/contributors": 1.0,
        "cohort/failures": 1.0,
        "sites/a/epsilon_record": 0.5,
        "sites/b/epsilon_record": 0.75,
    }


@pytest.mark.parametrize(("sites", "written"), [(MANY_SITES, 2 * MANY_SITES), (MANY_SITES + 1, 0)])
def test_figures_of_sites_are_written_of_a_few_sites_alone(sites: int, written: int) -> None:
    names = [f"site-{number}" for number in range(sites)]
    line = {"round": 1, "sites": {name: {"auc": 0.5} for name in names}, "epsilon": dict.fromkeys(names, 1.0)}
    figures = Public(sites=True, cohort=True).of_round(line)
    assert sum(name.startswith("sites/") for name in figures) == written
    assert figures["privacy/epsilon_record"] == 1.0


def test_a_secret_cohort_and_client_level_privacy_are_read_from_the_job() -> None:
    path = scenario_path("hospitals")
    assert Public.of(load_job(path, QUICK)) == Public(sites=True, cohort=True)
    assert Public.of(load_job(path, CLIENT_LEVEL)) == Public(sites=False, cohort=True)
    sampled = [*CLIENT_LEVEL, "cohort.rate=0.5"]
    assert Public.of(load_job(path, sampled)) == Public(sites=False, cohort=False)


SECRET = [*CLIENT_LEVEL, "cohort.rate=0.5"]
BOTH_UNITS = [setting for setting in SECRET if setting != "privacy.record=none"]


@pytest.mark.parametrize("settings", [CLIENT_LEVEL, SECRET, BOTH_UNITS])
def test_nothing_of_a_site_is_written_of_a_run_under_client_level_privacy(
    settings: list[str], tmp_path: Path, plant: Plant
) -> None:
    made = plant()
    secret = "cohort.rate=0.5" in settings
    with Tracking([Choice("tensorboard", None)], pytest.fail) as tracking:
        summary = simulated(tmp_path / "run", *settings, watcher=tracking.beside(Watcher()))
        assert len(made) == (0 if secret else 1)  # The time between two rounds tells how many took part.
        tracking.conclude(summary)
    start, ended = made[0].start, made[0].ended[0]
    written = json.dumps([made[0].logged, ended, start.settings, start.texts])
    assert not [name for name in summary["sites"] if name in written]
    assert ended[1] == {}
    assert [step for step, _ in made[0].logged] == [1, 2]
    told = {name for _, figures in made[0].logged for name in figures} | set(ended[0])
    withheld = {name for name in told if name.startswith(("cohort/", "cost/"))} | {"final/seconds"} & told
    assert bool(withheld) != secret
    assert not (secret and any("epsilon_record" in name for name in told))
    assert ended[0]["final/epsilon_client"] == summary["epsilon"]["client"]
    assert start.settings["job_hash"] == summary["job_hash"]


def test_a_run_with_a_secret_cohort_that_was_stopped_is_written_when_it_was(tmp_path: Path, plant: Plant) -> None:
    made, seen = plant(), list[int]()
    job = load_job(scenario_path("hospitals"), [*SECRET, "training.rounds=4"])
    with Tracking([Choice("tensorboard", None)], pytest.fail) as tracking:
        watcher = tracking.beside(Watcher(round=lambda line: seen.append(line["round"]), stop=lambda: len(seen) == 2))
        assert start_run(job, out=tmp_path / "run", parent=tmp_path, watcher=watcher, now=NOW) is None
        assert made == []
        tracking.conclude(None)
    assert [step for step, _ in made[0].logged] == [1, 2]
    assert made[0].ended == [({}, {}, False)]


@given(
    summary=st.fixed_dictionaries(
        {}, optional={"epsilon": st.none() | st.just({"record": 2.5, "client": 0.5}), "seconds": st.just(9.0)}
    ),
    cohort=st.booleans(),
)
def test_the_end_of_a_run_tells_of_a_secret_cohort_neither_time_nor_record_level_epsilon(
    summary: dict[str, Any], cohort: bool
) -> None:
    figures = of_run({**summary, "epsilon_client": 0.5, "rounds": 3}, Public(sites=cohort, cohort=cohort))
    assert figures["final/epsilon_client"] == 0.5
    assert ("final/seconds" in figures) == (cohort and "seconds" in summary)
    assert ("final/epsilon_record" in figures) == (cohort and summary.get("epsilon") is not None)


PLACES = {
    "data.folder": "/home/someone/records",
    "data.bundled": None,
    "simulation.partition": None,
    "data.files": {"north-clinic": "north.csv", "south-clinic": "south.csv"},
    "data.target": "diagnosis",
    "data.positive": ["rare-illness"],
    "data.held_out": {"column": "enrolled-in", "values": [2020]},
    "training.work": {"north-clinic": 3},
    "task.model": "pretrained",
    "task.checkpoint": "/home/someone/models/small",
    "task.checkpoint_hash": "0" * 64,
    "task.tokenizer_hash": "0" * 64,
    "task.tuning": {"ranks": {"north-clinic": 2}, "calibration": "/home/someone/public.csv"},
    "regions": {"north": ["north-clinic"], "south": ["south-clinic"]},
}


@pytest.mark.parametrize("client_level", [False, True])
def test_settings_lead_to_no_file_and_name_no_column_and_a_site_only_where_sites_may_be_named(
    tmp_path: Path, plant: Plant, client_level: bool
) -> None:
    made = plant()
    raw = tomllib.loads(load_job(scenario_path("hospitals"), CLIENT_LEVEL if client_level else QUICK).toml.decode())
    column = next(iter(raw["data"]["columns"]))
    for key, value in PLACES.items():
        *above, last = key.split(".")
        table = raw
        for part in above:
            table = table[part]
        table.pop(last, None)
        table |= {} if value is None else {last: value}
    if client_level:  # Ranks cannot go with it.
        del raw["task"]["tuning"]["ranks"]
    job = check_job(raw, where="a job")
    (tmp_path / "job.toml").write_bytes(job.toml)  # The job's own text is known before its portable one is.
    track_run(tmp_path, [Choice("tensorboard", None)])
    start = made[0].start
    for told in (json.dumps(dict(start.settings)), start.texts["job.toml"]):
        assert not [word for word in ("/home", "north.csv", "diagnosis", "rare-", "enrolled", column) if word in told]
        assert ("north-clinic" in told) != client_level
    assert start.settings["job_hash"] == job.hash
    assert start.settings["task.checkpoint"] == "models:small"
    assert start.settings["task.tuning.calibration"] == "public.csv"
    assert start.settings["simulation.noise"] == "seeded"  # Which a job that travels does not say.
    read = tomllib.loads(start.texts["job.toml"])
    assert {"job_hash": job.hash, **dict(trackers._settings(read))} == start.settings


def test_groups_of_an_evaluation_are_columns_and_what_is_keyed_by_sites_goes_with_figures_of_sites() -> None:
    groups = {"evaluation": {"bins": 20, "groups": {"sex": {"values": ["f"]}}}}
    keyed = {
        "simulation": {"partition": {"mix": {"a": {"rows": 9}}}, "devices": {"old": {"share": 0.5}}},
        "task": {"tuning": {"ranks": {"a": 2}}},
        "training": {"weak": {"a": 0.5}, "work": {"a": 1}},
        "regions": {"north": ["a"]},
    }
    assert trackers._kept({**groups, **keyed}, Public(sites=True)) == {"evaluation": {"bins": 20}, **keyed}
    rest = {"evaluation": {"bins": 20}, "simulation": {"partition": {}}, "task": {"tuning": {}}, "training": {}}
    assert trackers._kept({**groups, **keyed}, Public(sites=False)) == rest


def test_a_run_that_goes_on_and_one_that_is_over_are_written_alike(tmp_path: Path, plant: Plant) -> None:
    made = plant()
    with Tracking([Choice("tensorboard", None)], pytest.fail) as tracking:
        summary = simulated(tmp_path / "run", watcher=tracking.beside(Watcher()))
        assert [step for step, _ in made[0].logged] == [1, 2, 3]  # Each as it was made, before the end.
        tracking.conclude(summary)
    track_run(tmp_path / "run", [Choice("tensorboard", None)])
    live, after = made
    assert live.logged == after.logged
    assert live.ended == after.ended
    assert live.start == after.start
    figures, texts, was_finished = live.ended[0]
    assert figures["final/accuracy"] == summary["metrics"]["accuracy"]
    assert figures["final/epsilon_record"] == summary["epsilon"]["record"]
    assert "Privacy statement" in texts["MODEL_CARD.md"]
    assert was_finished
    assert live.start.settings["training.rounds"] == "3"
    assert live.start.settings["job_hash"] == summary["job_hash"]
    assert not any(name.startswith("data.columns") for name in live.start.settings)


@pytest.mark.parametrize("at", ["open", "log", "end"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("user:password@host")])
def test_a_tracker_that_fails_is_said_once_and_changes_nothing(
    finished: Path, tmp_path: Path, plant: Plant, at: str, error: Exception
) -> None:
    plant(at, error)
    said: list[str] = []
    with Tracking([Choice("tensorboard", None)], said.append) as tracking:
        watcher = tracking.beside(Watcher())
        rounds = RecordFolder(finished).lines("metrics.jsonl")
        watcher.begin(finished, load_job(finished / "job.toml"))
        for line in rounds:
            watcher.round(line)
        assert tracking.conclude(RecordFolder(finished).read("summary.json")) == []
    assert len(said) == 1
    assert "password" not in said[0]
    assert f"fedchorus track {finished} tensorboard" in said[0]
    assert ("No space left" if isinstance(error, OSError) else "RuntimeError") in said[0]
    with pytest.raises(RunError, match="tensorboard failed"):
        track_run(finished, [Choice("tensorboard", None)])


def test_a_run_beside_a_failing_tracker_is_the_run_without_one(finished: Path, tmp_path: Path, plant: Plant) -> None:
    plant("log", RuntimeError())
    with Tracking([Choice("tensorboard", None)], lambda _: None) as tracking:
        tracking.conclude(simulated(tmp_path / "run", watcher=tracking.beside(Watcher())))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_what_interrupts_a_run_is_not_swallowed_and_the_tracker_is_closed(finished: Path, plant: Plant) -> None:
    made = plant("log", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), Tracking([Choice("tensorboard", None)], pytest.fail) as tracking:
        tracking.begin(finished, load_job(finished / "job.toml"))
    assert made[0].ended == [({}, {}, False)]


def test_a_job_that_was_fetched_is_written_from_its_summary(finished: Path, tmp_path: Path, plant: Plant) -> None:
    made = plant()
    shutil.copy(finished / "job.toml", tmp_path / "job.toml")
    summary = {"rounds": 3, "sites": ["a", "b"], "epsilon_client": 0.5, "secure_aggregation": True, "seconds": 2.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    track_run(tmp_path, [Choice("tensorboard", None)])
    assert made[0].logged == []
    assert made[0].ended == [({"final/epsilon_client": 0.5, "final/rounds": 3.0, "final/seconds": 2.5}, {}, True)]


def test_what_a_run_is_compared_with_is_written() -> None:
    summary = {"metrics": {"auc": 0.5}, "baselines": {"pooled": {"auc": 0.75, "sites": {"a": {"auc": 1.0}}}}}
    told = {"final/auc": 0.5, "baselines/pooled/auc": 0.75}
    assert of_run(summary, Public(sites=True, cohort=True)) == told


def test_tensorboard_reads_each_round_once_however_often_a_run_is_written(run: Path, tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = RecordFolder(run).lines("metrics.jsonl")
    for _ in range(2):
        assert track_run(run, choices(["tensorboard"])) == [f"tensorboard --logdir {run / 'tensorboard'}"]
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    loss = read.Scalars("metrics/loss")
    assert [event.step for event in loss] == [1, 2, 3]
    assert [event.value for event in loss] == pytest.approx([line["loss"] for line in lines])
    epsilon = read.Scalars("privacy/epsilon_record")
    assert epsilon[-1].value == pytest.approx(max(lines[-1]["epsilon"].values()))
    assert {"job.toml/text_summary", "MODEL_CARD.md/text_summary"} <= set(read.Tags()["tensors"])
    written = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert b"training.learning_rate" in written
    track_run(run, choices([f"tensorboard:{tmp_path / 'all'}"]))
    assert [path.name for path in (tmp_path / "all").iterdir()] == [f"run-{stored_job(run / 'job.toml').hash[:8]}"]


def test_mlflow_reads_settings_rounds_and_texts(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # A database takes longer to make than all of this file.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    track_run(run, choices(["mlflow"]))
    check_mlflow(run, (tmp_path / "store").as_uri())


@pytest.mark.slow
def test_mlflow_writes_into_a_database_of_the_run_where_nothing_else_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(run.parent)
    shown = track_run(run, choices(["mlflow"]))
    assert shown == [f"mlflow ui --backend-store-uri sqlite:///{run}/mlflow/mlflow.db"]
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    check_mlflow(run, f"sqlite:///{run}/mlflow/mlflow.db")


def check_mlflow(run: Path, address: str) -> None:
    from mlflow.tracking import MlflowClient

    client, lines = MlflowClient(tracking_uri=address), RecordFolder(run).lines("metrics.jsonl")
    experiment = client.get_experiment_by_name("hospitals")
    assert experiment is not None
    (written,) = client.search_runs([experiment.experiment_id])
    assert written.info.run_name == "run"
    assert written.info.status == "FINISHED"
    assert written.data.params["privacy.record.noise_multiplier"] == "4.0"
    assert written.data.metrics["final/accuracy"] == pytest.approx(lines[-1]["accuracy"])
    losses = client.get_metric_history(written.info.run_id, "metrics/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(line["round"], line["loss"]) for line in lines]
    assert {file.path for file in client.list_artifacts(written.info.run_id)} == {"job.toml", "MODEL_CARD.md"}


def test_mlflow_is_said_to_fail_where_its_server_is_gone_without_a_password(run: Path) -> None:
    needs("mlflow")
    with pytest.raises(RunError, match="mlflow failed") as told:
        track_run(run, choices(["mlflow:http://user:hunter2@127.0.0.1:9"]))
    assert "hunter2" not in str(told.value)


def test_wandb_keeps_a_run_offline_without_the_machine(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (shown,) = track_run(run, choices(["wandb:clinics"]))
    folder = Path(shown.removeprefix("wandb sync "))
    assert folder.parent == run / "wandb"
    lines = RecordFolder(run).lines("metrics.jsonl")
    deadline = time.monotonic() + 30.0
    while not (records := wandb_records(next(folder.glob("*.wandb")))) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, "the service has not written the end"  # It does so by itself.
        time.sleep(0.05)
    history = [
        {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [(row["_step"], row["metrics/loss"]) for row in history] == [(line["round"], line["loss"]) for line in lines]
    (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name, begun.host) == ("clinics", "run", "")
    assert "training.rounds" in {item.key for item in begun.config.update}
    assert not any(r.WhichOneof("record_type") in ("stats", "environment", "output_raw") for r in records)


def wandb_records(path: Path) -> list[Any]:
    """The file's records: after its head of 7 bytes, pieces in blocks of 32 KiB (checksum, length, kind), as LevelDB's
    logs have them; kind 1 is a whole record, 2 to 4 are the first, middle and last piece of one."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(whole))
            whole = b""
    return records


def command(monkeypatch: pytest.MonkeyPatch, cwd: Path, *arguments: str) -> int:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["fedchorus", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(str(end.value.code or 0))


def test_the_commands_write_a_run_live_and_afterwards(
    tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plant()
    settings = [part for setting in QUICK for part in ("--set", setting)]
    live = ["simulate", *settings, "--out", "run", "--json", "--track", "tensorboard:there"]
    assert command(monkeypatch, tmp_path, *live) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1])["rounds"] == 3
    assert "tracked noted" in told.err
    assert command(monkeypatch, tmp_path, "track", "run", "tensorboard") == 0
    assert capsys.readouterr().out == "noted\n"
    assert [one.where for one in made] == ["there", None]
    assert made[0].logged == made[1].logged


def test_a_run_that_is_resumed_is_written_from_its_first_round(
    tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    stopping = Watcher(round=lambda line: seen.append(line["round"]), stop=lambda: len(seen) == 2)
    job = load_job(scenario_path("hospitals"), QUICK)
    assert start_run(job, out=tmp_path / "run", parent=tmp_path, watcher=stopping, now=NOW) is None
    made = plant()
    assert command(monkeypatch, tmp_path, "resume", "run", "--track", "tensorboard") == 0
    assert [step for step, _ in made[0].logged] == [1, 2, 3]
    assert made[0].ended[0][2]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["tensorboad"], "choose one of tensorboard, mlflow, wandb"),
        ([""], "choose one of tensorboard, mlflow, wandb"),
        (["mlflow:"], "nothing follows the colon; write mlflow:URI or mlflow"),
        (["tensorboard", "tensorboard:elsewhere"], "given twice"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_by_name(asked: list[str], says: str) -> None:
    with pytest.raises(RunError, match=says):
        choices(asked)


def test_a_missing_package_is_named_with_its_extra_before_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command(monkeypatch, tmp_path, "simulate", "--out", "run", "--track", "wandb") == 1
    assert "pip install 'fedchorus[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_no_run_is_not_written(tmp_path: Path, plant: Plant) -> None:
    made = plant()
    with pytest.raises(RunError, match="no run folder"):
        track_run(tmp_path, [Choice("tensorboard", None)])
    assert made == []


HUGE = 10**400
DAMAGED: dict[str, tuple[str, dict[str, Any] | str | bytes]] = {
    "figures that are a list": ("summary.json", {"metrics": [1]}),
    "an epsilon without its units": ("summary.json", {"epsilon": 5}),
    "an epsilon as text": ("summary.json", {"epsilon": "1.5"}),
    "a comparison without figures": ("summary.json", {"baselines": {"a": 1}}),
    "a number that no float holds": ("summary.json", {"seconds": HUGE}),
    "a nest": ("summary.json", '{"a":' * 200_000 + "1" + "}" * 200_000),
    "half a file": ("summary.json", "{"),
    "a site that is a number": ("metrics.jsonl", {"round": 1, "sites": {"a": 5}}),
    "a site's epsilon as text": ("metrics.jsonl", {"round": 1, "epsilon": {"a": "much"}}),
    "a sum of epsilons": ("metrics.jsonl", {"round": 1, "epsilon": 5}),
    "a count of who took part": ("metrics.jsonl", {"round": 1, "contributors": 3}),
    "seconds that no float holds": ("metrics.jsonl", {"round": 1, "seconds": HUGE}),
    "a nest of rounds": ("metrics.jsonl", "[" * 200_000 + "]" * 200_000 + "\n"),
    "a card in no known letters": ("MODEL_CARD.md", b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_folder_is_named_in_one_line_before_anything_is_written(run: Path, plant: Plant, kind: str) -> None:
    made = plant()
    name, content = DAMAGED[kind]
    if isinstance(content, dict):
        content = json.dumps(content) + "\n"
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError) as told:
        track_run(run, [Choice("tensorboard", None)])
    assert str(told.value) == f"{run}: {name} is damaged"
    assert made == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
KEYS = ("metrics", "epsilon", "baselines", "sites", "personal", "secure", "contributors", "failures", "seconds", "loss")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.dictionaries(st.sampled_from(KEYS), JSON), name=st.sampled_from(["summary.json", "metrics.jsonl"]))
def test_whatever_a_file_holds_is_written_or_refused_in_one_line(
    finished: Path, tmp_path: Path, plant: Plant, part: dict[str, Any], name: str
) -> None:
    plant()
    shutil.copy(finished / "job.toml", tmp_path / "job.toml")
    for each in ("summary.json", "metrics.jsonl"):
        (tmp_path / each).write_text(json.dumps({"round": 1, **(part if each == name else {})}) + "\n")
    said = ""
    try:
        track_run(tmp_path, [Choice("tensorboard", None)])
    except RunError as error:
        said = str(error)
    assert said in ("", f"{tmp_path}: {name} is damaged")


def test_a_card_that_cannot_be_read_does_not_end_a_run(run: Path, plant: Plant) -> None:
    plant()
    said: list[str] = []
    with Tracking([Choice("tensorboard", None)], said.append) as tracking:
        tracking.begin(run, load_job(run / "job.toml"))
        (run / "MODEL_CARD.md").write_bytes(b"\xff\xfe\x00")
        assert tracking.conclude(RecordFolder(run).read("summary.json")) == []
    assert len(said) == 1
    assert "UnicodeDecodeError" in said[0]


def test_a_federations_job_is_not_tracked_while_it_is_resumed(
    tmp_path: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant()
    resume = ["resume", "a-job", "--operator", "operator.json", "--track", "tensorboard"]
    assert command(monkeypatch, tmp_path, *resume) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: --track is for a run of this machine")
    assert told.count("\n") == 1


def test_an_unfinished_run_is_written_as_far_as_it_is(run: Path, plant: Plant) -> None:
    made = plant()
    (run / "summary.json").unlink()
    track_run(run, [Choice("tensorboard", None)])
    assert [step for step, _ in made[0].logged] == [1, 2, 3]
    assert made[0].ended == [({}, {}, False)]


def test_settings_are_short_enough_for_every_server(finished: Path) -> None:
    long = dataclasses.asdict(Start(finished, "job", dict(trackers._settings({"a": {"b": "x" * 9999, "c": [1]}})), {}))
    assert long["settings"] == {"a.b": "x" * trackers.LONGEST, "a.c": "[1]"}
