"""Sixty-four sites on one machine join, train three rounds, get the model and leave, without one error.

Each is a process of its own with a real node, desk and link; only its trainer is light (`tests.deployment.light`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.initial import initial_parameters
from strategies.parameters import Parameters
from tests.deployment.federation import deployed_job
from tests.deployment.light import JITTER, spawn
from tests.deployment.live import Live, free_port, peak_bytes, wait_until

SITES, ROUNDS = 64, 3
MOST_BYTES, MOST_S = 600 * 2**20, 600
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    "changes", [{}, {"secure_aggregation": {"colluders": 1, "graph": "regular", "retries": 1}}], ids=["plain", "secure"]
)
def test_sixty_four_sites_join_train_and_leave_without_an_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    live = Live(tmp_path, f"127.0.0.1:{free_port()}", names=[f"site-{number:02}" for number in range(SITES)])
    live.enrol_here()
    job = deployed_job(training={"rounds": ROUNDS}, **changes)
    parameters, start = initial_parameters(job)
    parameters.save(start, tmp_path / "shapes.safetensors", {})
    live.start("coordinator")
    began = time.monotonic()
    sites = spawn(tmp_path / "shapes.safetensors", [tmp_path / name for name in live.names])
    try:
        folder = live.submit(job)
        with live.remote() as remote:
            wait_until(lambda: all(site["online"] for site in remote.sites()["sites"].values()), MOST_S)
            joined = time.monotonic() - began
            assert live.wait_for(folder, timeout_s=MOST_S)["state"] == "finished", live.said(folder)
            trained, [server] = time.monotonic() - began - joined, live.pids("coordinator", "process")
            peak = peak_bytes(server)
            sites.terminate()
            assert sites.wait(timeout=120) == 0
            wait_until(lambda: not any(site["online"] for site in remote.sites()["sites"].values()), 120)
    finally:
        sites.terminate()
        sites.wait(timeout=60)
        live.stop()
    lines = folder.lines("metrics.jsonl")
    seconds = [line["seconds"] for line in lines]
    print(f"\njoined in {joined:.0f} s, job {trained:.0f} s, rounds {seconds} s, server {peak / 2**20:.0f} MiB")
    assert [len(line["contributors"]) for line in lines] == [SITES] * ROUNDS
    assert not any(line["failures"] for line in lines)
    assert folder.read("summary.json")["not_delivered"] == []
    model, moved = Parameters.load(folder.model)[1], ROUNDS * 1e-3
    assert np.abs(model - start - moved).max() < JITTER * moved
    for name in live.names:
        said = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [line["event"] for line in said if line["level"] != "info" and line["event"] != NOT_YET] == []
        assert said[-1]["event"] == "a job is over"
    assert peak < MOST_BYTES


NOT_YET = "no connection to the coordinator"  # The sites start at the same moment as the server.
