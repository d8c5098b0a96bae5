"""The smallest valid job, for tests to vary."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from strategies.job import Job, check_job

SMALLEST: Mapping[str, Any] = {
    "name": "smallest",
    "data": {"path": "records.csv", "client": "hospital", "target": "y", "columns": {"x": {"range": [0, 1]}}},
    "training": {"rounds": 2, "learning_rate": 0.5, "local_steps": 1, "batch_size": 4},
}


def raw_job(**changes: Any) -> dict[str, Any]:
    """A job as its file parses. Keys given for a table are merged into it, and None removes a key."""
    raw: dict[str, Any] = deepcopy(dict(SMALLEST))
    for name, change in changes.items():
        table = {**raw.get(name, {}), **change} if isinstance(change, Mapping) else change
        raw[name] = {k: v for k, v in table.items() if v is not None} if isinstance(table, dict) else table
    return raw


def make_job(**changes: Any) -> Job:
    return check_job(raw_job(**changes), where="a test")
