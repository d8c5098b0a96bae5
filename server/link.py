"""Flower's SuperLink inside our own process: its database, its Fleet API, and a doorbell in front of it.

Flower's SuperNodes ask every few seconds whether there is a message, and each question costs the server a query. Here
a question waits at the door until the ServerApp has put a message there and rung for it, so a round trip takes no
longer than the work. And because a site handles one message after the other, its next question says that its last
answer is complete: nobody has to poll for that either.

A run is opened without a bundle: there is no code that a site could fetch.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read by flwr when it is imported: nothing leaves this machine by itself.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}

from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, TRANSPORT_TYPE_GRPC_RERE, SubStatus
from flwr.common.event_log_plugin import EventLogWriterPlugin
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.superlink.auth_plugin import ControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from sqlalchemy import Engine, event

from privacy.errors import RunError
from server.listen import Receive, Scope, Send
from server.spool import Spool

WAIT_S = 20.0  # A question waits no longer, so that a dead connection is noticed; clients give up after 30.
SILENT_S = 45.0  # A site that is alive sends a heartbeat every 25 seconds or so.
PULL, ACTIVATE = "/v1/fleet/pull-messages", "/v1/fleet/activate-node"
OBJECTS = ("/push-object", "/pull-object")  # Of sites and of our own processes: the only large bodies.
DEACTIVATE, PUSH = "/v1/fleet/deactivate-node", "/v1/fleet/push-messages"


@dataclass
class Presence:
    """What the link knows of one site: its Flower node, how often it began (`activations`) and asked (`pulls`), and how
    many answers of it are here whole (`answers`)."""

    node: int
    activations: int = 0
    pulls: int = 0
    answers: int = 0


@dataclass(frozen=True)
class RunTicket:
    """What a ServerApp needs to speak for one Flower run."""

    run: int
    task: int
    token: str


class Link:
    """The SuperLink as an ASGI app (call it), with what our own processes need of its state.

    `sites` are the enrolled sites' names and Flower public keys. `site_of` tells who makes a call, from its scope: the
    guard in front has checked the certificate and put it there. `control` and `notes` are Flower's plug-ins for who may
    use its Control API, and for what its calls are about.
    """

    def __init__(
        self,
        *,
        database: Path,
        sites: Mapping[str, bytes],
        control: ControlAuthnPlugin,
        notes: EventLogWriterPlugin | None = None,
        site_of: Callable[[Scope], str | None],
    ) -> None:
        self._flower = create_app(_settings(database, control, notes), SuperLinkLifespan)
        self._state = self._flower.state.linkstate_factory.state()
        for store in (self._state, self._state.object_store):
            _tune(store._engine)
        self._spool = Spool(database.parent)
        self._site_of = site_of
        self._presence: dict[str, Presence] = {}
        self._seen: dict[str, float] = {}
        self._coming: dict[str, int] = {}  # Answers that began to come, of sites that have not asked again since.
        self._bells: dict[str, asyncio.Semaphore] = {}
        self._version = 0
        self._changed: asyncio.Event | None = None
        self._held: set[asyncio.Future[None]] = set()
        self._closing = False
        self.enrol(sites)

    def enrol(self, sites: Mapping[str, bytes]) -> None:
        """Register sites that are new, or that have a new key."""
        for site, key in sites.items():
            node = self._state.get_node_id_by_public_key(key)
            if node is None:
                node = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=site)
            if site not in self._presence or self._presence[site].node != node:
                self._presence[site] = Presence(node)

    # -- what the ServerApp's process asks -----------------------------------------------------------------------------

    def open_run(self) -> RunTicket:
        """Open a Flower run that ships nothing, and claim its one task before anybody else could."""
        run = self._state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        tasks = [task for task in self._state.get_tasks(run_ids=[run]) if task.run_id == run]
        token = self._state.claim_task(tasks[0].task_id) if tasks else None
        if not token or not self._state.activate_task(tasks[0].task_id):
            raise RunError("the SuperLink's database gave no run; is its disk full?")
        return RunTicket(run, tasks[0].task_id, token)

    def close_run(self, ticket: RunTicket) -> None:
        """End a run: messages of it that were not fetched are dropped, and late answers refused."""
        self._state.finish_task(ticket.task, SubStatus.STOPPED, "")
        self._state.cleanup_run(ticket.run)

    def end_all_runs(self) -> None:
        """End what a process that was killed left open."""
        for run in self._state.get_run_info():
            self._state.stop_run(run.run_id)

    def sites(self) -> dict[str, dict[str, Any]]:
        """Each site's `Presence` by name, and whether it is `online`."""
        now = time.monotonic()
        return {
            site: {**asdict(presence), "online": now - self._seen.get(site, -SILENT_S) < SILENT_S}
            for site, presence in self._presence.items()
        }

    async def wait(self, since: int, timeout_s: float) -> tuple[int, dict[str, dict[str, Any]]]:
        """Return the version of `sites` and them, once it is another than `since` or the time is up."""
        deadline = time.monotonic() + timeout_s
        while self._version == since and (left := deadline - time.monotonic()) > 0:
            self._changed = self._changed or asyncio.Event()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                break
        return self._version, self.sites()

    def ring(self, sites: Iterable[str]) -> None:
        """Let each of `sites` fetch one more message: it lies there, whole."""
        for site in sites:
            if site in self._presence:
                self._bell(site).release()

    def let_go(self) -> None:
        """Answer the questions that wait here, from any thread: the server is about to stop."""
        self._closing = True
        for question in list(self._held):
            question.get_loop().call_soon_threadsafe(_done, question)

    # -- what the sites ask --------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        site = self._site_of(scope) if scope["type"] == "http" else None
        if site is None or site not in self._presence:
            await self._through(scope, receive, send)
        elif scope["path"] == PULL:
            await self._pull(site, scope, receive, send)
        elif scope["path"] == ACTIVATE:
            await self._activate(site, scope, receive, send)
        else:
            self._seen[site] = time.monotonic()
            if scope["path"] == PUSH:
                self._coming[site] = self._coming.get(site, 0) + 1
            await self._through(scope, receive, send)
            if scope["path"] == DEACTIVATE:
                self._gone(site)

    async def _through(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a call to Flower; those with large bodies when it is their turn."""
        if scope["type"] == "http" and scope["path"].endswith(OBJECTS):
            await self._spool(self._flower, scope, receive, send)
        else:
            await self._flower(scope, receive, send)

    async def _pull(self, site: str, scope: Scope, receive: Receive, send: Send) -> None:
        self._seen[site] = time.monotonic()
        presence = self._presence[site]
        self._change(site, pulls=presence.pulls + 1, answers=presence.answers + self._coming.pop(site, 0))
        question = [await receive()]
        while question[-1].get("more_body"):
            question.append(await receive())
        if not await self._rung(self._bell(site), receive):
            self._gone(site)  # Nobody is listening any more: a message that is handed out now would be lost.
            return
        self._seen[site] = time.monotonic()

        async def replayed() -> MutableMapping[str, Any]:
            return question.pop(0) if question else await receive()

        await self._flower(scope, replayed, send)

    async def _rung(self, bell: asyncio.Semaphore, receive: Receive) -> bool:
        """Wait until somebody rings or the time is up; False when the caller has gone.

        When the time is up Flower says whether there is a message: a bell that was lost costs a wait, no message.
        """
        ringing, leaving = asyncio.ensure_future(bell.acquire()), asyncio.ensure_future(receive())
        stopping: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.add(stopping)
        try:
            wait_s = 0.0 if self._closing else WAIT_S
            awaited: set[asyncio.Future[Any]] = {ringing, leaving, stopping}
            await asyncio.wait(awaited, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                if ringing.done():
                    bell.release()
                return False
            return True
        finally:
            self._held.discard(stopping)
            for waiting in (ringing, leaving, stopping):
                waiting.cancel()

    async def _activate(self, site: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a site that was killed come back at once: to Flower it counts as online for another minute."""
        node = self._presence[site].node
        await asyncio.to_thread(self._state.deactivate_node, node)
        status = 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self._flower(scope, receive, watched)
        if status == 200:
            self._seen[site] = time.monotonic()
            self._bells[site] = asyncio.Semaphore(1)  # One look for what may have come before.
            self._coming.pop(site, None)  # What it was sending when it was killed will never be whole.
            self._change(site, activations=self._presence[site].activations + 1)

    def _bell(self, site: str) -> asyncio.Semaphore:
        return self._bells.setdefault(site, asyncio.Semaphore(1))

    def _gone(self, site: str) -> None:
        self._seen.pop(site, None)
        self._change(site)

    def _change(self, site: str, **fields: int) -> None:
        """Note it and wake who waits; in the event loop alone."""
        for name, value in fields.items():
            setattr(self._presence[site], name, value)
        self._version += 1
        if self._changed is not None:
            self._changed.set()
            self._changed = None


def _done(question: asyncio.Future[None]) -> None:
    if not question.done():
        question.set_result(None)


def _tune(engine: Engine) -> None:
    """Let writers wait for one another for a minute, and each connection keep 2 MiB in memory.

    After Flower's 5 seconds many sites on a busy disk get errors. Its cache, of 64 MiB for each connection, would hold
    what was read once for one site.
    """

    @event.listens_for(engine, "connect")
    def tune(connection: Any, _: object) -> None:
        for setting in ("busy_timeout = 60000", "cache_size = -2048", "mmap_size = 0"):
            connection.execute(f"PRAGMA {setting}")

    engine.dispose()  # Connections that were opened before.


def _settings(
    database: Path, control: ControlAuthnPlugin, notes: EventLogWriterPlugin | None
) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=True,  # TLS is our listeners' affair.
        certificates=None,
        superexec_auth_secret=secrets.token_bytes(32),  # Nobody has it: no other process can claim a task.
        authn_plugin=control,
        event_log_plugin=notes,
        fleet_event_log_plugin=notes,
        enable_event_log=notes is not None,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(database),
        isolation="process",
        runtime_dependency_install=False,
    )
