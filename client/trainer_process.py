"""The trainer seen from the node: a child process that is shut in, and started again when it dies.

The node holds keys, ledger and connection; the child holds records, model and the user's code, and no network. Nothing
of the child's is trusted: its frames are checked for size before they are read, its numbers for type, its errors for
length; what it prints stays in a small buffer here, since prints may hold records.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np

from client.life import Life, TookTooLong
from client.out_of_memory import OutOfMemory
from client.pipe import NOTHING, MalformedFrame, PipeClosed
from client.sandbox import Isolation, Sandbox, environment
from client.site import SitePlan
from client.trainer_child import sgd_record
from privacy.errors import DataError, JobError, RunError
from strategies.job import Job
from strategies.messages import Ask, header
from strategies.parameters import Parameters, Vector
from strategies.total import Layout

CHILD = (sys.executable, "-P", "-m", "client.trainer_child")
MOST_PARAMETERS = 2**34
_GRACE_S = 3.0
_T = TypeVar("_T")


class TrainerDied(RunError):
    """The trainer's process ended, or was ended, within a call, and again when the call was repeated."""


class TrainerFailed(RunError):
    """The trainer's process is there, and could not do what it was asked. Nothing of its records is in the text."""


@dataclass(frozen=True)
class Opened:
    """What the site needs to know of its data and model to plan; it stays at the site."""

    rows: int
    test_rows: int
    parameters: Parameters
    device: str
    layout: Layout
    personal: bool = False


@dataclass(frozen=True)
class Proof:
    """What the child could do when it tried, before any of the user's code was there."""

    network: bool
    hidden: bool
    writable: bool

    def words(self, sandbox: Sandbox) -> str:
        """For the site's report, in one line."""
        reach = [
            ("the network", self.network),
            ("the site's keys", self.hidden),
            ("writing to its data", self.writable),
        ]
        within = [what for what, reached in reach if reached]
        kind = "resource limits only" if sandbox.wrapper == "limits" else sandbox.wrapper
        if within:
            return f"{kind}: {', '.join(within)} within the trainer's reach"
        return f"{kind}: no network, the site's keys hidden, its data read-only"


