"""A real federation on this machine: made, enrolled and run by the commands that people type, over TLS."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from client.enrol import accept, add_signatures, enrol, review
from privacy.budget import Accounts
from privacy.keys import IdentityKey
from privacy.ledger import Entry, read_ledger
from server.jobs import JobFolder
from server.membership import sign
from server.operators import Operator
from server.provision import provision
from server.remote import Remote
from strategies.job import Job
from strategies.parameters import Parameters, Vector
from tests.deployment.federation import NAMES, POLICY

Kind = Literal["supervisor", "node", "trainer", "server", "process", "app"]
ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "fedchorus")
ROWS = 40


@dataclass
class Live:
    """A federation in `folder`, which its processes have in their arguments; `start` what is to run, then `stop`.

    `within` has what a member's commands are preceded by, to run them elsewhere (`ip netns exec ...`). The
    coordinator's name is "coordinator". It listens on its `address`, or elsewhere where `listen` says so.
    """

    folder: Path
    address: str
    names: Sequence[str] = NAMES
    listen: str = ""
    within: Mapping[str, Sequence[str]] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        return self.folder / "coordinator"

    # -- making it -----------------------------------------------------------------------------------------------------

    def enrol(self, *, policy: str = POLICY, rows: int = ROWS) -> None:
        """Do what the coordinator and the engineers of all sites do, each with the command for it."""
        self.command("provision", str(self.write_federation()), "--out", str(self.coordinator))
        invitation = str(self.coordinator / "invitation.json")
        self._all(lambda name: ("enrol", invitation, "--name", name, "--out", str(self.folder / name)))
        requests = [str(self.folder / name / "request.json") for name in self.names]
        self.command("sign", str(self.coordinator), *requests, "--yes")
        kits = self.coordinator / "kits"
        self._all(lambda name: ("accept", str(self.folder / name), str(kits / f"{name}.kit.json"), "--yes"))
        for number, name in enumerate(self.names):
            write_records(self.folder / name, number, rows=rows, policy=policy)

    def enrol_here(self, *, policy: str = POLICY) -> None:
        """The same within this process, for many sites; each has all signatures of the roster already."""
        now = datetime.now(UTC)
        invitation = provision(self.write_federation(), self.coordinator, now=now).invitation
        requests = [enrol(invitation, name, self.folder / name, policy=policy) for name in self.names]
        sign(self.coordinator, requests, now=now)
        signatures = dict[str, str]()
        for number, name in enumerate(self.names):
            site = self.folder / name
            reviewed = review(site, self.coordinator / "kits" / f"{name}.kit.json")
            signatures[name] = accept(site, reviewed, now=now).signatures[name]
            write_records(site, number, policy=policy)
        for name in self.names:
            add_signatures(self.folder / name, signatures)

    def write_federation(self) -> Path:
        path, listen = self.folder / "federation.toml", self.listen or self.address
        path.write_text(f'name = "thorax"\naddress = "{self.address}"\nlisten = "{listen}"\n')
        return path

    def command(self, *arguments: str, name: str = "coordinator") -> str:
        """Run one `fedchorus` command to its end; what it printed. Fails with its message."""
        ended = self._ended(arguments, name)
        assert ended.returncode == 0, f"fedchorus {' '.join(arguments)}: {ended.stderr}"
        return ended.stdout

    def _ended(self, arguments: Sequence[str], name: str = "coordinator") -> subprocess.CompletedProcess[str]:
        command = [*self.within.get(name, ()), *COMMAND, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=280, env=self._environment, check=False)

    def _all(self, command_of: Callable[[str], Sequence[str]]) -> None:
        started = [
            subprocess.Popen([*COMMAND, *command_of(name)], stdout=subprocess.DEVNULL, env=self._environment)
            for name in self.names
        ]
        assert [process.wait(timeout=280) for process in started] == [0] * len(started)

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "FEDCHORUS_OPERATOR": str(self.coordinator / "operator" / "operator.json")}

    # -- running it ----------------------------------------------------------------------------------------------------

    def start(self, *names: str) -> None:
        """Start `fedchorus server` and `fedchorus client` of each site, or of `names` alone."""
        for name in names or ("coordinator", *self.names):
            what = "server" if name == "coordinator" else "client"
            with open(self.folder / f"{name}.out", "ab") as out:
                self.running[name] = subprocess.Popen(
                    [*self.within.get(name, ()), *COMMAND, what, str(self.folder / name)],
                    stdout=out,
                    stderr=out,
                    cwd=ROOT,
                )

    def stop(self) -> None:
        """End what was started, as a person does; whatever has not ended by then is killed."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        left = [pid for name in self.running for pid in self.pids(name)]
        for pid in left:
            kill(pid)
        for process in self.running.values():
            process.wait(timeout=10)
        self.running.clear()

    @contextlib.contextmanager
    def up(self) -> Iterator[Live]:
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def revive(self) -> None:
        """Start each supervisor that is gone, as systemd does."""
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                self.start(name)

    def pids(self, name: str, kind: Kind | None = None) -> list[int]:
        """The processes of one member, of one kind or of all."""
        folder, found = str(self.folder / name), dict[Kind, list[int]]()
        if self.running[name].poll() is None:
            found["server" if name == "coordinator" else "supervisor"] = [self.running[name].pid]
        words: dict[str, Kind] = {"client.node": "node", "server.process": "process", "server.serverapp": "app"}
        for pid, argv in _commands().items():
            if folder in argv and "-m" in argv and argv[argv.index("-m") + 1] in words:
                found.setdefault(words[argv[argv.index("-m") + 1]], []).append(pid)
        found["trainer"] = [pid for node in found.get("node", ()) for pid in _trainers(node)]
        return found.get(kind, []) if kind is not None else [pid for pids in found.values() for pid in pids]

    # -- what it did ---------------------------------------------------------------------------------------------------

    def remote(self) -> Remote:
        return Remote(Operator.load(self.coordinator / "operator" / "operator.json"))

    def submit(self, job: Job, *, model: Path | None = None) -> JobFolder:
        """Submit with the command, once the server answers; `model` is what it starts from, where not the task's."""
        path = self.folder / f"{job.name}.toml"
        wait_until(lambda: self._ended(["status"]).returncode == 0, 240.0)
        path.write_bytes(job.toml)
        given = () if model is None else ("--model", str(model))
        view = json.loads(self.command("submit", str(path), "--json", *given).splitlines()[-1])
        return JobFolder(self.coordinator / "jobs" / view["id"])

    def wait_for(self, job: JobFolder, *, timeout_s: float = 600.0) -> dict[str, Any]:
        """Wait until the job has ended; its state. What it and the sites said is in the message of a failure."""
        wait_until(lambda: job.state in ("finished", "stopped", "paused"), timeout_s, lambda: self.said(job))
        return job.read("state.json")

    def said(self, job: JobFolder) -> str:
        outs = [path.read_text()[-1500:] for path in sorted(self.folder.glob("*.out"))]
        return "\n".join([str(job.read("state.json")), *map(str, job.events()[-20:]), *outs])

    def entries(self, name: str, dataset: str = "records") -> list[Entry]:
        """The site's ledger, every hash and signature verified, every rule replayed."""
        site = self.folder / name
        path, accounts = site / "ledgers" / f"{dataset}.jsonl", Accounts(name)
        entries = read_ledger(path, name, IdentityKey.load(site / "keys" / "identity.pem").public_hex)
        for entry in entries:
            assert accounts.breach(entry.kind, entry.body) is None, f"{name}: entry {entry.seq}"
            accounts.add(entry)
        return entries

    def kept(self, name: str, job: Job) -> Vector:
        """The model that a site got at the end."""
        return Parameters.load(self.folder / name / "state" / "jobs" / job.hash / "model.safetensors")[1]


