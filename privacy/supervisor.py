"""Keeping one process alive: started again whenever it ends, unless it says that only a person can help."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from privacy.errors import RunError
from privacy.logbook import Logbook

STOPPED, NEEDS_A_PERSON = 0, 2  # Exit codes after which nothing is started again.
FIRST_S, LONGEST_S, WELL_S = 0.5, 15.0, 30.0


def keep_alive(command: Sequence[str], *, log: Logbook, secret: bytes = b"") -> int:
    """Run `command` again and again until it ends by itself with one of the codes above; that code.

    It gets `secret` (a passphrase) as the first line of its standard input, which closes when this process dies: the
    child ends then too. SIGTERM and SIGINT are passed on, and end both. The pause before a restart grows to 15 s while
    the process does not live for 30.
    """
    stopping = threading.Event()
    running: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()
        for process in running:
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    pause = FIRST_S
    try:
        while True:
            began = time.monotonic()
            with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
                running[:] = [process]
                if stopping.is_set():
                    process.terminate()
                code = _served(process, secret)
            if stopping.is_set() or code in (STOPPED, NEEDS_A_PERSON):
                return STOPPED if stopping.is_set() else code
            pause = FIRST_S if time.monotonic() - began > WELL_S else min(pause * 2, LONGEST_S)
            log.warning("its process ended and is started again", ended=_words(code), pause_s=pause)
            if stopping.wait(pause):
                return STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """End this process as soon as its standard input closes: whoever started it has died."""

    def watch() -> None:
        while os.read(0, 4096):  # Not `sys.stdin`: a thread that holds its lock turns every exit into SIGABRT.
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextmanager
def only_one(path: Path, *, what: str, patience_s: float = 20.0) -> Iterator[None]:
    """Hold a lock on the file `path`: one process at a time is `what`.

    One that was killed has its child end a moment later, so this waits a while. Raises `RunError`.
    """
    deadline = time.monotonic() + patience_s
    with open(path, "w", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"{path.parent}: another process is {what} here; stop it first") from None
                time.sleep(0.1)
        yield


def _served(process: subprocess.Popen[bytes], secret: bytes) -> int:
    assert process.stdin is not None
    try:
        process.stdin.write(secret + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # It has ended already; its code says how.
    return process.wait()


def _words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
