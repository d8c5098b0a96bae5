"""The commands as a person types them, on small versions of the shipped scenario."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedchorus import main
from privacy.audit import audit_run
from privacy.errors import RunError
from simulations.scenarios import scenario_path
from simulations.simulate import Watcher, resume_run, start_run
from strategies.job import load_job
from strategies.parameters import Parameters

QUICK = ["--set", "training.rounds=3", "--set", "simulation.baselines=false"]
# No search for the noise: a given multiplier keeps these tests fast.
NOISE = ["--set", "privacy.record.epsilon=none", "--set", "privacy.record.noise_multiplier=4.0"]


def fedchorus(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process: starting one takes longer than what most of these tests look at."""
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["fedchorus", *arguments])
        try:
            main()
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, int(str(code or 0)), out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One finished private run: its folder, its JSON object, and what went to stderr."""
    cwd = tmp_path_factory.mktemp("finished")
    done = fedchorus("simulate", "--out", "run", "--json", "--set", "training.rounds=3", *NOISE, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run", json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_run_ends_with_one_json_object_that_keeps_the_contract(finished: tuple[Path, dict[str, Any], str]) -> None:
    run, summary, progress = finished
    assert summary["rounds"] == 3
    assert set(summary) >= {"run", "rounds", "metrics", "sites", "baselines", "epsilon", "seconds"}
    assert set(summary["baselines"]) == {"local", "local_private", "pooled"}
    assert summary["epsilon"]["client"] is None
    assert summary["epsilon"]["record"] == max(site["epsilon"] for site in summary["sites"].values())
    assert 0.5 < summary["metrics"]["accuracy"] <= 1
    assert "3/3" in progress
    assert json.loads((run / "summary.json").read_text()) == summary


def test_a_run_folder_is_self_contained(finished: tuple[Path, dict[str, Any], str]) -> None:
    run, summary, _ = finished
    expected = {"job.toml", "metrics.jsonl", "model.safetensors", "MODEL_CARD.md", "report.html", "summary.json"}
    assert expected <= {path.name for path in run.iterdir()}
    assert {path.stem for path in (run / "ledgers").iterdir()} == set(summary["sites"])
    parameters, model = Parameters.load(run / "model.safetensors")
    assert np.isfinite(model).all()
    assert parameters.size == 31
    card = (run / "MODEL_CARD.md").read_text()
    assert "add/remove-one" in card
    assert "cancer-centre" in card


def test_the_model_that_is_kept_scores_what_the_summary_says(finished: tuple[Path, dict[str, Any], str]) -> None:
    from simulations.evaluation import Evaluation
    from simulations.federation import Federation
    from simulations.run_folder import RunFolder

    run, summary, _ = finished
    federation = Federation.load(RunFolder.open(run).job)
    scores = Evaluation(federation.trainer, federation.data)(Parameters.load(run / "model.safetensors")[1])
    assert scores["accuracy"] == pytest.approx(summary["metrics"]["accuracy"])
    assert scores["loss"] == pytest.approx(summary["metrics"]["loss"])


def test_the_audit_of_an_honest_run_agrees_with_its_claims(finished: tuple[Path, dict[str, Any], str]) -> None:
    run, summary, _ = finished
    done = fedchorus("audit", str(run), "--json", cwd=run)
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["ok"]
    assert report["findings"] == []
    assert report["epsilon"]["record"] == pytest.approx(summary["epsilon"]["record"], abs=1e-3)


def test_the_audit_of_a_changed_claim_names_it_and_fails(
    finished: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    summary = json.loads((run / "summary.json").read_text())
    summary["sites"]["city-hospital"]["epsilon"] /= 2
    (run / "summary.json").write_text(json.dumps(summary))
    done = fedchorus("audit", str(run), cwd=tmp_path)
    assert done.returncode == 1
    assert "city-hospital" in done.stdout
    assert "NOT OK" in done.stdout


def test_a_report_can_be_written_again(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    done = fedchorus("report", str(run), cwd=tmp_path)
    assert done.returncode == 0
    assert (run / "report.html").read_text() == before


def test_a_finished_run_is_not_resumed_and_not_overwritten(finished: tuple[Path, dict[str, Any], str]) -> None:
    run = finished[0]
    again = fedchorus("resume", str(run), cwd=run.parent)
    assert again.returncode == 1
    assert "finished" in again.stderr
    over = fedchorus("simulate", "--out", str(run), *QUICK, *NOISE, cwd=run.parent)
    assert over.returncode == 1
    assert "not an empty folder" in over.stderr


def test_seeded_noise_repeats_a_run_exactly_and_says_that_it_protects_nobody(tmp_path: Path) -> None:
    models = []
    for name in ("one", "two"):
        done = fedchorus("simulate", "--out", name, *QUICK, *NOISE, "--set", 'simulation.noise="seeded"', cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "protects nobody" in done.stdout
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    assert "protects nobody" in fedchorus("audit", "one", cwd=tmp_path).stdout


def test_noise_from_the_operating_system_never_repeats(tmp_path: Path) -> None:
    models = []
    for name in ("one", "two"):
        done = fedchorus("simulate", "--out", name, *QUICK, *NOISE, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        models.append((tmp_path / name / "model.safetensors").read_bytes())
    assert models[0] != models[1]


def test_a_run_without_privacy_says_so_everywhere_and_fails_its_audit(tmp_path: Path) -> None:
    done = fedchorus("simulate", "--out", "run", *QUICK, "--set", "privacy.record=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not private" in done.stdout
    assert "not private" in (tmp_path / "run" / "report.html").read_text()
    assert "**None.**" in (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert not (tmp_path / "run" / "ledgers").exists()
    assert fedchorus("audit", "run", cwd=tmp_path).returncode == 1


def test_drop_outs_and_malformed_replies_are_survived_and_named(tmp_path: Path) -> None:
    done = fedchorus(
        "simulate", "hospitals-unreliable", "--out", "run", *NOISE, "--set", "training.rounds=12",
        "--set", "simulation.baselines=false", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reasons = {why.partition(":")[0] for line in lines for why in line["failures"].values()}
    assert reasons == {"dropped out", "malformed reply"}
    for line in lines:
        assert set(line["contributors"]) | set(line["failures"]) == set(line["sites"])
        assert not set(line["contributors"]) & set(line["failures"])
    assert audit_run(tmp_path / "run").ok


BAD_INPUT: list[tuple[Sequence[str], Sequence[str]]] = [
    (["simulate", "hospitls"], ["hospitls", "hospitals"]),
    (["simulate", "absent.toml"], ["absent.toml", "no such job file"]),
    (["simulate", "--set", "training.ruonds=5"], ["training.ruonds", "training.rounds"]),
    (["simulate", "--set", "training.rounds=many"], ["training.rounds", "many"]),
    (["simulate", "--set", "training.rounds"], ["key=value"]),
    (["simulate", "--set", "privacy.record.epsilon=-1"], ["privacy.record.epsilon", "greater than 0", "-1"]),
    (["simulate", "--set", "privacy.record.epsilon=0"], ["privacy.record.epsilon"]),
    (["simulate", "--set", "privacy.record.noise_multiplier=5.0"], ["limit is 1", "at most 7 rounds fit"]),
    (["simulate", "--set", "data.target=malignent"], ["malignent", "malignant"]),
    (["simulate", "--set", "simulation.engine=inlin"], ["inlin", "inline"]),
    (["simulate", "--set", "strategy.name=fedvag"], ["fedvag", "fedavg"]),
    (["simulate", "--set", "task.name=tabular-clasification"], ["tabular-classification"]),
    (["simulate", "--set", "simulation.partition.mix.city-hospital.rows=4000"], ["city-hospital", "left"]),
    (["simulate", "--set", "training.device=cuda", *NOISE], ["training.device", "CUDA"]),
    (["simulate", "--set", "cohort.minimum=9"], ["cohort.minimum is 9", "5 sites"]),
    (["simulate", "--set", "strategy.name=os:getcwd"], ["strategy.name", "cannot be built"]),
    (["simulate", "--set", "task.name=json:dumps"], ["task.name", "cannot be built"]),
    (["simulate", "--set", "task.model=mlp", "--set", "task.hidden=[100000000000]"], ["cannot be built"]),
    (["simulate", "--out", "/dev/null/run", *QUICK, *NOISE], ["/dev/null"]),
    (["audit", "absent"], ["absent", "no run folder"]),
    (["resume", "absent"], ["absent", "no run folder"]),
    (["report", "absent"], ["absent", "no run folder"]),
    (["scenarios", "--show", "hospitls"], ["hospitals"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT, ids=[" ".join(a) for a, _ in BAD_INPUT])
def test_a_mistake_gets_one_line_that_names_it_and_leaves_nothing_behind(
    arguments: Sequence[str], words: Sequence[str], tmp_path: Path
) -> None:
    if "cuda" in " ".join(arguments):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    done = fedchorus(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_verbose_shows_where_an_error_came_from(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        fedchorus("audit", "absent", "--verbose", cwd=tmp_path)


def interrupted_run(run: Path, how: signal.Signals, *, after_round: int) -> subprocess.CompletedProcess[str]:
    """Start a run of 20 rounds and send it a signal once it has recorded `after_round` of them."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedchorus", "simulate", "--out", str(run), *NOISE, "--set", "training.rounds=20",
         "--set", "simulation.baselines=false"],
        cwd=run.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while rounds_of(run) < after_round:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, how)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def rounds_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def ledgers_of(run: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted((run / "ledgers").iterdir())}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_stopped_run_goes_on_from_its_last_round_and_what_was_spent_stays_spent(
    how: signal.Signals, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped = interrupted_run(run, how, after_round=3)
    before, rounds_before = ledgers_of(run), rounds_of(run)
    assert 3 <= rounds_before < 20
    assert not (run / "summary.json").exists()
    assert not audit_run(run).ok
    if how == signal.SIGINT:
        assert stopped.returncode == 130
        assert f"fedchorus resume {run}" in stopped.stdout

    done = fedchorus("resume", str(run), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rounds"] == 20
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, 21))
    for site, old in before.items():
        whole = old[: old.rfind(b"\n") + 1]
        assert ledgers_of(run)[site].startswith(whole), f"{site}: what was spent did not stay spent"
    result = audit_run(run)
    assert result.ok, [str(finding) for finding in result.findings]
    for audited in result.sites.values():
        assert audited.releases <= 80, "a site released more than its plan"


