"""Large bodies wait on disk: whole on both sides, one in memory at a time, and nobody waits for a slow line."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.listen import App
from server.spool import GARBAGE, PIECE, Spool

SIZES = st.sampled_from([0, 1, 1000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 5 * PIECE + 7])
HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}


class Caller:
    """Says `pieces` and notes what it hears; `talks` and `listens` are what it waits for before it goes on."""

    def __init__(self, *pieces: bytes, then_leaves: bool = False) -> None:
        self._pieces, self._leaves = list(pieces), then_leaves
        self.talks, self.listens = asyncio.Event(), asyncio.Event()
        self.talks.set()
        self.listens.set()
        self.heard: list[Any] = []

    async def receive(self) -> dict[str, Any]:
        await self.talks.wait()
        if self._pieces:
            piece = self._pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(self._pieces) or self._leaves}
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.listens.wait()
        self.heard.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.heard[1:])


def answers(*pieces: bytes, asked: list[bytes] | None = None) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        if asked is not None:
            asked.append(message["body"])
        await send(dict(HEAD))
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    return app


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def settled(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@given(st.lists(SIZES, min_size=1, max_size=4), st.lists(SIZES, max_size=4))
def test_both_sides_get_every_byte_in_the_order_it_was_sent(asked: list[int], answered: list[int]) -> None:
    request = [bytes([number + 1]) * size for number, size in enumerate(asked)]
    answer = [bytes([number + 1]) * size for number, size in enumerate(answered)]
    caller, got = Caller(*request), list[bytes]()

    async def test() -> None:
        with TemporaryDirectory() as folder:
            await Spool(Path(folder))(answers(*answer, asked=got), {}, caller.receive, caller.send)
            assert not list(Path(folder).iterdir())

    run(test)
    assert got == [b"".join(request)]
    assert caller.heard[0] == HEAD
    assert caller.body == b"".join(answer)
    assert all(len(message["body"]) <= PIECE for message in caller.heard[1:])
    assert [message["more_body"] for message in caller.heard[1:]] == [True] * (len(caller.heard) - 2) + [False]


def test_one_is_at_work_at_a_time_and_those_who_wait_take_no_memory(tmp_path: Path) -> None:
    size, callers, within, most, done = 2**20, 40, 0, 0, 0
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal within, most, done
        within += 1
        most = max(most, within)
        await go.wait()
        body = (await receive())["body"]
        await send(dict(HEAD))
        await send({"type": "http.response.body", "body": body})
        within, done = within - 1, done + 1

    async def test() -> None:
        spool, slow = Spool(tmp_path), [Caller(*[bytes(PIECE)] * (size // PIECE)) for _ in range(callers)]
        for caller in slow:
            caller.listens.clear()
        gc.collect()
        tracemalloc.start()
        try:
            calls = [asyncio.create_task(spool(app, {}, caller.receive, caller.send)) for caller in slow]
            await settled(lambda: within == 1 and not any(caller._pieces for caller in slow))
            go.set()
            await settled(lambda: done == callers)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        for caller in slow:
            caller.listens.set()
        await asyncio.gather(*calls)
        assert all(len(caller.body) == size for caller in slow)
        assert most == 1
        assert peak < callers * size / 2

    run(test)


def test_a_slow_line_holds_up_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        spool = Spool(tmp_path)
        talker, listener, quick = Caller(b"a", b"b"), Caller(b"c"), Caller(b"d")
        talker.talks.clear()
        listener.listens.clear()
        slow = [asyncio.create_task(spool(answers(b"x"), {}, one.receive, one.send)) for one in (talker, listener)]
        await spool(answers(b"y"), {}, quick.receive, quick.send)
        assert quick.body == b"y"
        assert not any(call.done() for call in slow)
        talker.talks.set()
        listener.listens.set()
        await asyncio.gather(*slow)
        assert talker.body == listener.body == b"x"

    run(test)


def test_one_who_leaves_in_the_middle_never_gets_there(tmp_path: Path) -> None:
    got: list[bytes] = []
    caller = Caller(b"half of it", then_leaves=True)
    run(lambda: Spool(tmp_path)(answers(asked=got), {}, caller.receive, caller.send))
    assert not got
    assert not caller.heard


def test_an_application_still_hears_that_its_caller_left(tmp_path: Path) -> None:
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.extend([(await receive())["type"], (await receive())["type"]])

    caller = Caller(b"all of it")
    run(lambda: Spool(tmp_path)(app, {}, caller.receive, caller.send))
    assert heard == ["http.request", "http.disconnect"]


def test_an_application_that_fails_says_so_and_gives_its_turn_back(tmp_path: Path) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("broken")

    async def test() -> None:
        spool, first, second = Spool(tmp_path), Caller(b"a"), Caller(b"b")
        with pytest.raises(KeyError, match="broken"):
            await spool(broken, {}, first.receive, first.send)
        assert not first.heard
        await spool(answers(b"y"), {}, second.receive, second.send)
        assert second.body == b"y"

    run(test)


def test_what_finished_calls_leave_behind_is_bounded(tmp_path: Path) -> None:
    """As Flower does: its frames refer to one another, so that only the collector ends them, some day."""

    class Frame:
        def __init__(self, body: bytes) -> None:
            self.body, self.itself = body, self

    size, left = 2**22, weakref.WeakSet[Frame]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        left.add(Frame((await receive())["body"]))
        await send(dict(HEAD))

    async def test() -> None:
        spool = Spool(tmp_path)
        for _ in range(3 * GARBAGE // size):
            caller = Caller(bytes(size))
            await spool(app, {}, caller.receive, caller.send)
            assert len(left) * size <= GARBAGE + size

    gc.disable()
    try:
        run(test)
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc, or an old one")
def test_the_process_gives_large_blocks_back_and_does_not_search_what_it_imported() -> None:
    program = """
import ctypes, gc
from server.process import _stay_small
class Found(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usm fsm ord ford keep".split()]
ask = ctypes.CDLL(None).mallinfo2
ask.restype = Found
_stay_small()
block = bytes(2**23)
del block  # Left alone, glibc would from now on keep blocks of less than this.
before = ask().hblks
block = bytes(2**22)
assert ask().hblks == before + 1
assert gc.get_freeze_count() > 1000
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