def write_records(site: Path, number: int, *, rows: int = ROWS, policy: str = POLICY) -> None:
    """Give a site its policy and its records: those of `tests.deployment.federation`, for the same number."""
    (site / "policy.toml").write_text(policy)
    x = np.random.default_rng(number).uniform(0, 1, rows)
    pd.DataFrame({"x": x, "y": (x > 0.5).astype(int)}).to_csv(site / "records.csv", index=False)
    with open(site / "site.toml", "a") as file:
        file.write('\n[data.records]\npath = "records.csv"\n')


def peak_bytes(pid: int) -> int:
    """The largest resident memory that a process has had."""
    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], timeout_s: float, say: Callable[[], str] = lambda: "") -> None:
    """Look again and again until `condition` holds; fail with what `say` returns when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {say()}"
        time.sleep(0.05)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _commands() -> dict[int, list[str]]:
    """Every process's arguments."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            found[int(path.parent.name)] = path.read_bytes().decode(errors="replace").split("\0")[:-1]
    return found


def _trainers(node: int) -> list[int]:
    """The trainers below a node: each its own Python, whatever shuts it in above."""
    commands, children = _commands(), dict[int, list[int]]()
    for pid in commands:
        with contextlib.suppress(OSError, IndexError):
            parent = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(pid)
    below, found = [node], []
    while below:
        pid = below.pop()
        below += children.get(pid, [])
        argv = commands.get(pid, [])
        if "client.trainer_child" in argv and "python" in argv[0]:
            found.append(pid)
    return found
