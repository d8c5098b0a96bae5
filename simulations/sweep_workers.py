"""Processes that check and run the jobs of a sweep, each one job at a time; both ends of the pipe are in this file.

They talk in lines of JSON over the child's standard input and output. A child has a session of its own, so that Ctrl-C
reaches it only through its parent, and it kills itself with all that it started once its input closes: however the
parent ends, nothing is left behind. A child that dies fails the job that it had, and another takes its place. What it
prints goes nowhere, as a stack trace may hold records; the run by itself shows the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from privacy.errors import FedchorusError, RunError
from strategies.job import Job, check_job, stored_job

CHILD = (sys.executable, "-P", "-m", "simulations.sweep_workers")
POLL_S = 0.2  # How soon a wish to stop is seen.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
RELEASED = ("ledgers", "server.jsonl", "metrics.jsonl")


@dataclass(frozen=True)
class Request:
    """Check whether `job` can run, or run it, or go on with it, in the folder `path`."""

    what: Literal["check", "run"]
    job: Job
    path: Path


@dataclass(frozen=True)
class Answer:
    """How a request ended: `done`, `stopped` early because that was asked for, or `failed`, with the reason."""

    ended: Literal["done", "stopped", "failed"]
    why: str = ""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Processes:
    """At most `number` processes that answer requests. Use it as a context: leaving it kills those that are there.

    Each computes with its share of the machine's cores, or with OMP_NUM_THREADS threads where that is set.
    """

    def __init__(self, number: int, *, child: Sequence[str] = CHILD) -> None:
        self._number, self._command = number, list(child)
        self._lines: queue.SimpleQueue[tuple[_Child, bytes]] = queue.SimpleQueue()
        self._idle: list[_Child] = []
        self._busy: dict[_Child, Request] = {}
        self._environment = {
            **dict.fromkeys(THREADS, str(max(1, cores() // number))),
            **os.environ,
            # The job may name a strategy or task that is found from here.
            "PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in [*self._idle, *self._busy]:
            child.kill()
        self._idle, self._busy = [], {}

    def answers(self, requests: Sequence[Request], *, stop: Callable[[], bool]) -> Iterator[tuple[Request, Answer]]:
        """Yield each request with its answer as it comes.

        Once `stop` says so, no more are begun, and runs end after their round with `stopped`. A process that dies
        answers `failed`.
        """
        waiting, stopping = deque(requests), False
        while True:
            if stop() and not stopping:
                stopping = True
                waiting.clear()
                for child in self._busy:
                    child.say({"what": "stop"})
            while waiting and len(self._busy) < self._number:
                self._give(waiting.popleft())
            if not self._busy:
                return
            with contextlib.suppress(queue.Empty):
                child, line = self._lines.get(timeout=POLL_S)
                if child in self._busy:  # Not so if an idle one died.
                    yield self._busy.pop(child), self._answer(child, line)

    def _give(self, request: Request) -> None:
        while self._idle and not self._idle[-1].lives:
            self._idle.pop().kill()
        child = self._idle.pop() if self._idle else _Child(self._command, self._environment, self._lines)
        self._busy[child] = request
        child.say({"what": request.what, "job": request.job.toml.decode(), "path": str(request.path)})

    def _answer(self, child: _Child, line: bytes) -> Answer:
        with contextlib.suppress(ValueError, TypeError):
            answer = Answer(**json.loads(line))
            self._idle.append(child)
            return answer
        how = child.kill(patience_s=1.0)
        return Answer("failed", f"its process {how}; fewer --jobs need less memory, and the run by itself shows more")


class _Child:
    """One process, and the thread that puts its lines, and an empty one when it ends, into `lines`."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], lines: queue.SimpleQueue[tuple[_Child, bytes]]
    ) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"a process for the sweep cannot be started: {command[0]}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._thread.start()

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def say(self, words: Mapping[str, str]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has died, which its empty line tells.
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()

    def kill(self, *, patience_s: float = 0.0) -> str:
        """End it and whatever it started, unless it ends by itself before; how it ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def _read(self, lines: queue.SimpleQueue[tuple[_Child, bytes]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.put((self, line))
        lines.put((self, b""))


# --- the child ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer the requests that come on standard input, until it closes."""
    requests: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    stopping = threading.Event()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # What a task prints is no answer.
        threading.Thread(target=_listen, args=(requests, stopping), daemon=True).start()
        while True:
            answer = answer_to(requests.get(), stop=stopping.is_set)
            answers.write(json.dumps(vars(answer)) + "\n")
            answers.flush()


def _listen(requests: queue.SimpleQueue[dict[str, str]], stopping: threading.Event) -> None:
    try:
        for line in sys.stdin:
            request = json.loads(line)
            if request["what"] == "stop":
                stopping.set()
            else:
                requests.put(request)
    finally:  # Also of a request that was cut short: whoever made it is gone.
        os.killpg(os.getpgrp(), signal.SIGKILL)


def answer_to(request: Mapping[str, str], *, stop: Callable[[], bool]) -> Answer:
    """Do what a request asks for. Errors that nobody foresaw end the process."""
    try:
        job, path = check_job(tomllib.loads(request["job"]), where=request["path"]), Path(request["path"])
        return _check(job) if request["what"] == "check" else _run(job, path, stop)
    except FedchorusError as error:
        return Answer("failed", str(error))
    except OSError as error:
        return Answer("failed", f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        return Answer("failed", f"it needs the package {error.name}, which is not installed")


def _check(job: Job) -> Answer:
    """Whatever `start_run` would refuse before it makes a folder."""
    from simulations.federation import Federation

    federation = Federation.load(job)
    federation.plans()
    federation.release_plan()
    return Answer("done")


def _run(job: Job, path: Path, stop: Callable[[], bool]) -> Answer:
    from simulations.run_folder import RunFolder
    from simulations.simulate import Watcher, resume_run, start_run

    watcher, begun = Watcher(stop=stop), path / "job.toml"
    if begun.is_file():
        if begun.stat().st_size and stored_job(begun).hash != job.hash:
            raise RunError(f"{path}: holds a run of another job than the sweep's; move it away")
        if any((path / name).exists() for name in RELEASED):
            return Answer("stopped" if resume_run(path, watcher=watcher) is None else "done")
        with RunFolder.open(path).locked():
            # It ended while it was prepared, before anything was released. By another name at once: what is left of
            # a folder whose removal is cut short is no run.
            shutil.rmtree(path.rename(path.with_name(f".removed-{path.name}-{os.getpid()}")))
    summary = start_run(job, out=path, parent=path.parent, watcher=watcher, now=datetime.now())
    return Answer("stopped" if summary is None else "done")


if __name__ == "__main__":
    main()
