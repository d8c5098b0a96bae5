"""The coordinator's process: `python -m server.process FOLDER`, kept alive by `fedchorus server`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from privacy.errors import FedchorusError
from privacy.logbook import Logbook
from privacy.supervisor import NEEDS_A_PERSON, STOPPED, end_with_parent


def main() -> None:
    folder = Path(sys.argv[1])
    log = Logbook("server", folder / "log.jsonl")
    passphrase = sys.stdin.buffer.readline().rstrip(b"\n") or None
    end_with_parent()
    try:
        from server.coordinator import Coordinator

        _stay_small()
        logging.getLogger("flwr").setLevel(logging.ERROR)
        coordinator = Coordinator(folder, log, passphrase)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: _stop(coordinator, number, frame))
        coordinator.serve()
    except FedchorusError as error:
        log.error("cannot run", why=str(error))
        sys.exit(NEEDS_A_PERSON)
    log.info("stopped")
    sys.exit(STOPPED)


def _stay_small() -> None:
    """Let memory that messages took go back to the system when they are gone.

    What is imported stays, so no search for garbage need look through it again. And glibc would keep freed blocks for
    each thread: here all threads share two heaps, and large blocks are never of them.
    """
    gc.collect()
    gc.freeze()
    arenas, threshold = -8, -3  # M_ARENA_MAX and M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # Another C library.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(arenas, 2)
        mallopt(threshold, 2**18)


def _stop(coordinator: object, number: int, frame: FrameType | None) -> None:
    from server.coordinator import Coordinator

    assert isinstance(coordinator, Coordinator)
    coordinator.stop()


if __name__ == "__main__":
    main()
