"""The coordinator's process: `python -m server.process FOLDER`, kept alive by `fedchorus server`."""

from __future__ import annotations

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


def _stop(coordinator: object, number: int, frame: FrameType | None) -> None:
    from server.coordinator import Coordinator

    assert isinstance(coordinator, Coordinator)
    coordinator.stop()


if __name__ == "__main__":
    main()
