"""The coordinator's metrics in Prometheus' text format: who is there, what runs, how often something was restarted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest


def render(
    sites: Mapping[str, Mapping[str, Any]], jobs: Sequence[Mapping[str, Any]], *, restarts: int, started: float
) -> str:
    """Render `server.link.Presence` by site and the jobs' views; `started` is in seconds since 1970."""
    registry = CollectorRegistry()

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"fedchorus_{name}", text, labels, registry=registry)

    online = gauge("site_online", "1 while a site is connected", "site")
    activations = gauge("site_activations", "How often a site connected since the server started", "site")
    for site, presence in sites.items():
        online.labels(site).set(float(presence["online"]))
        activations.labels(site).set(presence["activations"])
    states = gauge("jobs", "Jobs by state", "state")
    for state, count in Counter(str(job["state"]) for job in jobs).items():
        states.labels(state).set(count)
    rounds = gauge("job_rounds", "Rounds that a job has finished", "job")
    of = gauge("job_rounds_planned", "Rounds that a job was planned with", "job")
    seconds = gauge("job_round_seconds", "Seconds that a job's last round took", "job")
    failures = gauge("job_round_failures", "Sites that failed in a job's last round", "job")
    for job in jobs:
        rounds.labels(job["id"]).set(job["rounds"])
        of.labels(job["id"]).set(job["of"])
        seconds.labels(job["id"]).set(job["last"]["seconds"] or 0.0)
        failures.labels(job["id"]).set(len(job["last"]["failures"] or ()))
    gauge("serverapp_restarts", "How often a ServerApp was started again").set(restarts)
    gauge("uptime_seconds", "Seconds since the server started").set(time.time() - started)
    rendered: bytes = generate_latest(registry)
    return rendered.decode()
