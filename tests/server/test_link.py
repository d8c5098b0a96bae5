"""The doorbell in front of Flower: a question waits until there is a message, and its asker's leaving loses none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin

import server.link
from server.link import ACTIVATE, DEACTIVATE, PULL, PUSH, Link

KEY = public_key_to_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Link:
    """Flower's own SuperLink: starting one takes a second."""
    database = tmp_path_factory.mktemp("link") / "flower.db"
    return Link(
        database=database,
        sites={"north": KEY},
        control=NoOpControlAuthnPlugin(),
        site_of=lambda scope: scope.get("site"),
    )


class Flower:
    """Stands where Flower stands: notes what reaches it, and answers 200."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        if scope["type"] == "http":
            message = await receive()
            body = message["body"]
        self.reached.append(scope["path"] + body.decode())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def link(real: Link, monkeypatch: pytest.MonkeyPatch) -> Link:
    monkeypatch.setattr(real, "_flower", Flower())
    monkeypatch.setattr(real, "_bells", {})
    monkeypatch.setattr(real, "_seen", {})
    monkeypatch.setattr(real, "_coming", {})
    monkeypatch.setattr(real, "_changed", None)
    return real


def flower(link: Link) -> Flower:
    found = link._flower
    assert isinstance(found, Flower)
    return found


async def call(link: Link, path: str, *, leave: asyncio.Event | None = None, body: bytes = b"") -> int:
    """One call of north's; the status, or 0 when there was no answer. `leave` closes the connection."""
    said, statuses = [False], [0]

    async def receive() -> dict[str, Any]:
        if not said[0]:
            said[0] = True
            return {"type": "http.request", "body": body, "more_body": False}
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        statuses[0] = message.get("status", statuses[0])

    await link({"type": "http", "path": path, "site": "north"}, receive, send)
    return statuses[0]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_question_waits_until_somebody_rings_and_then_reaches_flower_whole(link: Link) -> None:
    async def test() -> None:
        assert await call(link, PULL, body=b"first") == 200  # One look for what may have come before.
        asked = asyncio.create_task(call(link, PULL, body=b"second"))
        await settled()
        assert not asked.done()
        link.ring(["north", "unknown"])
        assert await asked == 200
        assert flower(link).reached == [PULL + "first", PULL + "second"]

    run(test)


def test_a_bell_that_rang_early_is_not_lost_and_each_is_one_question(link: Link) -> None:
    async def test() -> None:
        await call(link, PULL)
        link.ring(["north"])
        link.ring(["north"])
        assert [await call(link, PULL), await call(link, PULL)] == [200, 200]
        asked = asyncio.create_task(call(link, PULL))
        await settled()
        assert not asked.done()
        asked.cancel()

    run(test)


def test_one_who_leaves_while_waiting_takes_no_message_along(link: Link) -> None:
    async def test() -> None:
        await call(link, PULL)
        leave = asyncio.Event()
        asked = asyncio.create_task(call(link, PULL, leave=leave))
        await settled()
        leave.set()
        assert await asked == 0
        assert not link.sites()["north"]["online"]
        link.ring(["north"])
        assert await call(link, PULL) == 200
        assert link.sites()["north"]["online"]

    run(test)


def test_a_server_that_stops_holds_no_question(real: Link, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "_closing", False)

    async def test() -> None:
        await call(link, PULL)
        asked = asyncio.create_task(call(link, PULL))
        await settled()
        assert not asked.done()
        link.let_go()
        assert await asked == 200
        assert await call(link, PULL) == 200

    run(test)


def test_without_a_bell_flower_is_asked_when_the_time_is_up(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.link, "WAIT_S", 0.05)

    async def test() -> None:
        await call(link, PULL)
        assert await call(link, PULL) == 200

    run(test)


def test_waiting_for_news_ends_with_the_sites_next_question(link: Link) -> None:
    async def test() -> None:
        version, before = await link.wait(-1, 0.0)
        news = asyncio.create_task(link.wait(version, 10.0))
        await settled()
        assert not news.done()
        await call(link, PULL)
        number, after = await news
        assert number != version
        assert after["north"]["pulls"] == before["north"]["pulls"] + 1

    run(test)


def test_an_answer_is_whole_when_its_site_asks_again_and_never_after_it_was_killed(link: Link) -> None:
    async def test() -> None:
        await call(link, ACTIVATE)
        before = link.sites()["north"]["answers"]
        await call(link, PUSH)
        assert link.sites()["north"]["answers"] == before
        await call(link, PULL)
        assert link.sites()["north"]["answers"] == before + 1
        await call(link, PUSH)
        await call(link, ACTIVATE)
        await call(link, PULL)
        assert link.sites()["north"]["answers"] == before + 1

    run(test)


def test_without_news_waiting_ends_when_the_time_is_up(link: Link) -> None:
    async def test() -> None:
        version, _ = await link.wait(-1, 0.0)
        assert (await link.wait(version, 0.05))[0] == version

    run(test)


def test_a_site_that_was_killed_is_let_in_again_at_once_and_counted(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(link._state, "deactivate_node", left.append)

    async def test() -> None:
        before = link.sites()["north"]
        assert [await call(link, ACTIVATE), await call(link, ACTIVATE)] == [200, 200]
        assert left == [before["node"], before["node"]]
        assert link.sites()["north"]["activations"] == before["activations"] + 2

    run(test)


def test_a_site_that_says_goodbye_is_away(link: Link) -> None:
    async def test() -> None:
        await call(link, ACTIVATE)
        assert link.sites()["north"]["online"]
        await call(link, DEACTIVATE)
        assert not link.sites()["north"]["online"]

    run(test)


def test_a_site_that_is_silent_is_away(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        await call(link, ACTIVATE)
        monkeypatch.setattr(server.link, "SILENT_S", 0.0)
        assert not link.sites()["north"]["online"]

    run(test)


def test_a_run_ships_nothing_and_is_over_when_it_is_closed(real: Link) -> None:
    ticket = real.open_run()
    (run,) = [run for run in real._state.get_run_info() if run.run_id == ticket.run]
    assert run.fab_hash in ("", None)
    assert real._state.get_task_by_token(ticket.token) is not None
    real.close_run(ticket)
    assert real._state.get_task_by_token(ticket.token) is None


def test_runs_that_a_killed_server_left_are_ended(real: Link) -> None:
    ticket = real.open_run()
    real.end_all_runs()
    assert real._state.get_task_by_token(ticket.token) is None


@pytest.mark.parametrize("path", ["/v1/fleet/push-object", "/v1/runtime/push-object"])
def test_an_object_reaches_flower_when_all_of_it_is_here(link: Link, path: str) -> None:
    pieces = [b"first ", b"second"]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None: ...

    run(lambda: link({"type": "http", "path": path, "site": "north"}, receive, send))
    assert flower(link).reached == [path + "first second"]


def test_connections_to_the_database_keep_little_in_memory_and_wait_for_one_another(real: Link) -> None:
    for store in (real._state, real._state.object_store):
        with store._engine.connect() as connection:
            found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("cache_size", "busy_timeout")]
        assert found == [-2048, 60000]
