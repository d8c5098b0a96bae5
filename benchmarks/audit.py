"""What an audit costs: recomputing epsilon from the events of a ledger, and a whole ledger of 10,000 signed entries.

Both hold 20 distinct Poisson-sampled Gaussians, each released 500 times. "over dp-accounting" is the CPU time of our
PLD (`privacy.pld`) over that of dp-accounting's PLD accountant with its defaults, on the same events, timed in turn.
"audit_s" is all of `audit_run` on a folder with one site: signatures, rules, PLD, RDP, the proven interval, claims.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from measure import finish, interleaved, parser

from privacy import accountant, pld
from privacy.accountant import epsilon, epsilon_pld
from privacy.audit import audit_run
from privacy.budget import Limit, SiteBudget
from privacy.events import Event, GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import Ledger, digest_of

DELTA, DISTINCT = 1e-6, 20
TOML = """name = "benchmark"
[training]
rounds = {rounds}
local_steps = 2
sampling_rate = 0.001
[privacy.record]
noise_multiplier = 1.0
clip_norm = 1.0
delta = 1e-06
"""


def make_events(count: int) -> list[GaussianEvent]:
    return [
        GaussianEvent(
            noise_multiplier=1.0 + 0.05 * k, clip_norm=1.0, sampling_rate=0.001 * (1 + k / 20), count=count, rng="os"
        )
        for k in range(DISTINCT)
    ]


def ours(events: list[GaussianEvent]) -> float:
    forget()
    return epsilon_pld(events, DELTA)


def theirs(events: list[GaussianEvent]) -> float:
    import dp_accounting
    from dp_accounting.pld import pld_privacy_accountant

    accountant = pld_privacy_accountant.PLDAccountant()
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian), event.count)
    return float(accountant.get_epsilon(DELTA))


def forget() -> None:
    """Drop what the accountants remember: each run pays for all of it."""
    for module in (accountant, pld):
        for remembered in vars(module).values():
            if hasattr(remembered, "cache_clear"):
                remembered.cache_clear()


def write_run(run: Path, entries: int) -> int:
    """A finished run with one site whose ledger has about `entries` entries: 20 jobs one after the other, as many
    rounds each; the last one is the run's. Returns how many there are."""
    rounds = (entries - 1 - DISTINCT) // (2 * DISTINCT)
    toml = TOML.format(rounds=rounds).encode()
    job = hashlib.sha256(toml).hexdigest()
    (run / "job.toml").write_bytes(toml)
    key = IdentityKey.create(run / "identity.pem")
    (run / "roster.json").write_text(json.dumps({"v": 1, "sites": {"bank": key.public_hex}}))
    budget = SiteBudget(Ledger(run / "ledgers" / "bank.jsonl", "bank", key))
    budget.open(rows=1000, simulation=False)
    heads, releases = list[dict[str, Any]](), list[Event]()
    for number, event in enumerate(reversed(make_events(2)), start=1):
        name = job if number == DISTINCT else f"{number:064x}"
        budget.plan(job=name, events=[event], rounds=rounds, limits=[Limit(epsilon=None, delta=DELTA)])
        for round_number in range(1, rounds + 1):
            witness = digest_of(heads[-1]) if heads else None
            reservation = budget.reserve(job=name, round_number=round_number, model="1" * 64, witness=witness)
            head = budget.commit(reservation, output="2" * 64)
            releases.append(event)
            if name == job:
                heads.append({"round": round_number, "heads": {"bank": list(head)}})
    lines = [{"round": n, "contributors": ["bank"], "failures": {}} for n in range(1, rounds + 1)]
    figure = epsilon(releases, DELTA).pld
    summary = {"rounds": rounds, "job_hash": job, "sites": {"bank": {"epsilon": figure}}, "epsilon": {"record": figure}}
    for name, records in (("heads.jsonl", heads), ("metrics.jsonl", lines)):
        (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "summary.json").write_text(json.dumps(summary))
    return len(budget.ledger.entries)


def audit_of(entries: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        with patch.object(os, "fsync", lambda _: None):  # Writing 10,000 durable entries would take minutes.
            written = write_run(Path(folder), entries)
        forget()
        began, began_cpu = time.perf_counter(), time.process_time()
        audit = audit_run(Path(folder))
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    assert audit.ok, [str(finding) for finding in audit.findings[:5]]
    return {"entries": written, "audit_s": seconds, "audit_cpu_s": cpu}


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    events = make_events(500)
    ratio = interleaved(lambda: void(ours(events)), lambda: void(theirs(events)), pairs=3 if options.quick else 7)
    figures = {"ours": ours(events), "dp_accounting": theirs(events)}
    audited = audit_of(1000 if options.quick else 10_000)
    finish(
        {"pld_over_dp_accounting_cpu": ratio, "epsilon": figures, **audited},
        as_json=options.json,
        lines=[
            f"20 events x 500, our PLD / dp-accounting's, CPU time: {ratio['median']:.3f} ({ratio['min']:.3f} to "
            f"{ratio['max']:.3f}, {ratio['n']} pairs; {ratio['seconds']:.2f} s and {ratio['seconds_other']:.2f} s)",
            f"epsilon at delta {DELTA:g}: {figures['ours']:.5f} and {figures['dp_accounting']:.5f}",
            f"audit of a ledger of {audited['entries']} entries: {audited['audit_s']:.2f} s "
            f"({audited['audit_cpu_s']:.2f} s of CPU)",
        ],
    )


def void(_: float) -> None:
    """What is timed returns nothing."""


if __name__ == "__main__":
    main()
