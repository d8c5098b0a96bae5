"""Large bodies wait on disk, and one at a time is in memory, however many sites send or fetch at once.

Flower holds what it is given, and what it answers, several times over while it works on it. So a request's body is
taken in whole before Flower sees it, an answer is taken out whole before its reader gets it, and in between they take
turns: a site on a slow line costs some space on disk, and holds up nobody. Two at a time are no faster: Flower's work
on a body is Python's, and its database has one writer.
"""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Self

from server.listen import App, Message, Receive, Scope, Send

PIECE = 2**16  # Bytes of a body that are in memory on their way to the disk, and from it.
GARBAGE = 2**23  # Bytes of bodies that may lie in memory unused.


class Spool:
    """Passes calls on to an ASGI application, one at a time.

    Bodies of more than `PIECE` bytes lie in `folder` meanwhile, in files without a name, which end with the process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._turn, self._passed = folder, asyncio.Lock(), 0

    async def __call__(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one call on to `app`. One whose caller leaves before it has said everything never gets there."""
        with _Body(self._folder) as asked, _Body(self._folder) as answer:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                await asked.add(message.get("body", b""))
                more = message.get("more_body", False)
            said, head = False, list[Message]()

            async def replayed() -> Message:
                nonlocal said
                if said:
                    return await receive()
                said = True  # In one piece: each of Flower's many layers makes two tasks for every one.
                return {"type": "http.request", "body": await asked.read(asked.size), "more_body": False}

            async def kept(message: Message) -> None:
                if message["type"] == "http.response.body":
                    await answer.add(message.get("body", b""))
                else:
                    head.append(message)

            async with self._turn:
                await app(scope, replayed, kept)
                self._tidy(asked.size + answer.size)
            for message in head:
                await send(message)
            for at in range(0, answer.size or 1, PIECE):  # Each waits until most of what went before has left.
                piece, more = await answer.read(PIECE, at=at), at + PIECE < answer.size
                await send({"type": "http.response.body", "body": piece, "more_body": more})

    def _tidy(self, passed: int) -> None:
        """Collect garbage: the frames of finished calls refer to one another, and to the bodies."""
        self._passed += passed
        if self._passed > GARBAGE:
            self._passed = 0
            gc.collect()


class _Body:
    """Bytes that are added first, then read."""

    def __init__(self, folder: Path) -> None:
        self.size = 0
        self._file = SpooledTemporaryFile(PIECE, dir=str(folder))  # noqa: SIM115 (closed by `__exit__`)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    async def add(self, piece: bytes) -> None:
        self.size += len(piece)
        await asyncio.to_thread(self._file.write, piece)

    async def read(self, size: int, *, at: int = 0) -> bytes:
        self._file.seek(at)
        return await asyncio.to_thread(self._file.read, size)
