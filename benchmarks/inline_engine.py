"""The inline engine against a plain hand-written torch loop over the same clients, and its memory as cohorts grow.

Workload: a 30-64-32-1 network, 100 rows a client, batches of 10, one epoch, 100 clients a round. One thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import finish, interleaved, parser
from torch import nn
from torch.nn import functional

from client.data import Records
from client.local import LocalTraining
from client.site import Site, SitePlan
from client.tasks import initial_model, task_for
from client.training import Trainer
from privacy.noise import OsNoise
from server.collect import PlainCollector
from server.release import PlainRelease
from server.rounds import run_rounds
from simulations.inline import InlineTransport
from strategies.catalogue import strategy_for
from strategies.job import Job, check_job
from strategies.protocol import ServerState, Traits
from strategies.total import layout_for

ROWS, FEATURES, BATCH, RATE = 100, 30, 10, 0.05


def make_job(rounds: int) -> Job:
    return check_job(
        {
            "name": "benchmark",
            "data": {
                "files": {"unused": "unused.csv"},
                "target": "y",
                "columns": {f"x{k}": {"range": [-1.0, 1.0]} for k in range(FEATURES)},
            },
            "task": {"model": "mlp", "hidden": [64, 32]},
            "training": {
                "rounds": rounds,
                "local_epochs": 1,
                "batch_size": BATCH,
                "learning_rate": RATE,
                "device": "cpu",
            },
        },
        where="benchmark",
    )


def make_clients(count: int) -> list[Records]:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=FEATURES)
    clients = []
    for _ in range(count):
        features = rng.uniform(-1, 1, size=(ROWS, FEATURES)).astype(np.float32)
        clients.append(Records(features, (features @ weights > 0).astype(np.int64)))
    return clients


class Inline:
    """What `fedchorus simulate` runs, less the reading of data, the table and the report."""

    def __init__(self, job: Job, clients: list[Records]) -> None:
        task = task_for(job)
        trainer = Trainer(task, initial_model(task, features=FEATURES, classes=2, seed=0), job.training)
        self._job, self._strategy = job, strategy_for(job)
        self._names = [f"client-{k}" for k in range(len(clients))]
        self._start = trainer.read().copy()
        by_name = dict(zip(self._names, clients, strict=True))

        layout = layout_for(job, trainer.parameters.size, Traits())

        def open_client(name: str) -> Site:
            plan = SitePlan(rows=len(by_name[name]))
            training = LocalTraining(
                name,
                job=job,
                plan=plan,
                strategy=self._strategy,
                trainer=trainer,
                records=by_name[name],
                layout=layout,
                noise=lambda _: OsNoise(),
            )
            return Site(
                name,
                job=job,
                plan=plan,
                layout=layout,
                train=training,
                guard_noise=lambda _: OsNoise(),
                files=None,
                simulation=True,
            )

        self._collector = PlainCollector(InlineTransport(open_client))
        self._release = PlainRelease(layout)
        self.model = self._start

    def run(self) -> None:
        self.model = run_rounds(
            ServerState(self._start),
            job=self._job,
            release=self._release,
            cohort=lambda _: self._names,
            strategy=self._strategy,
            collector=self._collector,
            evaluate=lambda _: {},
            record=lambda _: None,
            checkpoint=lambda _: None,
            heads={},
        ).model


class Plain:
    """The loop that one would write by hand: load, train with torch.optim.SGD, add up, average."""

    def __init__(self, job: Job, clients: list[Records]) -> None:
        task = task_for(job)
        self._rounds = job.training.rounds
        self._model: nn.Module = initial_model(task, features=FEATURES, classes=2, seed=0)
        self._start = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._clients = [(torch.from_numpy(c.features), torch.from_numpy(c.target).float()) for c in clients]

    def run(self) -> None:
        model, current = self._model, {name: value.clone() for name, value in self._start.items()}
        for _ in range(self._rounds):
            total = {name: torch.zeros_like(value) for name, value in current.items()}
            weight = 0
            for features, targets in self._clients:
                model.load_state_dict(current)
                optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
                order = torch.randperm(len(features))
                for start in range(0, len(features), BATCH):
                    rows = order[start : start + BATCH]
                    optimiser.zero_grad()
                    outputs = model(features[rows]).squeeze(-1)
                    functional.binary_cross_entropy_with_logits(outputs, targets[rows]).backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                for name, value in model.state_dict().items():
                    total[name] += len(features) * value
                weight += len(features)
            current = {name: value / weight for name, value in total.items()}


def memory_of(cohort: int) -> dict[str, Any]:
    """Peak resident memory while a process runs two rounds over `cohort` clients that hold the same records.

    Linux: the peak is reset after the imports, which would hide it otherwise.
    """
    inline = Inline(make_job(2), make_clients(1) * cohort)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mib()
    inline.run()
    return {"cohort": cohort, "before_mib": before, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    job, clients = make_job(2), make_clients(20 if options.quick else 100)
    inline, plain = Inline(job, clients), Plain(job, clients)
    time_ratio = interleaved(inline.run, plain.run, pairs=3 if options.quick else 9)
    cohorts = (10, 100, 1000) if options.quick else (10, 1000, 10_000)
    # Each in a process of its own: a peak never comes down again.
    memory = [json.loads(subprocess.check_output([sys.executable, __file__, "--memory", str(k)])) for k in cohorts]
    growth = memory[-1]["peak_mib"] / memory[0]["peak_mib"]
    finish(
        {"inline_over_plain_cpu": time_ratio, "memory": memory, "peak_memory_ratio": growth},
        as_json=options.json,
        lines=[
            f"inline / plain loop, CPU time: {time_ratio['median']:.3f} "
            f"({time_ratio['min']:.3f} to {time_ratio['max']:.3f}, {time_ratio['n']} pairs)",
            *(
                f"cohort {m['cohort']:>6}: {m['before_mib']:.1f} MiB before, peak {m['peak_mib']:.1f} MiB"
                for m in memory
            ),
            f"peak memory, largest over smallest cohort: {growth:.3f}",
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        torch.set_num_threads(1)
        print(json.dumps(memory_of(int(sys.argv[2]))))
    else:
        main()
