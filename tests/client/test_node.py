"""A site's node: a mistake in its own files ends it before it connects; losing the server is a wait that is said."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse

from client.enrol import enrol
from client.fleet import NotAdmitted, Unreachable
from client.node import LONGEST_S, Node, _checked, client_context
from client.settings import SiteFolder
from privacy.errors import FedchorusError, RunError
from privacy.keys import TlsKey
from privacy.logbook import Logbook
from privacy.secagg.roster import Roster
from server.listen import Listeners, PublicListener, Receive, Scope, Send
from server.provision import read_invitation
from tests.deployment.federation import POLICY
from tests.deployment.live import Live
from tests.server.tls import Authority, serving

ROOT = Path(__file__).parents[2]


def until(happened: Callable[[], bool], *, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """One enrolled site and its coordinator; tests take copies."""
    live = Live(tmp_path_factory.mktemp("made"), f"127.0.0.1:{free_port()}", names=("north",))
    live.enrol_here()
    return live


@pytest.fixture
def live(made: Live, tmp_path: Path) -> Live:
    shutil.copytree(made.folder, tmp_path / "live")
    return Live(tmp_path / "live", made.address, names=("north",))


@pytest.fixture
def door(live: Live) -> Iterator[socket.socket]:
    """Listens where the coordinator would, and must see nobody."""
    host, _, port = live.address.rpartition(":")
    with socket.create_server((host, int(port))) as listening:
        listening.setblocking(False)
        yield listening
        with pytest.raises(BlockingIOError):
            listening.accept()


def site(live: Live) -> SiteFolder:
    return SiteFolder(live.folder / "north")


def quiet() -> Logbook:
    return Logbook("client north", None, stream=None)


# -- what a person must mend -------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[SiteFolder], None]:
    return lambda files: (files.path / name).unlink()


def written(name: str, content: str) -> Callable[[SiteFolder], Any]:
    return lambda files: (files.path / name).write_text(content)


def changed(name: str, before: str, after: str) -> Callable[[SiteFolder], None]:
    def change(files: SiteFolder) -> None:
        path = files.path / name
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))

    return change


BROKEN: list[tuple[Callable[[SiteFolder], Any], str]] = [
    (written("policy.toml", "version = "), "not valid TOML"),
    (written("policy.toml", POLICY + "[cohort]\nminimun = 3\n"), "policy.toml"),
    (written("policy.toml", POLICY.replace("version = 1", "version = 2")), "version 2"),
    (without("policy.toml"), "policy.toml"),
    (written("site.toml", ""), "site.toml"),
    (changed("site.toml", "max_clock_skew_s", "max_clock_skew"), "max_clock_skew_s"),
    (without("site.toml"), "no such site settings"),
    (without("invitation.json"), "invitation.json: cannot be read"),
    (written("invitation.json", "{}"), "invitation"),
    (without("roster.json"), "not enrolled yet: send request.json to the coordinator"),
    (changed("site.toml", 'roster = "', 'roster = "" # '), "not enrolled yet"),
    (changed("roster.json", '"thorax"', '"another"'), "not the roster that site.toml pins"),
    (written("roster.json", "[]"), "roster"),
    (without("keys/tls.key"), "the TLS key is missing"),
    (without("keys/identity.pem"), "identity key is missing"),
    (written("keys/identity.pem", "no key"), "not an Ed25519 private key"),
    (lambda files: shutil.copy(files.tls_key, files.identity), "expected an Ed25519 key, found another kind"),
]


@pytest.mark.parametrize(("break_it", "said"), BROKEN, ids=range(len(BROKEN)))
def test_a_mistake_in_the_sites_files_is_one_line_before_anything_connects(
    break_it: Callable[[SiteFolder], Any], said: str, live: Live, door: socket.socket
) -> None:
    break_it(site(live))
    with pytest.raises(FedchorusError) as caught:
        Node(site(live).path, quiet())
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_wrong_passphrase_is_said_and_shown_nowhere(live: Live, tmp_path: Path, door: socket.socket) -> None:
    folder = tmp_path / "protected"
    enrol(read_invitation(live.coordinator), "south", folder, policy=POLICY, passphrase=b"correct horse")
    for given, said in ((None, "give its passphrase"), (b"battery staple", "its passphrase is another one")):
        with pytest.raises(FedchorusError, match=said) as caught:
            Node(folder, quiet(), given)
        assert "horse" not in str(caught.value)
        assert "staple" not in str(caught.value)


@pytest.mark.parametrize("supervised", [False, True])
def test_the_process_ends_with_the_code_for_a_person_and_is_not_started_again(
    supervised: bool, live: Live, door: socket.socket
) -> None:
    site(live).policy.write_text("version = 1\nlargest_epsilon = ")
    program = ["fedchorus", "client"] if supervised else ["client.node"]
    with subprocess.Popen(
        [sys.executable, "-m", *program, str(site(live).path)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"\n")  # No passphrase; and it stays open, as who keeps it alive leaves it.
        process.stdin.flush()
        said = process.stderr.read().decode()
        assert process.wait(120) == 2
    assert "Traceback" not in said
    lines = [json.loads(line) for line in (site(live).path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["cannot start"]
    assert "policy.toml: not valid TOML" in lines[0]["why"]
    (line,) = said.splitlines()
    assert "error: cannot start (why " in line


def test_files_that_do_not_go_together_are_named(live: Live) -> None:
    site(live).tls_key.unlink()
    TlsKey.create(site(live).tls_key)
    with pytest.raises(RunError, match=r"certificate, key and authority do not go together .* accept the kit again"):
        client_context(site(live))


# -- what only time mends ----------------------------------------------------------------------------------------------


@contextmanager
def running(node: Node) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=node.run, name="node")
    thread.start()
    try:
        yield thread
    finally:
        node.stop()
        thread.join(90)
        assert not thread.is_alive()


@dataclass
class Fake:
    """As much of a coordinator's server as a quiet site needs, at its address and with its certificate."""

    live: Live
    asked: list[str] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        call = scope["path"].rpartition("/")[2]
        self.asked.append(call)
        while (await receive()).get("more_body"):
            pass
        body = b""
        if call == "roster":
            roster = Roster.load(site(self.live).roster)
            said = {"hash": roster.hash, "version": roster.version, "signatures": dict(roster.signatures)}
            body = json.dumps(said).encode()
        elif call == "activate-node":
            body = ActivateNodeResponse(node_id=7).SerializeToString()
        elif call == "pull-messages":
            await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    @contextmanager
    def serving(self) -> Iterator[None]:
        host, _, port = self.live.address.rpartition(":")
        own = self.live.coordinator
        public = PublicListener(
            certificate=own / "tls" / "server.pem",
            key=own / "tls" / "server.key",
            client_authority=own / "authority" / "ca.pem",
            host=host,
            port=int(port),
        )
        listeners = Listeners(self, public=public, loopback=False)
        thread = threading.Thread(target=listeners.serve)
        thread.start()
        try:
            until(lambda: listeners.started.is_set() or not thread.is_alive())
            yield
        finally:
            listeners.stop()
            thread.join(30)


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_server_that_vanishes_is_waited_for_visibly_and_joined_again(live: Live, tmp_path: Path) -> None:
    log, server = tmp_path / "log.jsonl", Fake(live)
    node = Node(site(live).path, Logbook("client north", log, stream=None))
    with running(node):
        until(lambda: node.status.state == "waiting")  # The server has not begun.
        for _ in range(2):
            with server.serving():
                until(lambda: node.status.state == "connected")
            until(lambda: node.status.state == "waiting")
        with server.serving():
            until(lambda: node.status.state == "connected")
            node.stop()
            until(lambda: "deactivate-node" in server.asked)  # It says goodbye, so that nobody waits for it.
    assert server.asked.count("roster") == server.asked.count("activate-node") == 3
    said = [line["event"] for line in events(log)]
    assert said.count("connected") == 3
    waits = [line for line in events(log) if line["event"] == "no connection to the coordinator"]
    assert len(waits) >= 3
    assert all(line["why"].isprintable() and line["again_in_s"] > 0 for line in waits)
    assert all(line["level"] == "warning" for line in waits)


