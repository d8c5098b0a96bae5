"""The coordinator's metrics say who is there and how jobs get on, in the form that Prometheus reads."""

from __future__ import annotations

import re
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.jobs import JobFolder
from server.metrics import render
from tests.strategies.jobs import make_job


def job(name: str = "a-1", **changes: Any) -> dict[str, Any]:
    last = {"contributors": ["north"], "failures": {"south": "late"}, "training_loss": 0.5, "seconds": 2.5}
    return {"id": name, "state": "running", "rounds": 3, "of": 5, "last": last, **changes}


def samples(text: str) -> dict[str, float]:
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }


def shown(jobs: list[dict[str, Any]], sites: dict[str, dict[str, Any]] | None = None) -> dict[str, float]:
    return samples(render(sites or {}, jobs, restarts=2, started=time.time() - 60))


def test_says_which_sites_are_there() -> None:
    sites = {"north": {"online": True, "activations": 1}, "south": {"online": False, "activations": 4}}
    found = shown([], sites)
    assert found['fedchorus_site_online{site="north"}'] == 1
    assert found['fedchorus_site_online{site="south"}'] == 0
    assert found['fedchorus_site_activations{site="south"}'] == 4


def test_says_how_far_each_job_is_and_how_its_last_round_went() -> None:
    found = shown([job()])
    assert found['fedchorus_job_rounds{job="a-1"}'] == 3
    assert found['fedchorus_job_rounds_planned{job="a-1"}'] == 5
    assert found['fedchorus_job_round_seconds{job="a-1"}'] == 2.5
    assert found['fedchorus_job_round_failures{job="a-1"}'] == 1


def test_says_how_often_it_had_to_start_again() -> None:
    found = shown([])
    assert found["fedchorus_serverapp_restarts"] == 2
    assert 59 < found["fedchorus_uptime_seconds"] < 120


def test_of_a_job_before_its_first_round_are_zeros(tmp_path: Any) -> None:
    folder = JobFolder.create(tmp_path, make_job(), model=b"", approvals=[])
    found = shown([folder.view()])
    assert found[f'fedchorus_job_rounds{{job="{folder.id}"}}'] == 0
    assert found[f'fedchorus_job_rounds_planned{{job="{folder.id}"}}'] == 2
    assert found[f'fedchorus_job_round_seconds{{job="{folder.id}"}}'] == 0
    assert found['fedchorus_jobs{state="queued"}'] == 1


def test_never_show_what_a_site_contributed() -> None:
    text = render({"north": {"online": True, "activations": 1}}, [job()], restarts=0, started=0.0)
    assert not re.search(r"loss|contribut|late|south", text.replace("failed in", ""))


@given(st.lists(st.sampled_from(["queued", "running", "finished", "stopped"]), max_size=12))
def test_count_each_job_in_one_state(states: list[str]) -> None:
    found = shown([job(f"a-{number}", state=state) for number, state in enumerate(states)])
    counted = {key: value for key, value in found.items() if key.startswith("fedchorus_jobs{")}
    assert counted == {f'fedchorus_jobs{{state="{state}"}}': states.count(state) for state in set(states)}