class TrainerProcess:
    """One job's trainer in a process of its own: `start`, `open`, `plan`, then `train` and `evaluate` at will.

    `data` is the site's one data file or folder, `hidden` the folders that the child must not see (they have to be
    there), `code` the folder of the site's own task, `models` that of its pre-trained checkpoints, `engine` what
    trains ("edge" on small devices, `client.edge`). A call that takes longer than `timeout_s` kills the child and
    raises.

    | the child ...                    | the call ...                                                        |
    |----------------------------------|---------------------------------------------------------------------|
    | died since the last call         | starts it again, opens and plans as before, and goes on             |
    | dies within a call               | does the same and is made once more; then it raises `TrainerDied`   |
    | takes too long                   | kills it and raises `TrainerDied`, without another try              |
    | answers what is no answer        | kills it and raises `TrainerFailed`                                 |
    | says that the data are wrong     | raises its `DataError` or `JobError`                                |
    | has an error in the user's code  | raises `TrainerFailed` with the name of the error's kind            |

    For one caller at a time. Linux ends the child with the thread that made the call that started it. Use it as a
    context or `close` it: a child that is forgotten keeps its memory.
    """

    def __init__(
        self,
        *,
        data: Path,
        hidden: Sequence[Path] = (),
        code: Path | None = None,
        models: Path | None = None,
        engine: Literal["torch", "edge"] = "torch",
        isolation: Isolation = "auto",
        timeout_s: float = 3600.0,
        memory_bytes: int | None = None,
        child: Sequence[str] = CHILD,
    ) -> None:
        self._data, self._hidden, self._code, self._models = data, list(hidden), code, models
        self._engine = engine
        self._asked, self._timeout_s, self._memory_bytes = isolation, timeout_s, memory_bytes
        self._argv = list(child)
        self._output = bytearray()
        self._sandbox: Sandbox | None = None
        self._proof: Proof | None = None
        self._life: Life | None = None
        self._job: tuple[Job, str, Vector] | None = None
        self._opened: Opened | None = None
        self._plan: SitePlan | None = None

    @property
    def isolation(self) -> str:
        """What the child proved of its isolation, in words."""
        assert self._sandbox is not None and self._proof is not None, "start it first"  # noqa: PT018
        return self._proof.words(self._sandbox)

    @property
    def output(self) -> bytes:
        """The last 64 KiB that the child printed. It may hold records: for a person at the site, never for a log."""
        return bytes(self._output)

    def start(self) -> None:
        """Choose the isolation, start the child, let it prove what it cannot do.

        Raises `RunError` where `required` isolation cannot be had or does not hold.
        """
        self._sandbox = Sandbox.choose(self._asked)
        self._make(lambda life: None)

    def open(self, job: Job, site: str, evaluated: Vector = NOTHING) -> Opened:
        """Read and check the data, build the model. `evaluated` ((P,) float32) is, of an evaluation, the model that it
        evaluates. Raises `DataError` or `JobError` for what cannot work."""
        self._job = self._opened = self._plan = None

        def opened(life: Life) -> Opened:
            return self._open(life, job, site, evaluated)

        self._opened = self._make(opened)
        self._job = (job, site, evaluated)
        return self._opened

    def plan(self, plan: SitePlan) -> None:
        """Say how to train: what the gate charges for, number for number."""
        assert self._job is not None and self._opened is not None, "open it first"  # noqa: PT018
        self._plan = None
        self._make(lambda life: self._tell_plan(life, plan))
        self._plan = plan

    def train(self, ask: Ask, memory: Vector | None = None) -> tuple[Vector, Vector | None]:
        """Train on what is asked with; the contribution ((layout.size,) float32), this call's own memory.

        `memory` is what the site kept in the round before ((layout.memory,) float32, None in its first); what it keeps
        now comes along. `ask` is one that the gate has checked. A repeated call is no further release: of the first
        nothing came.
        """
        assert self._plan is not None and self._opened is not None, "plan it first"  # noqa: PT018
        layout = self._opened.layout
        # What the child says of its model's size costs no memory here: it is the gate's model that has it.
        assert ask.model.size == layout.asked, "the gate checks the model"
        call = {"call": "train", "ask": header(ask), "remembers": memory is not None}
        answer = self._array(call, _joined(ask.model, memory), layout.size + layout.memory)
        return answer[: layout.size], answer[layout.size :] if layout.memory else None

    def own_model(self, received: Vector, memory: Vector | None) -> Vector:
        """The model ((P,) float32) of this site, which received this and keeps that."""
        assert self._opened is not None, "open it first"
        assert received.size == self._opened.layout.asked, "the gate checks what was received"
        call = {"call": "own", "remembers": memory is not None}
        return self._array(call, _joined(received, memory), self._opened.parameters.size)

    def _array(self, call: dict[str, Any], array: Vector, size: int) -> Vector:
        """What a call answers with, an array of `size` numbers."""
        into = np.empty(size, np.float32)

        def answered(life: Life) -> Vector:
            if not self._ask(life, call, array, into=into)["array"]:
                raise MalformedFrame("it has no array")
            return into

        return self._make(answered)

    def evaluate(self, model: Vector) -> dict[str, float]:
        """The means of the task's metrics over the test rows, and `rows`, their number. They stay at the site.

        `model` is (P,) float32.
        """
        assert self._opened is not None, "open it first"
        assert model.size == self._opened.parameters.size, "the gate checks the model"

        def evaluated(life: Life) -> dict[str, float]:
            metrics = self._ask(life, {"call": "evaluate"}, model).get("metrics")
            if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
                raise MalformedFrame("its metrics are not numbers")
            return {str(name): float(value) for name, value in metrics.items()}

        return self._make(evaluated)

    def close(self) -> None:
        """End the child, wait for its end. Calling it twice is allowed; `start` begins anew."""
        life, self._life = self._life, None
        self._job = self._opened = self._plan = None
        if life is None:
            return
        # One that does not listen is killed all the same.
        with contextlib.suppress(PipeClosed, TookTooLong):
            life.say({"call": "close"}, timeout_s=_GRACE_S)
        life.end(grace_s=_GRACE_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self, call: Callable[[Life], _T]) -> _T:
        if self._life is not None and self._life.has_ended:
            self._give_up(grace_s=0.0)
        how = ""
        for _ in range(2):
            try:
                if self._life is None:
                    self._revive()
                assert self._life is not None
                return call(self._life)
            except PipeClosed:
                how = self._give_up(grace_s=_GRACE_S)
            except TookTooLong:
                self._give_up(grace_s=0.0)
                raise TrainerDied(
                    f"the trainer took longer than {self._timeout_s:g} s and was ended; check the task for a loop "
                    "without an end, or raise the limit"
                ) from None
            except MalformedFrame as error:
                self._give_up(grace_s=0.0)
                raise TrainerFailed(
                    f"the trainer's answer was refused ({error}); check that the task leaves the process's files alone"
                ) from None
            except BaseException:
                # An interrupt in the middle of a frame: what follows could not be told from its rest.
                if self._life is not None and not self._life.at_rest:
                    self._give_up(grace_s=0.0)
                raise
        raise TrainerDied(f"the trainer {how} twice in the same call; {self._advice()}")

    def _advice(self) -> str:
        if self._proof is None and self._output:  # It never got as far as the records: its words can be told.
            return f"its last words: {_line(self._output.decode(errors='replace').splitlines()[-1])}"
        return "check the machine's free memory, and the task with `fedchorus simulate` on invented data"

    def _give_up(self, *, grace_s: float) -> str:
        life, self._life = self._life, None
        return life.end(grace_s=grace_s) if life is not None else "could not be started"

    def _revive(self) -> None:
        """Start a child and bring it to where the last one was."""
        assert self._sandbox is not None, "start it first"
        command = self._sandbox.command(
            self._argv,
            readable=[path for path in (self._data, self._code, self._models) if path is not None],
            hidden=self._hidden,
            memory_bytes=self._memory_bytes,
        )
        self._life = life = Life(command, environment(self._code, models=self._models), self._output)
        try:
            self._proof = self._prove(life, self._sandbox)
            if self._job is not None and self._open(life, *self._job) != self._opened:
                raise DataError(
                    f"{self._data}: the data changed while the job ran; bring them back, or start a new job"
                )
            if self._plan is not None:
                self._tell_plan(life, self._plan)
        except (RunError, DataError, JobError):
            self._give_up(grace_s=0.0)  # It is not where the last one was, and no call may take it for that.
            raise

    def _prove(self, life: Life, sandbox: Sandbox) -> Proof:
        with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.1", 0))
            ports = {"tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1]}
            paths = {"data": str(self._data.resolve()), "hidden": [str(path.resolve()) for path in self._hidden]}
            found = self._ask(life, {"call": "prove", **ports, **paths})
            claimed = [found.get(name) for name in ("network", "hidden", "writable")]
            if not all(type(value) is bool for value in claimed):
                raise MalformedFrame("it proves nothing")
            network, hidden, writable = (bool(value) for value in claimed)
            proof = Proof(network or _heard(tcp) or _heard(udp), hidden, writable)
        if self._asked == "required" and (proof.network or proof.hidden or proof.writable):
            raise RunError(f"isolation is required, but does not hold ({proof.words(sandbox)}); nothing was opened")
        return proof

    def _open(self, life: Life, job: Job, site: str, evaluated: Vector) -> Opened:
        call = {"call": "open", "job": job.toml.decode(), "site": site, "data": str(self._data.resolve())}
        call["engine"] = self._engine
        answer = self._ask(life, call, evaluated)
        if answer.get("job") != job.hash:
            raise MalformedFrame("it is for another job")
        device = answer.get("device")
        if not isinstance(device, str):
            raise MalformedFrame("it names no device")
        rows, test_rows = _count(answer.get("rows")), _count(answer.get("test_rows"))
        layout, personal = _layout(answer.get("layout"))
        parameters = _parameters(answer.get("shapes"), layout.received_only)
        return Opened(rows, test_rows, parameters, _line(device), layout, personal)

    def _tell_plan(self, life: Life, plan: SitePlan) -> None:
        self._ask(life, {"call": "plan", "rows": plan.rows, "sgd": sgd_record(plan.sgd)})

    def _ask(
        self, life: Life, call: dict[str, Any], array: Vector = NOTHING, *, into: Vector | None = None
    ) -> dict[str, Any]:
        answer = life.exchange(call, array, into=into, timeout_s=self._timeout_s)
        if "error" not in answer:
            return answer
        kind, says, memory = answer["error"], answer.get("says"), answer.get("memory")
        if isinstance(memory, dict) and (error := OutOfMemory.told(memory)) is not None:
            raise error
        # Later the user's code has met records, and could say so in the text of an error.
        if isinstance(says, str) and kind in ("DataError", "JobError") and call["call"] in ("open", "plan"):
            raise (DataError if kind == "DataError" else JobError)(_line(says))
        # A class can be named after a record only by who means to: the name is a word, and short.
        word = kind if isinstance(kind, str) and kind.isidentifier() and len(kind) <= 64 else "an error"
        raise TrainerFailed(
            f"the task failed with {word} in the call {call['call']!r}; run it with `fedchorus simulate` on invented "
            "data to see all of the error"
        )


def _heard(port: socket.socket) -> bool:
    """Whether something arrived at a listener or a datagram socket."""
    port.setblocking(False)
    try:
        if port.type == socket.SOCK_STREAM:
            port.accept()[0].close()
        else:
            port.recv(16)
    except BlockingIOError:
        return False
    return True


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < MOST_PARAMETERS:
        raise MalformedFrame("one of its counts is not a positive whole number")
    return value


def _parameters(shapes: Any, received_only: int) -> Parameters:
    """What the child says of its arrays; the last of them, of `received_only` scalars together, are received only."""
    named: dict[str, tuple[int, ...]] = {}
    for item in shapes if isinstance(shapes, list) else []:
        match item:
            case [str(name), list(sizes)] if name not in named:
                named[name] = tuple(_count(size) for size in sizes)
            case _:
                raise MalformedFrame("its shapes are malformed")
    _count(math.prod(1 for _ in named) and sum(math.prod(shape) for shape in named.values()))
    last: list[str] = []
    while sum(math.prod(named[name]) for name in last) < received_only and len(last) < len(named):
        last.insert(0, list(named)[-1 - len(last)])
    if sum(math.prod(named[name]) for name in last) != received_only:
        raise MalformedFrame("what it says of its arrays does not add up")
    return Parameters(named, tuple(last))


def _layout(told: Any) -> tuple[Layout, bool]:
    """What the strategy sends and keeps, and whether it makes a model of the site's own."""
    match told:
        case {
            "sent": sent,
            "metrics": list(metrics),
            "received": received,
            "memory": int(memory),
            "received_only": int(last),
            "personal": bool(own),
        }:
            sent, received = _count(sent), _count(received)
            small = 0 <= memory < MOST_PARAMETERS and 0 <= last < MOST_PARAMETERS
            if all(isinstance(name, str) for name in metrics) and small:
                return Layout(sent, tuple(metrics), None if received == sent else received, memory, last), own
    raise MalformedFrame("its layout is malformed")


def _joined(array: Vector, memory: Vector | None) -> Vector:
    return array if memory is None else np.concatenate([array, memory])


def _line(text: str) -> str:
    """One printable line of at most 500 characters."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())[:500]
