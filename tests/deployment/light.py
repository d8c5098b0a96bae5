"""Sites without a training framework: real nodes, desks, gates and links, and a trainer of a few lines.

`python -m tests.deployment.light MODEL FOLDER...` forks one process a site, from one that has imported everything: the
memory of the libraries is shared. MODEL has the names and shapes of the job's parameters. SIGTERM ends all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from client.desk import Desk
from client.node import Node
from client.site import SitePlan
from client.trainer_process import Opened
from privacy.logbook import Logbook
from strategies.job import Job
from strategies.messages import Ask
from strategies.parameters import Parameters, Vector
from strategies.protocol import Traits
from strategies.total import Layout, layout_for

JITTER = 0.1


class LightTrainer:
    """What `TrainerProcess` does, without records: every update is 1/1000 in each parameter, or `JITTER` less or more.

    No two are alike in any part: Flower sends equal parts of messages once.
    """

    isolation = "none: a test"
    rows = 32

    def __init__(self, parameters: Parameters, **_: Any) -> None:
        self._parameters = parameters
        self._layout, self._weighted = Layout(parameters.size), np.empty(0, np.float32)

    def start(self) -> None: ...
    def close(self) -> None: ...
    def plan(self, plan: SitePlan) -> None: ...

    def open(self, job: Job, site: str) -> Opened:
        self._layout = layout_for(job, self._parameters.size, Traits())
        random = np.random.default_rng(zlib.crc32(site.encode()))
        self._weighted = np.full(self._layout.size, self.rows, np.float32)
        jitter = random.uniform(1 - 0.9 * JITTER, 1 + 0.9 * JITTER, self._parameters.size)
        self._weighted[: self._parameters.size] = jitter * self.rows / 1000
        return Opened(self.rows, self.rows, self._parameters, "cpu", self._layout)

    def train(self, ask: Ask, memory: Vector | None) -> tuple[Vector, Vector | None]:
        contribution = self._weighted.copy()
        contribution[: self._parameters.size] *= 1 + 1e-4 * ask.round_number
        return contribution, None

    def evaluate(self, model: Vector) -> dict[str, float]:
        return {"rows": float(self.rows)}


def spawn(model: Path, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start one process a site; terminate what is returned, and wait for it."""
    command = [sys.executable, "-m", "tests.deployment.light", str(model), *map(str, folders)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def serve(folder: Path, parameters: Parameters) -> None:
    """Run one site until SIGTERM."""
    node = Node(folder, Logbook(f"client {folder.name}", folder / "log.jsonl", stream=None))
    node._desk = Desk(
        folder=node.folder,
        settings=node.settings,
        policy=node.policy,
        invitation=node.invitation,
        identity=node._identity,
        roster=node._roster,
        log=node.log,
        make_trainer=partial(LightTrainer, parameters),  # type: ignore[arg-type]  # The same methods.
    )
    signal.signal(signal.SIGTERM, lambda *_: node.stop())
    node.run()


def main() -> None:
    parameters, _ = Parameters.load(Path(sys.argv[1]))
    children: list[int] = []

    def stop(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    for folder in sys.argv[2:]:
        if (child := os.fork()) == 0:
            children.clear()  # They are the parent's.
            serve(Path(folder), parameters)
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main()