def test_pauses_between_attempts_grow_to_their_limit_and_no_further(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    node = Node(site(live).path, Logbook("client north", log, stream=None))
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        if len(waited) == 8:
            node.stop()
        return False

    monkeypatch.setattr(node._stopping, "wait", wait)
    node.run()
    assert waited == [min(0.5 * 2**tries, LONGEST_S) for tries in range(8)]
    assert LONGEST_S <= 15
    assert node.status.state == "waiting"
    assert len(events(log)) == 8


def test_a_server_of_another_authority_is_not_spoken_to(live: Live, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    asked: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        asked.append(scope["path"])

    with serving(app, other, other.issue("server", server=True)) as listeners:
        text = site(live).settings.read_text()
        site(live).settings.write_text(text.replace(live.address, f"127.0.0.1:{listeners.ports['public']}"))
        node = Node(site(live).path, quiet())
        with running(node):
            until(lambda: node.status.state == "waiting")
        assert "certificate verify failed" in node.status.why.lower()
    assert asked == []


def test_whatever_fails_with_a_line_for_a_person_is_said_and_tried_again(live: Live, tmp_path: Path) -> None:
    """A disk that is full, a certificate that is not there: what a person mends while the node waits."""
    log = tmp_path / "log.jsonl"
    node = Node(site(live).path, Logbook("client north", log, stream=None))
    site(live).authority.unlink()
    with running(node):
        until(lambda: len(events(log)) >= 2)
    assert "certificate, key and authority do not go together" in events(log)[-1]["why"]


@pytest.mark.parametrize(
    ("status", "body", "error", "said"),
    [
        (401, b'{"error": "no valid credential"}', NotAdmitted, "does not let this site in: no valid credential"),
        (403, b"[]", NotAdmitted, "does not let this site in: 403"),
        (403, b"<html>", NotAdmitted, "does not let this site in: 403"),
        (403, b'{"error": "a\\nb"}', NotAdmitted, "does not let this site in: 403"),
        (200, b"[]", Unreachable, "the server answers 200: it is busy or of another version"),
        (200, b"<html>", Unreachable, "the server answers 200: it is busy"),
        (200, b"[" * 100_000, Unreachable, "the server answers 200: it is busy"),
        (400, b'{"error": "roster of thorax"}', Unreachable, "the server answers 400: roster of thorax"),
        (400, b'{"error": "' + b"a" * 9999 + b'"}', Unreachable, "the server answers 400: it is busy"),
        (502, b"", Unreachable, "the server answers 502: it is busy"),
    ],
)
def test_what_a_server_answers_becomes_one_line(
    status: int, body: bytes, error: type[FedchorusError], said: str
) -> None:
    with pytest.raises(error, match=said) as caught:
        _checked(httpx.Response(status, content=body))
    assert str(caught.value).isprintable()
    assert _checked(httpx.Response(200, content=b'{"hash": "x"}')) == {"hash": "x"}
