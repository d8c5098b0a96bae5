"""A child that is shut in reaches no network and no key, whatever it tries; and one that is not says so."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.sandbox import Sandbox, Wrapper, environment
from privacy.errors import RunError

AVAILABLE = Sandbox.available()
LIMITS = Sandbox("limits")
PROBE = """
import ctypes, json, os, resource, socket, sys
keys, data, elsewhere, tcp, abstract, file_socket = sys.argv[1:]

def can(action):
    try:
        return action() is not False
    except OSError:
        return False

def connects(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as probe:
        probe.settimeout(1)
        probe.connect(address)
        probe.send(b"?")

def lifts_the_mask():
    libc = ctypes.CDLL(None)
    if libc.unshare(0x10000000 | 0x20000) == 0:
        libc.umount2(keys.encode(), 2)
    return len(os.listdir(keys)) > 0

status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "tcp": can(lambda: connects(socket.AF_INET, ("127.0.0.1", int(tcp)))),
    "udp": can(lambda: connects(socket.AF_INET, ("127.0.0.1", int(tcp)), socket.SOCK_DGRAM)),
    "abstract": can(lambda: connects(socket.AF_UNIX, "\\0" + abstract)),
    "file_socket": can(lambda: connects(socket.AF_UNIX, file_socket)),
    "keys": can(lambda: open(keys + "/identity.pem").close()),
    "lifted": can(lifts_the_mask),
    "writes_data": can(lambda: open(data, "r+").close()),
    "writes_elsewhere": can(lambda: open(elsewhere, "w").close()),
    "writes_tmp": can(lambda: open("/tmp/own-" + abstract, "x").close()),
    "unlinks": can(lambda: os.unlink("/tmp/own-" + abstract)),
    "read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
    "devices": sorted(os.listdir("/dev")),
    "data": open(data).read(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "core": list(resource.getrlimit(resource.RLIMIT_CORE)),
    "memory": list(resource.getrlimit(resource.RLIMIT_AS)),
    "environment": sorted(os.environ),
}))
"""


@dataclass(frozen=True)
class Host:
    """What a child may find: a site's folder, listeners of every kind."""

    site: Path
    port: int
    datagrams: socket.socket
    abstract: str
    file_socket: Path

    @property
    def keys(self) -> Path:
        return self.site / "keys"

    @property
    def data(self) -> Path:
        return self.site / "data.csv"

    def probe(self, sandbox: Sandbox, *, memory_bytes: int | None = None) -> dict[str, Any]:
        arguments = [self.keys, self.data, self.site / "new", self.port, self.abstract, self.file_socket]
        # The whole folder is shown: the keys are hidden within it, not left out with the rest of /tmp.
        command = sandbox.command(
            [sys.executable, "-S", "-c", PROBE, *map(str, arguments)],
            readable=[self.site, self.data],
            hidden=[self.keys],
            memory_bytes=memory_bytes,
        )
        secrets = {**os.environ, "OMP_NUM_THREADS": "1", "FEDCHORUS_TOKEN": "secret"}
        ran = subprocess.run(command, env=environment(parent=secrets), cwd="/", capture_output=True, check=True)
        found: dict[str, Any] = json.loads(ran.stdout)
        try:
            # A datagram gets away on any loopback, also on the child's own: what counts is whether it arrives.
            found["udp"] = self.datagrams.recv(16) == b"?"
        except BlockingIOError:
            found["udp"] = False
        return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "identity.pem").write_text("secret")
    (tmp_path / "data.csv").write_text("x,y\n1,0\n")
    abstract = f"fedchorus-test-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as first,
        socket.socket(socket.AF_UNIX) as second,
    ):
        udp.bind(tcp.getsockname())
        udp.setblocking(False)
        first.bind(f"\0{abstract}")
        first.listen()
        # As the container engines' and the message bus' sockets are: where programs leave things for others.
        path = Path("/tmp") / f"{abstract}.socket"
        path.unlink(missing_ok=True)
        second.bind(str(path))
        second.listen()
        yield Host(tmp_path, tcp.getsockname()[1], udp, abstract, path)
        path.unlink()


def sandbox(wrapper: Wrapper) -> Sandbox:
    found = Sandbox(wrapper)
    if found not in AVAILABLE:
        pytest.skip(f"{wrapper} does not work on this machine")
    return found


