"""Three sites over TLS, from nothing to a delivered model, by the real commands and processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from client.fleet import FleetLink, NotAdmitted
from client.node import client_context
from client.settings import SiteFolder
from privacy.budget import Accounts
from privacy.events import UNIT_RECORD
from privacy.keys import TlsKey
from server.jobs import JobFolder
from strategies.job import Job
from strategies.parameters import Parameters, vector_hash
from tests.deployment.federation import NAMES, deployed_job
from tests.deployment.live import Live, free_port

ROUNDS, EPSILON, DELTA = 3, 8.0, 1e-2
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Finished:
    live: Live
    job: Job
    folder: JobFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A federation that has run one job with secure aggregation and record-level privacy, and still runs."""
    live = Live(tmp_path_factory.mktemp("live"), f"127.0.0.1:{free_port()}")
    live.enrol()
    job = deployed_job(
        training={"rounds": ROUNDS, "batch_size": None, "sampling_rate": 1.0},
        privacy={"record": {"epsilon": EPSILON, "delta": DELTA, "spare_rounds": 3}},
        secure_aggregation={"colluders": 0},
    )
    with live.up():
        folder = live.submit(job)
        state = live.wait_for(folder)
        assert state["state"] == "finished", live.said(folder)
        yield Finished(live, job, folder)


def test_a_job_runs_from_enrolment_to_the_delivery(finished: Finished) -> None:
    rounds = finished.folder.lines("metrics.jsonl")
    assert [line["round"] for line in rounds] == [1, 2, 3]
    summary = finished.folder.read("summary.json")
    assert summary["secure_aggregation"]
    assert summary["not_delivered"] == []
    model = Parameters.load(finished.folder.model)[1]
    assert {vector_hash(finished.live.kept(name, finished.job)) for name in NAMES} == {vector_hash(model)}


def test_each_ledger_says_what_left_and_what_it_cost(finished: Finished) -> None:
    for name in NAMES:
        entries = finished.live.entries(name)
        commits = [entry.body for entry in entries if entry.kind == "commit"]
        assert {commit["round"] for commit in commits} == {1, 2, 3}
        assert len({commit["output"] for commit in commits}) == len(commits)
        spent = Accounts.of(name, entries).epsilon(UNIT_RECORD, DELTA)
        assert 0 < spent <= EPSILON
        assert entries[-1].kind == "settle"


def test_the_operator_sees_the_job_and_fetches_its_model(finished: Finished, tmp_path: Path) -> None:
    live, folder = finished.live, finished.folder
    assert "finished" in live.command("status", folder.id)
    live.command("fetch", folder.id, "--out", str(tmp_path / "model.safetensors"))
    assert (tmp_path / "model.safetensors").read_bytes() == folder.model.read_bytes()


@pytest.mark.parametrize("token", [None, "not-an-operators"])
def test_a_submission_without_an_operators_token_is_refused(finished: Finished, token: str | None) -> None:
    authority = client_context(SiteFolder(finished.live.folder / "north"))  # Even with a site's certificate.
    with httpx.Client(base_url=f"https://{finished.live.address}/v1/fedchorus", verify=authority) as client:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        answer = client.post("/jobs", json={"toml": "", "model": "0" * 64, "approvals": []}, headers=headers)
    assert answer.status_code in (401, 403)
    assert len(list((finished.live.coordinator / "jobs").iterdir())) == 1


def test_a_revoked_site_is_not_let_in_from_its_next_call_on(finished: Finished) -> None:
    """The last test of this file: nobody lets the site in again."""
    live = finished.live
    files = SiteFolder(live.folder / "west")
    link = FleetLink(live.address, context=client_context(files), key=TlsKey.load(files.tls_key))
    try:
        link.activate()
        live.command("revoke", str(live.coordinator), "west", "--reason", "a test")
        with pytest.raises(NotAdmitted, match="withdrawn"):
            link.receive()
    finally:
        link.close()
