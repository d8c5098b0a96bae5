"""A coordinator and three sites, each with a network and an address of its own: only the coordinator is in reach."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from strategies.parameters import Parameters, vector_hash
from tests.deployment.federation import NAMES, deployed_job
from tests.deployment.live import Live

PORT = 9443
MEMBERS = ("coordinator", *NAMES)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ADDRESS = {name: f"10.77.{number}.1" for number, name in enumerate(MEMBERS)}


class Network:
    """One namespace a member, joined by a switch that carries nothing from site to site."""

    def __init__(self) -> None:
        self._prefix = f"fed{os.getpid()}"
        self._made: list[str] = []

    def make(self) -> None:
        """Raises `CalledProcessError` where the kernel or the container does not allow it."""
        switch = self._namespace("switch")
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for number, name in enumerate(MEMBERS):
            own, port = self._namespace(name), f"port{number}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", own)
            _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            if name != "coordinator":
                _ip("-n", switch, "link", "set", "dev", port, "type", "bridge_slave", "isolated", "on")
            _ip("-n", own, "address", "add", f"{ADDRESS[name]}/16", "dev", "eth0")
            _ip("-n", own, "link", "set", "eth0", "up")
            _ip("-n", own, "link", "set", "lo", "up")

    def remove(self) -> None:
        for namespace in self._made:
            _ip("netns", "delete", namespace)

    def within(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", f"{self._prefix}-{name}"]

    def reaches(self, name: str, other: str, *, port: int) -> bool:
        """Whether a TCP connection can be made, or is at least refused by the other end itself."""
        code = (
            f"import socket; raise SystemExit(socket.socket().connect_ex(('{ADDRESS[other]}', {port})) not in (0, 111))"
        )
        program = ["timeout", "3", "python3", "-c", code]
        return subprocess.run([*self.within(name), *program], check=False).returncode == 0

    def _namespace(self, name: str) -> str:
        namespace = f"{self._prefix}-{name}"
        _ip("netns", "add", namespace)
        self._made.append(namespace)
        return namespace


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces takes root and the program `ip` (iproute2)")
    network = Network()
    try:
        try:
            network.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
        yield network
    finally:
        network.remove()


def test_a_job_runs_between_machines_that_reach_only_the_coordinator(network: Network, tmp_path: Path) -> None:
    within = {name: network.within(name) for name in MEMBERS}
    live = Live(tmp_path, f"{ADDRESS['coordinator']}:{PORT}", within=within)
    live.enrol()
    job = deployed_job(
        training={"batch_size": None, "sampling_rate": 1.0},
        privacy={"record": {"noise_multiplier": 4.0, "delta": 1e-2, "spare_rounds": 6}},
        secure_aggregation={"colluders": 0},
    )
    with live.up():
        folder = live.submit(job)
        state = live.wait_for(folder)
        assert state["state"] == "finished", live.said(folder)
        assert network.reaches("north", "coordinator", port=PORT)
        assert not network.reaches("north", "south", port=PORT)
        model = Parameters.load(folder.model)[1]
        assert {vector_hash(live.kept(name, job)) for name in NAMES} == {vector_hash(model)}
        for name in NAMES:
            assert sum(entry.kind == "commit" for entry in live.entries(name)) == job.training.rounds


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
