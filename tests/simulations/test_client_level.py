"""Whole clients are protected from job to report, in every way that a job can ask for, and the audit recomputes it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open

from privacy.accountant import epsilon_pld
from privacy.audit import audit_run
from privacy.budget import Limit, SiteBudget
from privacy.errors import BudgetExceeded, FedchorusError, LedgerError
from privacy.events import GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import Ledger
from simulations.planning import JobPlan
from simulations.progress import RoundTable, print_summary
from simulations.run_folder import RunFolder
from simulations.scenarios import scenario_path
from simulations.secure_sums import who_saw_what
from simulations.simulate import Watcher, resume_run, start_run
from strategies.fedavg import FedAvg
from strategies.job import load_job
from strategies.parameters import Parameters
from strategies.protocol import ServerState
from strategies.total import Total

SMALL = ["simulation.partition.clients=40", "training.rounds=4", "simulation.baselines=false"]
SEEDED = 'simulation.noise="seeded"'
SHARES = ["cohort.rate=none", "privacy.client.placement=distributed"]
KINDS = {
    "both units": [],
    "clients alone, by secret coins": ["privacy.record=none", "cohort.rate=0.3"],
    "the noise is given": ["privacy.client.epsilon=none", "privacy.client.noise_multiplier=2"],
    "a moving clip norm": ["privacy.client.adaptive_clip={}"],
    "layer by layer": ["privacy.client.clipping=per-layer", "privacy.record.clipping=per-layer"],
    "local noise": ["cohort.rate=none", "privacy.client.placement=local"],
    "local noise alone": ["cohort.rate=none", "privacy.client.placement=local", "privacy.record=none"],
    "banded noise": ["cohort.rate=none", "cohort.separation=2", "privacy.client.noise=banded"],
    "buffered noise": ["cohort.rate=none", "cohort.separation=2", "privacy.client.noise=blt", "privacy.record=none"],
    "shares of noise": [*SHARES, "secure_aggregation={}", "simulation.partition.clients=6"],
    "shares alone, in groups": [
        *SHARES, "privacy.record=none", "secure_aggregation={groups=3,bits=20}", "robust.reduce=median",
        "privacy.client.shares=skellam", "simulation.partition.clients=13",
    ],
}  # fmt: skip


def simulate(
    out: Path, *settings: str, watch: Callable[[Mapping[str, Any]], None] = lambda line: None, stop: bool = False
) -> dict[str, Any] | None:
    stopped: list[bool] = []

    def heard(line: Mapping[str, Any]) -> None:
        watch(line)
        if stop and line["round"] == 2:
            stopped.append(True)

    watcher = Watcher(round=heard, stop=lambda: bool(stopped))
    job = load_job(scenario_path("devices"), [*SMALL, *settings])
    return start_run(job, out=out, parent=out.parent, watcher=watcher, now=datetime.now(UTC))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_every_kind_states_what_it_spent_and_the_audit_finds_the_same(kind: str, tmp_path: Path) -> None:
    summary = simulate(tmp_path / "run", *KINDS[kind])
    assert summary is not None
    audit = audit_run(tmp_path / "run")
    assert audit.findings == []
    found = audit.as_dict()["epsilon"]
    assert found["client"] == pytest.approx(summary["epsilon"]["client"])
    alone = "privacy.record=none" in KINDS[kind]
    assert (summary["epsilon"]["record"] is None) == alone
    if not alone:
        assert found["record"] == pytest.approx(summary["epsilon"]["record"])
    central = not any(setting.startswith("privacy.client.placement=") for setting in KINDS[kind])
    assert (summary["client"] is not None) == central == (tmp_path / "run" / "server.jsonl").exists()
    assert 0 < summary["epsilon"]["client"] <= 8.0 or kind == "the noise is given"
    report = (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert "a whole site" in report
    assert "Client-level (epsilon, delta)-differential privacy" in card
    assert ("Record-level" in card) != alone
    shared = kind.startswith("shares")
    assert (summary["secure_aggregation"] is not None) == shared == ("What the server saw" in report)
    assert ("under zero-out of a client" in card) == shared == ("not trusted with" in report)
    assert summary["adjacency"] == ("zero_out" if shared and alone else "add_or_remove_one")


@pytest.mark.parametrize("kind", ["shares of noise", "shares alone, in groups"])
def test_what_was_planned_of_secure_sums_is_what_the_run_says_of_them(kind: str, tmp_path: Path) -> None:
    summary = simulate(tmp_path / "run", *KINDS[kind], "training.rounds=1")
    assert summary is not None
    planned = JobPlan.of(load_job(scenario_path("devices"), [*SMALL, *KINDS[kind], "training.rounds=1"])).secure
    said = {key: value for key, value in summary["secure_aggregation"].items() if key != "seconds"}
    assert said == pytest.approx(planned, abs=1e-3)
    table = io.StringIO()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    console = Console(file=table, width=200)
    with RoundTable(console, rounds=1, title="a run") as rounds:
        rounds.add(lines[0])
    heads, figures = table.getvalue().splitlines()[1:]
    assert heads.endswith("KB up  sum (s)")
    cost = lines[0]["secure"]
    assert figures.split()[-2:] == [f"{cost['upload_bytes'] / 1000:.1f}", f"{cost['seconds']:.2f}"]
    print_summary(console, summary, report="report.html")
    assert who_saw_what(summary["secure_aggregation"]) in table.getvalue()
    assert f"{said['upload_bytes'] / 1000:.1f} KB up" in table.getvalue()
    assert who_saw_what(summary["secure_aggregation"]) in (tmp_path / "run" / "MODEL_CARD.md").read_text()


def test_epsilon_is_that_of_as_many_sampled_releases_as_rounds(tmp_path: Path) -> None:
    summary = simulate(tmp_path / "run", "privacy.record=none", "cohort.rate=0.3")
    assert summary is not None
    event = GaussianEvent(
        unit="client",
        noise_multiplier=summary["client"]["noise_multiplier"],
        clip_norm=2.0,
        sampling_rate=0.3,
        count=4,
        rng="os",
    )
    assert summary["epsilon"]["client"] == pytest.approx(epsilon_pld([event], 1e-3), abs=1e-3)
    assert 7.9 < summary["epsilon"]["client"] <= 8.0
    assert summary["client"]["expected_cohort"] == pytest.approx(12.0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    spent = [line["epsilon_client"] for line in lines]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(summary["epsilon"]["client"])


@pytest.mark.parametrize(
    "kind", ["both units", "clients alone, by secret coins", "a moving clip norm", "banded noise", "local noise"]
)
def test_a_stopped_run_goes_on_to_the_very_same_model(kind: str, tmp_path: Path) -> None:
    settings = [*KINDS[kind], SEEDED]
    assert simulate(tmp_path / "whole", *settings) is not None
    assert simulate(tmp_path / "parts", *settings, stop=True) is None
    assert resume_run(tmp_path / "parts", watcher=Watcher()) is not None
    whole, parts = (Parameters.load(tmp_path / name / "model.safetensors")[1] for name in ("whole", "parts"))
    np.testing.assert_array_equal(whole, parts)
    assert audit_run(tmp_path / "parts").findings == []


def test_a_round_that_was_charged_and_lost_stays_charged(tmp_path: Path) -> None:
    def crash(line: Mapping[str, Any]) -> None:
        if line["round"] == 2:
            raise KeyboardInterrupt  # Recorded, not kept: the checkpoint is of round 1.

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "run", "privacy.client.spare_rounds=1", "privacy.record.spare_rounds=1", watch=crash)
    summary = resume_run(tmp_path / "run", watcher=Watcher())
    assert summary is not None
    reserved = [json.loads(line) for line in (tmp_path / "run" / "server.jsonl").read_text().splitlines()]
    assert [entry["body"]["round"] for entry in reserved if entry["kind"] == "reserve"] == [1, 2, 2, 3, 4]
    assert audit_run(tmp_path / "run").findings == []


def test_a_cohort_that_ledgers_show_is_charged_as_everyone(tmp_path: Path) -> None:
    seen = simulate(tmp_path / "seen", "cohort.rate=0.3", SEEDED)
    secret = simulate(tmp_path / "secret", "cohort.rate=0.3", "privacy.record=none", SEEDED)
    assert seen is not None
    assert secret is not None
    assert seen["client"]["sampling_rate"] == 1.0
    assert secret["client"]["sampling_rate"] == 0.3
    assert seen["client"]["noise_multiplier"] > secret["client"]["noise_multiplier"]
    # What goes out with the model does not say who took part.
    for figure in ("rounds", "steps", "epsilon", "epsilon_rdp"):
        assert {site[figure] for site in secret["sites"].values()} == {None}
    counts_on = "the bound counts on nobody but the server learning who"
    assert counts_on in (tmp_path / "secret" / "MODEL_CARD.md").read_text().replace("\n", " ")
    card = (tmp_path / "seen" / "MODEL_CARD.md").read_text().replace("\n", " ")
    assert counts_on not in card
    assert "charges each for every round" in card
    report = (tmp_path / "secret" / "report.html").read_text()
    assert "Rounds taken part" in report
    assert audit_run(tmp_path / "seen").findings == []


def test_the_noise_that_is_remembered_reaches_no_strategy_and_no_finished_run(tmp_path: Path) -> None:
    summary = simulate(tmp_path / "run", *KINDS["banded noise"], f"strategy.name={__name__}:Curious")
    assert summary is not None
    assert Curious.seen == [{}] * 4
    with safe_open(tmp_path / "run" / "private" / "_server" / "checkpoint.safetensors", framework="numpy") as file:
        assert list(file.keys()) == ["model"]


class Curious(FedAvg):
    """A strategy that looks at all it is given, and hands on nothing of it."""

    seen: ClassVar[list[Any]] = []

    def step(self, state: ServerState, total: Total) -> ServerState:
        self.seen.append(dict(state.release))
        after = super().step(state, total)
        return ServerState(after.model, after.round_number)


def test_correlated_noise_never_takes_a_round_twice(tmp_path: Path) -> None:
    def crash(line: Mapping[str, Any]) -> None:
        if line["round"] == 2:
            raise KeyboardInterrupt

    settings = [*KINDS["banded noise"], "privacy.record=none"]
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "run", *settings, watch=crash)
    with pytest.raises(FedchorusError, match="round 2 was released before"):
        resume_run(tmp_path / "run", watcher=Watcher())


def test_a_server_ledger_restored_from_a_backup_is_noticed(tmp_path: Path) -> None:
    assert simulate(tmp_path / "run", "privacy.record=none", stop=True) is None
    ledger = tmp_path / "run" / "server.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    shutil.copy(ledger, tmp_path / "kept")
    ledger.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(LedgerError, match="what was spent stays spent"):
        resume_run(tmp_path / "run", watcher=Watcher())


class TestAfterAnEarlierRun:
    """Two jobs on the same ledgers cost less than the sum of two, and no more than the holders allow."""

    JOB = ("cohort.rate=none", "privacy.client=none", "privacy.record.epsilon=1.0", SEEDED)

    def again(self, first: Path, out: Path, *settings: str) -> dict[str, Any] | None:
        job = load_job(scenario_path("devices"), [*SMALL, *self.JOB, *settings])
        return start_run(job, out=out, parent=out.parent, watcher=Watcher(), now=datetime.now(UTC), after=first)

    def test_the_ledgers_go_on_and_both_runs_pass_their_audit(self, tmp_path: Path) -> None:
        first = simulate(tmp_path / "first", *self.JOB)
        second = self.again(tmp_path / "first", tmp_path / "second", "name=second")
        assert first is not None
        assert second is not None
        spent = [run["epsilon"]["record"] for run in (first, second)]
        assert spent[0] < spent[1] < 2 * spent[0]
        for name in ("first", "second"):
            assert audit_run(tmp_path / name).findings == []

    def test_a_holders_budget_refuses_what_does_not_fit_beside_the_first_job(self, tmp_path: Path) -> None:
        assert simulate(tmp_path / "first", *self.JOB) is not None
        files = RunFolder(tmp_path / "first").files_of("client-03")
        budget = SiteBudget(Ledger(files.ledger, "client-03", IdentityKey.load(files.identity)))
        budget.set_budget(Limit(epsilon=1.2, delta=1e-3))
        with pytest.raises(BudgetExceeded, match=r"client-03: 4 rounds would cost .* data holder's budget"):
            self.again(tmp_path / "first", tmp_path / "second", "name=second")
        assert not (tmp_path / "second").exists()
        smaller = self.again(
            tmp_path / "first", tmp_path / "third", "name=third", "training.rounds=1", "privacy.record.epsilon=0.3"
        )
        assert smaller is not None
        assert smaller["sites"]["client-03"]["epsilon"] <= 1.2

    def test_the_same_job_is_not_run_twice_on_one_ledger(self, tmp_path: Path) -> None:
        assert simulate(tmp_path / "first", *self.JOB) is not None
        with pytest.raises(FedchorusError, match="this very job is in its ledgers already"):
            self.again(tmp_path / "first", tmp_path / "second")

    def test_ledgers_go_on_in_one_run_alone(self, tmp_path: Path) -> None:
        assert simulate(tmp_path / "first", *self.JOB) is not None
        assert self.again(tmp_path / "first", tmp_path / "second", "name=second") is not None
        with pytest.raises(FedchorusError, match="its ledgers went on in"):
            self.again(tmp_path / "first", tmp_path / "third", "name=third")
        assert simulate(tmp_path / "stopped", *self.JOB, stop=True) is None
        with pytest.raises(FedchorusError, match="is not finished"):
            self.again(tmp_path / "stopped", tmp_path / "third", "name=third")

    def test_other_holders_or_data_are_refused(self, tmp_path: Path) -> None:
        assert simulate(tmp_path / "first", *self.JOB) is not None
        with pytest.raises(FedchorusError, match="data set 'digits', not 'letters'"):
            self.again(tmp_path / "first", tmp_path / "second", "name=second", "data.dataset=letters")
        with pytest.raises(FedchorusError, match="the same data holders"):
            self.again(tmp_path / "first", tmp_path / "second", "name=second", "simulation.partition.clients=90")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["strategy.weighting=rows"], "privacy.client counts every client alike"),
        (["cohort.minimum=3"], "cohort.minimum"),
        (["privacy.client.delta=0.05"], "privacy.client.delta: 0.05 is not below 1/40"),
        (["privacy.record.delta=0.5"], "privacy.record.delta is 0.5, not below 1/"),
        (["privacy.client.noise=bsr"], "cohort.separation"),
        (["cohort.rate=0.3", "privacy.client=none"], "cohort.rate is for central client-level privacy"),
        (["cohort.rate=none", "cohort.separation=2"], "cohort.separation is for correlated noise"),
        (["privacy.client.noise=bsr", "cohort.rate=none", "cohort.separation=9"], "leave some clients out"),
        (["privacy.client.noise=bsr", "privacy.client.placement=local"], "correlated noise needs placement"),
        (["privacy.client.placement=local", "privacy.client.adaptive_clip={}"], "adaptive_clip needs placement"),
        (["privacy.client.clip_norm=inf"], "privacy.client.clip_norm"),
        (["privacy.client.noise_multiplier=-1"], "privacy.client.noise_multiplier"),
        (["privacy.client.noise_multiplier=0.8"], "the job's limit is 8"),
    ],
)
def test_a_job_that_cannot_be_private_is_refused_and_leaves_nothing(
    settings: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FedchorusError, match=said.replace("(", "\\(")):
        simulate(tmp_path / "run", *settings)
    assert list(tmp_path.iterdir()) == []
