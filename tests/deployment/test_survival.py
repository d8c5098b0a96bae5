"""Fifty kills at random over a job of twenty rounds: it ends, and nothing is spent or released twice.

What is killed with SIGKILL is drawn anew each time: a site's node, its trainer, its supervisor; the job's ServerApp,
the SuperLink's process, everything of the coordinator at once. Supervisors come back as systemd would bring them. The
seed and every kill are printed; FEDCHORUS_SURVIVAL_SEED chooses another seed.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site import SitePlan
from privacy.budget import Accounts
from privacy.events import UNIT_RECORD
from privacy.secagg.journal import Journal
from server.checkpoint import load_checkpoint
from server.collect import PlainCollector
from server.jobs import JobFolder
from server.release import PlainRelease
from server.rounds import run_rounds
from strategies.catalogue import strategy_for
from strategies.job import Job
from strategies.messages import Ask, Reply, Request
from strategies.parameters import Parameters, Vector
from strategies.protocol import ServerState, Traits
from strategies.total import layout_for
from tests.deployment.federation import NAMES, InProcess, deployed_job
from tests.deployment.live import Kind, Live, free_port, kill, wait_until

ROUNDS, KILLS, RECOVERY_S = 20, 50, 90.0
EPSILON, DELTA = 30.0, 1e-2
SERVER: tuple[Kind | None, ...] = ("app", "process", None)  # None: all of it at once, the power is cut.
SITE: tuple[Kind | None, ...] = ("node", "trainer", "supervisor")
SECURE: Mapping[str, Any] = {
    "training": {"batch_size": None, "sampling_rate": 1.0},
    "privacy": {"record": {"noise_multiplier": 4.0, "epsilon": EPSILON, "delta": DELTA, "spare_rounds": 80}},
    "secure_aggregation": {"colluders": 0},
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@dataclass(frozen=True)
class Kill:
    when: float
    name: str
    kind: Kind | None
    round_number: int


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    live = Live(tmp_path, f"127.0.0.1:{free_port()}")
    live.enrol()
    with live.up():
        yield live


def test_a_private_and_secure_job_outlives_fifty_kills_and_spends_nothing_twice(live: Live) -> None:
    job, folder, waits = run_through(live, **SECURE)
    rounds = folder.lines("metrics.jsonl")
    assert all(line["contributors"] == list(NAMES) for line in rounds)  # Three are the fewest that a sum is of.
    assert np.isfinite(Parameters.load(folder.model)[1]).all()
    for name in NAMES:
        check_ledger(live, name, job, finished={line["round"] for line in rounds})
        check_journal(live.folder / name / "state" / "journal")
    assert max(waits) < RECOVERY_S


def test_a_plain_job_outlives_fifty_kills_with_the_model_that_it_would_have_had(live: Live) -> None:
    job, folder, waits = run_through(live, cohort={"minimum": 2})
    contributors = {line["round"]: line["contributors"] for line in folder.lines("metrics.jsonl")}
    expected = undisturbed(live, job, folder, contributors)
    assert np.array_equal(Parameters.load(folder.model)[1], expected)
    counted = Counter(name for names in contributors.values() for name in names)
    assert folder.read("summary.json")["contributions"] == dict(counted)
    assert set(contributors[ROUNDS - 1] + contributors[ROUNDS]) == set(NAMES)  # Whoever was down is there again.
    assert max(waits) < RECOVERY_S


def run_through(live: Live, **changes: Any) -> tuple[Job, JobFolder, list[float]]:
    """Run a job while it is killed at; it has ended as it should when this returns. With it: each kill's recovery."""
    job = deployed_job(**{**changes, "training": {"rounds": ROUNDS, **changes.get("training", {})}})
    folder = live.submit(job)
    wait_until(lambda: folder.state == "running", 240, lambda: live.said(folder))
    seed = int(os.environ.get("FEDCHORUS_SURVIVAL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"\nseed {seed}")
    began, kills = time.monotonic(), storm(live, folder, random.Random(seed))
    wait_until(lambda: ended(live, folder), 900, lambda: live.said(folder))
    state = folder.read("state.json")
    assert state["state"] == "finished", live.said(folder)
    assert [line["round"] for line in folder.lines("metrics.jsonl")] == list(range(1, ROUNDS + 1))
    assert load_checkpoint(folder.checkpoint, job=job.hash).round_number == ROUNDS
    assert len(kills) == KILLS
    waits = recoveries(folder, kills)
    failed = sum(event["event"] == "round failed" for event in folder.events())
    load = os.getloadavg()[2] / (os.cpu_count() or 1)
    print(f"{len(kills)} kills in {time.monotonic() - began:.0f} s, {failed} rounds failed and were run again")
    print(f"load per processor in the last quarter of an hour: {load:.1f}")
    print(f"recovery: median {statistics.median(waits):.1f} s, largest {max(waits):.1f} s, {state}")
    for kind in (*SITE, *SERVER):
        own = [wait for wait, one in zip(waits, kills, strict=True) if one.kind == kind]
        if own:
            name, middle = kind or "all of the server", statistics.median(own)
            print(f"  {name:18} {len(own):2} kills, median {middle:5.1f} s, largest {max(own):5.1f} s")
    return job, folder, waits


def storm(live: Live, folder: JobFolder, rng: random.Random) -> list[Kill]:
    """Kill, some times within each round; then let a round end. All kills are done before the last round."""
    kills: list[Kill] = []
    while len(kills) < KILLS and not ended(live, folder):
        before = done(folder)
        for _ in range(-(-(KILLS - len(kills)) // max(1, ROUNDS - 1 - before))):
            time.sleep(rng.uniform(0, 3))  # At any moment of a round.
            kills.append(strike(live, folder, rng))
            print(f"round {kills[-1].round_number}: {kills[-1].kind or 'all'} of {kills[-1].name}", flush=True)
        wait_for_round(live, folder, before + 1)
    return kills


def wait_for_round(live: Live, folder: JobFolder, number: int) -> None:
    wait_until(lambda: ended(live, folder) or done(folder) >= number, 600, lambda: live.said(folder))


def done(folder: JobFolder) -> int:
    return len(folder.lines("metrics.jsonl"))


def strike(live: Live, folder: JobFolder, rng: random.Random) -> Kill:
    """Kill one thing; what is still being started again is waited for."""
    kind = rng.choice((*SITE, *SERVER))
    name = "coordinator" if kind in SERVER else rng.choice(NAMES)
    victims: list[int] = []

    def are_there() -> bool:
        live.revive()
        victims[:] = live.pids(name, kind)
        return bool(victims)

    wait_until(are_there, 120, lambda: live.said(folder))
    when = time.time()
    for pid in victims:
        kill(pid)
    return Kill(when, name, kind, done(folder) + 1)


def ended(live: Live, folder: JobFolder) -> bool:
    live.revive()
    return folder.state in ("finished", "stopped", "paused")


def recoveries(folder: JobFolder, kills: list[Kill]) -> list[float]:
    """Seconds from each kill to the end of the next round, whatever was killed in between."""
    ends = [datetime.fromisoformat(one["time"]).timestamp() for one in folder.events() if one["event"] == "round"]
    return [min(end for end in ends if end > one.when) - one.when for one in kills]


def check_ledger(live: Live, name: str, job: Job, *, finished: set[int]) -> None:
    """`live.entries` has replayed every rule; here is what a crash could have bent."""
    entries = live.entries(name)
    reserves = [entry for entry in entries if entry.kind == "reserve"]
    commits = [entry.body for entry in entries if entry.kind == "commit"]
    history = (live.folder / name / "state" / "history.jsonl").read_text().splitlines()
    asked = Counter(line["round"] for line in map(json.loads, history) if line["kind"] == "round")
    reserved = Counter(entry.body["round"] for entry in reserves)
    assert all(reserved[number] <= asked[number] for number in reserved), "reserved without having been asked"
    assert job.privacy.record is not None
    assert len(reserves) <= ROUNDS + job.privacy.record.spare_rounds
    assert len({commit["reserve"] for commit in commits}) == len(commits)
    assert len({commit["output"] for commit in commits}) == len(commits)
    assert finished <= {commit["round"] for commit in commits}
    spent = Accounts.of(name, entries).epsilon(UNIT_RECORD, DELTA, spent_only=True)
    assert 0 < spent <= EPSILON
    print(f"{name}: {len(reserves)} reservations, {len(commits)} releases, epsilon {spent:.2f} of {EPSILON:g}")


def check_journal(path: Path) -> None:
    """Each claim stands there once, and the file is whole: `count` reads all of it."""
    Journal(path).count("vector", "none")
    claims = [line.split()[0] for line in path.read_bytes().splitlines()[1:]]
    assert claims
    assert len(set(claims)) == len(claims)


def undisturbed(live: Live, job: Job, folder: JobFolder, contributors: Mapping[int, list[str]]) -> Vector:
    """The model that the same rounds with the same sites make where nothing is killed."""
    parameters, start = Parameters.load(folder.initial)
    layout = layout_for(job, parameters.size, Traits())
    rounds: list[int] = []
    state = run_rounds(
        ServerState(start),
        job=job,
        strategy=strategy_for(job),
        collector=PlainCollector(_Room(live, job)),
        release=PlainRelease(layout),
        cohort=lambda number: contributors[number],
        evaluate=lambda _: {},
        record=lambda result: rounds.append(result.round_number),
        checkpoint=lambda _: None,
        heads={},
    )
    assert rounds == list(range(1, ROUNDS + 1))
    return state.model


class _Room:
    """All sites' trainers in one place: a `server.collect.Transport` in which nothing can be lost."""

    def __init__(self, live: Live, job: Job) -> None:
        self._trainers = {}
        for name in NAMES:
            trainer = self._trainers[name] = InProcess(data=live.folder / name / "records.csv")
            opened = trainer.open(job, name)
            trainer.plan(SitePlan(opened.rows))

    def exchange(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply]]:
        for name, ask in requests.items():
            assert isinstance(ask, Ask)
            yield name, Reply(name, ask.job, ask.round_number, self._trainers[name].train(ask, None)[0], None)