def test_two_processes_never_run_the_same_run(tmp_path: Path) -> None:
    from simulations.run_folder import RunFolder

    run = tmp_path / "run"
    interrupted_run(run, signal.SIGKILL, after_round=1)
    with RunFolder.open(run).locked():
        done = fedchorus("resume", str(run), cwd=tmp_path)
    assert done.returncode == 1
    assert "another process" in done.stderr


def test_a_run_whose_job_was_changed_is_not_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted_run(run, signal.SIGKILL, after_round=1)
    job = run / "job.toml"
    job.write_text(job.read_text().replace("noise_multiplier = 4.0", "noise_multiplier = 0.5"))
    done = fedchorus("resume", str(run), cwd=tmp_path)
    assert done.returncode == 1
    assert "job.toml was changed" in done.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after a few of its rounds. Never changed: tests take a copy."""
    run = tmp_path_factory.mktemp("killed") / "run"
    interrupted_run(run, signal.SIGKILL, after_round=2)
    return run


def roll_back(run: Path) -> None:
    ledger = run / "ledgers" / "city-hospital.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:2]))


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (roll_back, ["city-hospital", "what was spent stays spent"]),
        (overwrite("ledgers/city-hospital.jsonl", b""), ["city-hospital"]),
        (overwrite("metrics.jsonl", b"3\n"), ["metrics.jsonl is damaged"]),
        (overwrite("metrics.jsonl", b"\0\0\n"), ["metrics.jsonl is damaged"]),
        (overwrite("metrics.jsonl", b""), ["checkpoint does not fit"]),
        (overwrite("heads.jsonl", b'{"round":1}\n'), ["heads.jsonl is damaged"]),
        (overwrite("plans.json", b"{}"), ["job.toml was changed"]),
        (overwrite("roster.json", b'{"sites":{}}'), ["roster.json"]),
        (overwrite("roster.json", b"["), ["roster.json is damaged"]),
        (overwrite("private/_server/checkpoint.safetensors", b"x"), ["checkpoint"]),
        (overwrite("initial.safetensors", b"x"), ["initial.safetensors"]),
        (overwrite("job.toml", b"\xff"), ["job.toml"]),
    ],
)
def test_a_damaged_run_is_not_resumed_and_nothing_more_is_spent(
    damage: Callable[[Path], None], words: Sequence[str], killed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    damage(run)
    before = ledgers_of(run)
    done = fedchorus("resume", str(run), cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert ledgers_of(run) == before


def test_spare_rounds_let_a_site_that_crashed_take_part_to_the_end(tmp_path: Path) -> None:
    from privacy.budget import SiteBudget
    from privacy.keys import IdentityKey
    from privacy.ledger import Ledger, digest_of
    from server.checkpoint import load_checkpoint
    from simulations.run_folder import RunFolder
    from strategies.parameters import vector_hash

    outcomes = {}
    for spare in (0, 1):
        run = tmp_path / f"spare-{spare}"
        stop_after_one = iter([False, True])
        job = load_job(
            scenario_path("hospitals"),
            ["training.rounds=3", "simulation.baselines=false", "privacy.record.epsilon=none",
             "privacy.record.noise_multiplier=4.0", f"privacy.record.spare_rounds={spare}"],
        )  # fmt: skip
        watcher = Watcher(stop=lambda stops=stop_after_one: next(stops))  # type: ignore[misc]
        assert start_run(job, out=run, parent=tmp_path, watcher=watcher, now=datetime.now(UTC)) is None
        # The crash: a reservation that nothing was made of.
        files = RunFolder.open(run).files_of("city-hospital")
        budget = SiteBudget(Ledger(files.ledger, "city-hospital", IdentityKey.load(files.identity)))
        model = load_checkpoint(RunFolder.open(run).checkpoint, job=job.hash).model
        witness = digest_of(RunFolder.open(run).lines("heads.jsonl")[-1])
        budget.reserve(job=job.hash, round_number=2, model=vector_hash(model), witness=witness)
        summary = resume_run(run, watcher=Watcher())
        assert summary is not None
        assert audit_run(run).ok
        outcomes[spare] = summary["sites"]["city-hospital"]
    assert (outcomes[0]["rounds"], outcomes[1]["rounds"]) == (2, 3)
    assert outcomes[1]["steps"] == outcomes[0]["steps"] + 2


def test_two_runs_that_begin_in_the_same_second_never_share_a_folder(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from simulations.run_folder import RunFolder, fresh_path

    job, now = load_job(scenario_path("hospitals")), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    with ThreadPoolExecutor(8) as many:
        taken = list(many.map(lambda _: fresh_path(job, tmp_path / "runs", now), range(32)))
    assert len(set(taken)) == 32
    RunFolder.create(taken[0], job)
    with pytest.raises(RunError, match="choose another --out"):
        RunFolder.create(taken[0], job)


def test_ctrl_c_while_a_run_folder_is_made_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privacy.keys import IdentityKey

    def pressed(path: Path) -> IdentityKey:
        assert tmp_path / "run" in path.parents
        raise KeyboardInterrupt

    # There is no seam between two writes: the key is pressed while the sites' identities are made.
    monkeypatch.setattr(IdentityKey, "create", pressed)
    job = load_job(scenario_path("hospitals"), ["privacy.record.epsilon=none", "privacy.record.noise_multiplier=4.0"])
    with pytest.raises(KeyboardInterrupt):
        start_run(job, out=tmp_path / "run", parent=tmp_path, watcher=Watcher(), now=datetime.now(UTC))
    assert list(tmp_path.iterdir()) == []


def test_help_comes_at_once_and_without_torch_or_flower(tmp_path: Path) -> None:
    code = (
        "import sys, fedchorus\n"
        "try:\n    sys.argv = ['fedchorus', '--help']; fedchorus.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'flwr', 'pandas', 'sklearn', 'numpy', 'pydantic', 'dp_accounting'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("simulate", "resume", "report", "scenarios", "audit"):
        assert command in done.stdout
        assert "Example: fedchorus" in fedchorus(command, "--help", cwd=tmp_path).stdout
