"""Jobs with regions, devices, weak and slow sites, from the file to the audit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.audit import audit_run
from privacy.errors import JobError, RoundAborted, RunError
from simulations.federation import Federation
from simulations.simulate import Watcher, resume_run, start_run
from strategies.job import check_job
from strategies.parameters import Parameters, Vector

COLUMNS = {"mean radius": {"range": [5, 30]}, "mean texture": {"range": [5, 45]}, "mean area": {"range": [100, 2600]}}
SITES = [f"client-{i}" for i in range(9)]
REGIONS = {"north": SITES[:4], "south": SITES[4:]}
RECORD = {"record": {"noise_multiplier": 1.0, "delta": 1e-4}}
CLIENT = {"client": {"noise_multiplier": 1.0, "delta": 1e-3}}
DEVICES = {"phone": {"share": 0.6, "availability": 0.9}, "hub": {"share": 0.4, "speed": 4.0}}
NOW = datetime(2026, 1, 1)


def raw(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "edge",
        "data": {"bundled": "breast-cancer", "target": "malignant", "allow_one_class": True, "columns": COLUMNS},
        "task": {"model": "mlp", "hidden": [3]},
        "training": {"rounds": 2, "local_steps": 4, "sampling_rate": 0.5, "learning_rate": 0.2},
        "simulation": {"noise": "seeded", "baselines": False, "partition": {"clients": 9, "alpha": 5.0}},
    }
    for key, change in changes.items():
        base[key] = {**base.get(key, {}), **change} if isinstance(change, dict) else change
    return base


def run(folder: Path, **changes: Any) -> tuple[dict[str, Any], Vector, list[dict[str, Any]]]:
    """The summary of a run, its model and the lines of its metrics."""
    job = check_job(raw(**changes), where="a test")
    summary = start_run(job, out=folder, parent=folder, watcher=Watcher(), now=NOW)
    assert summary is not None
    return summary, Parameters.load(folder / "model.safetensors")[1], lines_of(folder)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy": CLIENT, "strategy": {"weighting": "equal"}},
        {"strategy": {"name": "fedadam"}, "cohort": {"size": 5}},
    ],
)
def test_sums_of_regions_are_the_sum_of_all(tmp_path: Path, changes: dict[str, Any]) -> None:
    _, flat, _ = run(tmp_path / "flat", **changes)
    _, ours, lines = run(tmp_path / "regions", regions=REGIONS, **changes)
    np.testing.assert_allclose(ours, flat, atol=1e-6)
    assert len(lines[0]["contributors"]) == changes.get("cohort", {}).get("size", 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"secure_aggregation": {}},
        {
            "secure_aggregation": {"bits": 20},
            "strategy": {"weighting": "equal"},
            "privacy": {"client": {**CLIENT["client"], "placement": "distributed"}},
        },
    ],
)
def test_each_region_is_a_secure_sum_of_its_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    summary, ours, lines = run(tmp_path / "regions", regions=REGIONS, **changes)
    hidden = summary["secure_aggregation"]
    assert (hidden["groups"], hidden["regions"], hidden["sites_in_a_sum"]) == (2, ["north", "south"], 4)
    assert lines[0]["contributors"] == SITES
    if "privacy" in changes:
        assert audit_run(tmp_path / "regions").findings == []
    else:
        np.testing.assert_allclose(ours, run(tmp_path / "flat")[1], atol=2e-4)


def test_a_region_that_is_too_small_to_hide_a_site_is_refused(tmp_path: Path) -> None:
    regions = {"north": SITES[:3], "south": SITES[3:]}
    with pytest.raises(JobError, match="regions: in the smallest, of 3 sites, a secure sum"):
        run(tmp_path / "run", regions=regions, secure_aggregation={})


def test_a_region_of_which_too_few_answer_is_not_shown(tmp_path: Path) -> None:
    slow = {"phone": {"share": 0.5}, "hub": {"share": 0.5, "speed": 4.0}}
    changes: dict[str, Any] = {"cohort": {"deadline_s": 2}, "simulation": {"devices": slow}}
    with pytest.raises(RoundAborted, match="late"):
        run(tmp_path / "run", regions=REGIONS, secure_aggregation={}, **changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"regions": {"north": SITES[:4]}}, "'client-4' is in none of them"),
        ({"regions": {"north": SITES, "south": ["client-0"]}}, "'client-0' is listed twice"),
        ({"regions": {"north": [*SITES, "clinic-1"]}}, "regions.north: the federation has no site 'clinic-1'"),
        ({"regions": REGIONS, "robust": {"max_norm": 1.0}}, r"regions with \[robust\]"),
        ({"regions": REGIONS, "secure_aggregation": {}, "cohort": {"size": 5}}, "and cohort.size"),
        (
            {
                "regions": REGIONS,
                "secure_aggregation": {},
                "privacy": CLIENT,
                "strategy": {"weighting": "equal"},
            },
            'placement = "central"',
        ),
        ({"training": {"work": {"client-9": 1}}}, "training.work: the federation has no site 'client-9'; did you mean"),
        ({"training": {"weak": {"hub": 0.5}}}, "training.weak: the federation has no site 'hub'"),
        (
            {"cohort": {"size": 9, "over": 0.5}, "simulation": {"devices": {"all": {"share": 1.0}}}},
            "is everyone in a federation of 9",
        ),
        (
            {
                "regions": REGIONS,
                "secure_aggregation": {"groups": 3},
                "robust": {"reduce": "median"},
            },
            "regions",
        ),
    ],
)
def test_what_names_no_site_or_fits_no_region_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(JobError, match=why):
        Federation.load(check_job(raw(**changes), where="a test"))


@pytest.mark.parametrize("changes", [{}, {"privacy": RECORD}, {"strategy": {"name": "ditto"}}])
def test_weak_sites_change_the_model_and_the_sum_may_be_secure(tmp_path: Path, changes: dict[str, Any]) -> None:
    weak = {"training": {"weak": {"client-0": 0.5, "client-3": 0.25}}, **changes}
    _, plain, _ = run(tmp_path / "plain", **weak)
    _, secure, _ = run(tmp_path / "secure", secure_aggregation={}, **weak)
    np.testing.assert_allclose(secure, plain, atol=2e-4)
    if not changes:
        assert np.abs(plain - run(tmp_path / "strong")[1]).max() > 1e-3


def test_kinds_of_devices_differ_in_what_they_train_and_the_clock_is_written_down(tmp_path: Path) -> None:
    devices = {"phone": {**DEVICES["phone"], "trains": 0.5}, "hub": DEVICES["hub"]}
    _, ours, lines = run(tmp_path / "run", simulation={"devices": devices}, training={"budget_s": 2.0})
    assert [line["virtual_seconds"] for line in lines] == [2.0, 4.0]
    assert np.abs(ours - run(tmp_path / "plain")[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"cohort": {"size": 3, "over": 0.7}}, 3),
        ({"cohort": {"deadline_s": 2.0}}, 2),
        ({"strategy": {"name": "fedbuff", "buffer": 2}}, 2),
    ],
)
def test_what_stragglers_spent_is_in_their_ledgers_and_the_audit_holds(
    tmp_path: Path, changes: dict[str, Any], least: int
) -> None:
    devices = {"simulation": {"devices": DEVICES}}
    summary, _, lines = run(tmp_path / "run", privacy=RECORD, **changes, **devices)
    assert all(len(line["contributors"]) >= least for line in lines)
    assert audit_run(tmp_path / "run").findings == []
    asked = {site for line in lines for site in (*line["contributors"], *line["failures"])}
    away = {s for line in lines for s, why in line["failures"].items() if why == "not there"}
    for site in asked - away:
        spent = summary["sites"][site]["epsilon"]
        assert spent > 0
    if "over" in changes.get("cohort", {}):
        unneeded = {s for line in lines for s, why in line["failures"].items() if why.startswith("not needed")}
        assert unneeded


def test_a_round_that_failed_for_absence_is_drawn_anew_when_the_run_goes_on(tmp_path: Path) -> None:
    devices = {"simulation": {"devices": {"phone": {"share": 1.0, "availability": 0.5}}}}
    job = check_job(raw(cohort={"minimum": 6}, training={"rounds": 3}, **devices), where="a test")
    failed = []
    for folder in (tmp_path / "run", tmp_path / "again"):
        with pytest.raises(RunError, match="not there"):
            start_run(job, out=folder, parent=tmp_path, watcher=Watcher(), now=NOW)
        failed.append((folder / "failed.jsonl").read_text())
    assert failed[0] == failed[1]
    for _ in range(60):
        try:
            assert resume_run(tmp_path / "run", watcher=Watcher()) is not None
        except RunError:
            continue
        break
    lines = lines_of(tmp_path / "run")
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(len(line["contributors"]) >= 6 for line in lines)


def test_an_asynchronous_run_says_how_old_its_models_are_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    job = check_job(
        raw(strategy={"name": "fedbuff", "buffer": 3}, training={"rounds": 6}, simulation={"devices": DEVICES}),
        where="a test",
    )
    rounds: list[Mapping[str, Any]] = []
    watcher = Watcher(round=rounds.append, stop=lambda: len(rounds) == 3)
    assert start_run(job, out=tmp_path / "run", parent=tmp_path, watcher=watcher, now=NOW) is None
    before = lines_of(tmp_path / "run")
    assert len(before) == 3
    summary = resume_run(tmp_path / "run", watcher=Watcher())
    assert summary is not None
    lines = lines_of(tmp_path / "run")
    assert lines[:3] == before
    times = [line["virtual_seconds"] for line in lines]
    assert times == sorted(times)
    assert times[3] > times[2]
    assert any(line["staleness"] > 0 for line in lines)
    assert all(line["began"].keys() == set(line["contributors"]) for line in lines)