@pytest.mark.parametrize("wrapper", ["bubblewrap", "namespaces"])
class TestShutIn:
    def test_reaches_nobody_and_sees_no_key_and_writes_nothing_but_its_own_tmp(
        self, wrapper: Wrapper, host: Host
    ) -> None:
        found = host.probe(sandbox(wrapper))
        assert {name for name, value in found.items() if value is True} == {"writes_tmp", "unlinks", "read_only"}
        assert found["data"] == host.data.read_text()
        assert found["capabilities"] == 0
        assert {"null", "urandom", "shm"} <= set(found["devices"])
        assert not {"sda", "vda", "mem", "kmsg", "loop0"} & set(found["devices"])
        assert not (host.site / "new").exists()

    def test_sees_no_key_either_where_nothing_around_it_is_shown(self, wrapper: Wrapper, host: Host) -> None:
        code = f"import os; raise SystemExit(os.path.isfile({str(host.keys / 'identity.pem')!r}))"
        command = sandbox(wrapper).command([sys.executable, "-S", "-c", code], hidden=[host.keys])
        assert subprocess.run(command, env=environment(), cwd="/", capture_output=True).returncode == 0

    def test_dies_with_its_parent(self, wrapper: Wrapper, tmp_path: Path) -> None:
        assert_dies_with_its_parent(sandbox(wrapper), tmp_path)

    def test_its_exit_status_and_its_signals_come_through(self, wrapper: Wrapper) -> None:
        for code, status in (("raise SystemExit(3)", 3), ("import os; os.abort()", 128 + 6)):
            command = sandbox(wrapper).command([sys.executable, "-S", "-c", code])
            assert subprocess.run(command, env=environment(), cwd="/", capture_output=True).returncode == status


class TestLimits:
    def test_alone_cut_no_network_and_hide_nothing(self, host: Host) -> None:
        # The other way round, too, this shows that the probe can see what it is to see.
        found = host.probe(LIMITS)
        assert not LIMITS.cuts_network
        assert all(found[name] for name in ("tcp", "udp", "abstract", "file_socket", "keys", "writes_data"))

    def test_dies_with_its_parent(self, tmp_path: Path) -> None:
        assert_dies_with_its_parent(LIMITS, tmp_path)


@pytest.mark.parametrize("wrapper", ["bubblewrap", "namespaces", "limits"])
def test_every_wrapper_leaves_no_core_no_privilege_and_no_secret(wrapper: Wrapper, host: Host) -> None:
    found = host.probe(sandbox(wrapper), memory_bytes=2**33)
    assert found["core"] == [0, 0]
    assert found["memory"] == [2**33, 2**33]
    assert found["no_new_privileges"] == "1"
    assert found["capabilities"] == 0
    assert "FEDCHORUS_TOKEN" not in found["environment"]
    assert {"OMP_NUM_THREADS", "PATH", "HOME"} <= set(found["environment"])


def test_the_environment_is_an_allow_list_with_a_home_of_its_own(tmp_path: Path) -> None:
    parent = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "HOME": "/root", "AWS_SECRET": "s", "PYTHONSTARTUP": "x"}
    found = environment(tmp_path, parent=parent)
    assert found["PYTHONPATH"].split(":")[-1] == str(tmp_path)
    assert {**found, "PYTHONPATH": ""} == {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": "/tmp",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }


class TestChoice:
    def test_takes_the_strongest_that_works(self) -> None:
        assert Sandbox.choose("auto") == AVAILABLE[0]
        assert Sandbox.choose("none") == AVAILABLE[-1] == LIMITS
        assert [s.wrapper for s in AVAILABLE] == [*sorted(s.wrapper for s in AVAILABLE if s != LIMITS), "limits"]

    def test_required_says_what_to_install_where_nothing_cuts_the_network(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Sandbox, "_works", lambda self: False)
        with pytest.raises(RunError, match="install bubblewrap"):
            Sandbox.choose("required")
        assert Sandbox.choose("auto") == LIMITS

    def test_a_wrapper_that_fails_its_trial_is_not_available(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        broken = tmp_path / "bwrap"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        assert Sandbox("bubblewrap") not in Sandbox.available()

    def test_a_folder_that_is_not_there_cannot_be_promised(self) -> None:
        with pytest.raises(RunError, match="/no/keys: no such file or folder, but it is to be hidden"):
            LIMITS.command([sys.executable], hidden=[Path("/no/keys")])
        with pytest.raises(RunError, match="/no/data: no such file or folder, but it is to be shown"):
            LIMITS.command([sys.executable], readable=[Path("/no/data")])

    def test_a_hidden_folder_within_a_hidden_folder_is_hidden_with_it(self, host: Host) -> None:
        (host.keys / "old").mkdir()
        command = AVAILABLE[0].command([sys.executable, "-S", "-c", "pass"], hidden=[host.keys / "old", host.keys])
        assert subprocess.run(command, env=environment(), cwd="/").returncode == 0


PARENT = """
import json, os, subprocess, sys
subprocess.Popen(json.loads(sys.argv[1]), stdin=subprocess.PIPE, stdout=sys.stdout, start_new_session=True)
sys.stdin.read()
os.kill(os.getpid(), 9)
"""


def assert_dies_with_its_parent(sandbox: Sandbox, folder: Path) -> None:
    tag = f"tag-of-{folder.name}-{os.getpid()}"
    code = "import time\nprint('up', flush=True)\nwhile True: time.sleep(1)"
    command = sandbox.command([sys.executable, "-S", "-c", code, tag])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(command)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdout as prints:
        assert prints.readline() == b"up\n"
        assert processes_with(tag)
        parent.stdin.close()
        assert parent.wait() == -9
    deadline = time.monotonic() + 10
    while processes_with(tag) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = processes_with(tag)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == []


def processes_with(argument: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and argument.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # It has ended since it was listed.
            continue
    return found
