"""Frames between a site's node and its trainer: a small JSON header, then perhaps one float32 array, raw.

The trainer runs the user's code, so the node trusts no length that it claims: a header has a limit, and an array goes
into memory that the reader made for the one size it expects.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from privacy.errors import FedchorusError
from strategies.parameters import Vector

READ, WRITE = 1, 2  # What a socket is waited for; `selectors` counts alike.
HEADER_LIMIT = 2**20  # The names and shapes of a model's arrays take most of it.
NOTHING = np.zeros(0, np.float32)
_PREFIX = struct.Struct("<4sIQ")  # Version, bytes of the header, bytes of the array.
_VERSION = b"fct1"


class MalformedFrame(FedchorusError):
    """What came through the pipe is not a frame. The text says which check failed, never what came."""


class PipeClosed(FedchorusError):
    """The process at the other end is gone."""


class Pipe:
    """One end of a stream socket, for one caller.

    `wait(READ or WRITE)` is called when a non-blocking socket has to wait, and may raise to give up; the pipe is then
    of no further use. A blocking socket never calls it.
    """

    def __init__(self, end: socket.socket, wait: Callable[[int], None] | None = None) -> None:
        self._end, self._wait = end, wait or _never

    def send(self, header: Mapping[str, Any], array: Vector = NOTHING) -> None:
        """Send a frame, the array without a copy. Raises `PipeClosed`."""
        text = json.dumps(header).encode()
        if len(text) > HEADER_LIMIT:
            raise MalformedFrame(f"a header of {len(text)} bytes, the limit is {HEADER_LIMIT}")
        data = np.ascontiguousarray(array, dtype="<f4").view(np.uint8).data
        self._write(memoryview(_PREFIX.pack(_VERSION, len(text), len(data)) + text))
        self._write(data)

    def receive(self, into: Vector | None = None) -> dict[str, Any]:
        """The next frame's header; its array fills `into` ((n,) float32, contiguous), if it has one.

        The key `array` of what is returned says whether there was one; no sender can set it. Raises `MalformedFrame`
        for an array of another size than `into` before it is read, and `PipeClosed`.
        """
        header, array_bytes = self._head(expected=0 if into is None else into.nbytes)
        if array_bytes and into is not None:
            self._read(into.view(np.uint8).data)
        return {**header, "array": array_bytes > 0}

    def receive_any(self) -> tuple[dict[str, Any], Vector]:
        """The next frame from a sender that is trusted with memory: its header, its array (of size 0 without one)."""
        header, array_bytes = self._head()
        array = np.empty(array_bytes // 4, np.float32)
        self._read(array.view(np.uint8).data)
        return header, array

    def _head(self, *, expected: int | None = None) -> tuple[dict[str, Any], int]:
        """A frame's header, and the bytes of the array that follows: none, or as many as `expected`."""
        prefix = bytearray(_PREFIX.size)
        self._read(memoryview(prefix))
        version, header_bytes, array_bytes = _PREFIX.unpack(prefix)
        if version != _VERSION:
            raise MalformedFrame("it does not start with this version's mark")
        if header_bytes > HEADER_LIMIT:
            raise MalformedFrame(f"it claims a header of {header_bytes} bytes, the limit is {HEADER_LIMIT}")
        if expected is not None and array_bytes not in (0, expected):
            raise MalformedFrame(f"it claims an array of {array_bytes} bytes, expected {expected}")
        text = bytearray(header_bytes)
        self._read(memoryview(text))
        try:
            header = json.loads(text.decode(), parse_constant=_not_finite)
        except (ValueError, RecursionError):
            raise MalformedFrame("its header is not JSON") from None
        if not isinstance(header, dict):
            raise MalformedFrame("its header is not a JSON object")
        return header, array_bytes

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                data = data[self._end.send(data) :]
            except BlockingIOError:
                self._wait(WRITE)
            except OSError:
                raise PipeClosed("the other end is closed") from None

    def _read(self, data: memoryview) -> None:
        while data:
            try:
                count = self._end.recv_into(data)
            except BlockingIOError:
                self._wait(READ)
                continue
            except OSError:
                count = 0
            if not count:
                raise PipeClosed("the other end is closed")
            data = data[count:]


def _never(_event: int) -> None:
    raise AssertionError("a blocking socket does not wait here")


def _not_finite(_constant: str) -> NoReturn:
    raise ValueError("JSON has no such number")
