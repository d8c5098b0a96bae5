"""One life of a child process: its end of the pipe, what it prints, the time it has, and how it ended."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from client.pipe import NOTHING, READ, Pipe, PipeClosed
from privacy.errors import RunError
from strategies.parameters import Vector

OUTPUT_LIMIT = 2**16


class TookTooLong(Exception):
    """The time for a call is over."""


class Life:
    """A child that runs `command`, its descriptor 0 the far end of the pipe.

    What it prints is read whenever the pipe is waited for, and its last `OUTPUT_LIMIT` bytes kept in `output`.
    `at_rest` says that no frame is half sent or half read. Raises `RunError` if it cannot be started; whoever starts
    it must `end` it.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], output: bytearray) -> None:
        self._output, self._deadline, self.at_rest = output, math.inf, True
        self._end, far_end = socket.socketpair()
        self._prints, far_prints = os.pipe()
        with far_end:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=far_end.fileno(),
                    stdout=far_prints,
                    stderr=far_prints,
                    env=environment,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                self._end.close()
                os.close(self._prints)
                raise RunError(f"the trainer cannot be started: {command[0]}: {error.strerror}") from None
            finally:
                os.close(far_prints)
        self._end.setblocking(False)
        os.set_blocking(self._prints, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._end, READ)
        self._selector.register(self._prints, READ)
        self._pipe = Pipe(self._end, self._wait)

    @property
    def has_ended(self) -> bool:
        # Left unreaped, so that its number stays its own until `end`.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def say(self, call: dict[str, Any], array: Vector = NOTHING, *, timeout_s: float) -> None:
        self.at_rest, self._deadline = False, time.monotonic() + timeout_s
        self._pipe.send(call, array)

    def exchange(self, call: dict[str, Any], array: Vector, *, into: Vector | None, timeout_s: float) -> dict[str, Any]:
        self.say(call, array, timeout_s=timeout_s)
        answer = self._pipe.receive(into)
        self.at_rest = True
        return answer

    def end(self, *, grace_s: float) -> str:
        """Wait `grace_s` for the child to end, then kill it and what it started; how it ended, in words."""
        self._deadline = time.monotonic() + grace_s
        while not self.has_ended and time.monotonic() < self._deadline:
            self._drain()  # It may be printing its last words, and wait for room.
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._drain()
        self._selector.close()
        self._end.close()
        os.close(self._prints)
        number = -code if code < 0 else code - 128  # A wrapper reports its child's signal as a shell does.
        if number == signal.SIGKILL:
            return "was killed, perhaps out of memory,"
        if 0 < number < signal.NSIG:
            return f"was ended by {signal.Signals(number).name}"
        return f"ended with status {code}"

    def _wait(self, event: int) -> None:
        """Wait for the pipe, and meanwhile for what is printed: a child that cannot print would not go on."""
        self._selector.modify(self._end, event)
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TookTooLong
            # In slices: something that the user's code started can hold the pipe open after the child's end.
            ready = self._selector.select(min(left, 0.5))
            if any(key.fileobj is self._end for key, _ in ready):
                return
            if ready:
                self._drain()
            elif self.has_ended:
                raise PipeClosed("the child has ended")

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            # Bounded: a child that prints without an end must not keep its parent here.
            for _ in range(16):
                printed = os.read(self._prints, OUTPUT_LIMIT)
                if not printed:
                    self._quiet()
                    return
                self._output += printed
                del self._output[:-OUTPUT_LIMIT]

    def _quiet(self) -> None:
        # A closed pipe is always ready: it would turn waiting into spinning.
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._prints)
