"""What runs inside the sandbox: `python -m client.trainer_child`. It holds the records, the model and the user's code.

It answers its parent's calls one after the other through the socket that it finds as descriptor 0, and ends with it.
Whatever the user's code prints goes to descriptors 1 and 2, which the parent keeps apart. What an error says leaves
this process only as long as no record has met the user's code; afterwards it is the name of its kind, and no more:
but for want of memory, of which it tells counts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from client.out_of_memory import OutOfMemory
from client.pipe import NOTHING, Pipe, PipeClosed
from privacy.dpsgd import RecordLevelSgd
from privacy.errors import DataError, JobError
from privacy.mechanism import GaussianSum
from privacy.noise import OsNoise
from strategies.catalogue import strategy_for
from strategies.job import Job, check_job
from strategies.messages import Ask, parse_request
from strategies.parameters import Vector
from strategies.total import layout_for

# torch and pandas are imported once a job is opened, after the isolation was proved; with the edge engine not at all.
if TYPE_CHECKING:
    from client.data import SiteData
    from client.local import LocalTraining
    from client.site import SitePlan
    from client.training import Trainer

_PROBE_S = 1.0


class Loaded:
    """One job at one site: its data, its model, what trains it. `evaluated` ((P,) float32) is, of an evaluation, the
    model that it evaluates; `engine` what trains: "torch", or "edge" (`client.edge`)."""

    def __init__(self, job: Job, site: str, data: Path, evaluated: Vector = NOTHING, *, engine: str = "torch") -> None:
        self.job, self.site, self.strategy = job, site, strategy_for(job)
        self.trainer: Trainer
        self.data: SiteData
        if engine == "edge":
            from client.edge import open_edge

            # Not of these classes, but with all of theirs that is used here and by `LocalTraining`.
            self.trainer, self.data = cast("tuple[Trainer, SiteData]", open_edge(job, site=site, path=data))
        else:
            self.trainer, self.data = _with_torch(job, site, data, evaluated)
        self.trainer.try_out(self.data.train)
        self.layout = layout_for(job, self.trainer.parameters, self.strategy.traits)
        self.test = self.trainer.place(self.data.test)
        self.training: LocalTraining | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "job": self.job.hash,
            "rows": len(self.data.train),
            "test_rows": len(self.data.test),
            "layout": {
                "sent": self.layout.parameters,
                "metrics": list(self.layout.metrics),
                "received": self.layout.asked,
                "memory": self.layout.memory,
                "received_only": self.layout.received_only,
                "personal": self.strategy.traits.personal,
            },
            "shapes": [[name, list(shape)] for name, shape in self.trainer.parameters.shapes.items()],
            "device": str(self.trainer.device),
        }

    def plan(self, plan: SitePlan) -> None:
        """Make ready to train as the gate charges for. Raises `JobError` for a plan of another job or other rows."""
        from client.local import LocalTraining

        if plan.rows != len(self.data.train):
            raise JobError(
                f"{self.site}: the plan is for {plan.rows} training rows, the data have {len(self.data.train)}"
            )
        if (plan.sgd is None) != (self.job.privacy.record is None):
            raise JobError(f"{self.site}: the plan and the job differ on record-level privacy")
        noise = OsNoise()
        self.training = LocalTraining(
            self.site,
            job=self.job,
            plan=plan,
            strategy=self.strategy,
            trainer=self.trainer,
            records=self.data.train,
            layout=self.layout,
            noise=lambda _round_number: noise,
        )

    def own_model(self, received: Vector, memory: Vector | None) -> Vector:
        """The model of this site, which received this and keeps that."""
        from client.memory import own_model

        return own_model(self.strategy, received, memory, self.trainer.parameters)

    def evaluate(self, model: Vector) -> dict[str, float]:
        self.trainer.load(model)
        if not len(self.test):
            return {"rows": 0}
        figures = self.trainer.figures(self.trainer.outputs(self.test.features), self.test.targets)
        return {**{name: value for name, value in figures.items() if value is not None}, "rows": len(self.test)}


def _with_torch(job: Job, site: str, data: Path, evaluated: Vector) -> tuple[Trainer, SiteData]:
    from client.data import class_count
    from client.evaluation import Judge
    from client.reading import feature_count, records_of, site_data
    from client.tables import read_frame
    from client.tasks import initial_model, task_for
    from client.training import Trainer

    # The task's own code is built before records are read: what it says in an error cannot hold one.
    task = task_for(job)
    judge = Judge(job) if job.evaluation is not None else None
    model = initial_model(task, features=feature_count(job), classes=class_count(job.data), seed=job.seed)
    trainer = Trainer(task, model, job.training)
    records = records_of(read_frame(data, job.data), job, where=str(data))
    rows = site_data(records, job, site=site) if judge is None else judge.site_data(records, evaluated, site=site)
    return trainer, rows


class Child:
    """The calls that a parent can make, in the order of a job."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._loaded: Loaded | None = None
        self._calls: dict[str, Callable[[dict[str, Any], Vector], tuple[dict[str, Any], Vector]]] = {
            "prove": self._prove,
            "open": self._open,
            "plan": self._plan,
            "train": self._train,
            "own": self._own,
            "evaluate": self._evaluate,
        }

    def serve(self) -> None:
        """Answer until the parent says `close` or is gone."""
        while True:
            call, given = self._pipe.receive_any()
            name = call.pop("call")
            if name == "close":
                return
            try:
                answer, array = self._calls[name](call, given)
            except Exception as error:  # noqa: BLE001  # The user's code may raise anything, and the job goes on.
                traceback.print_exc()
                told = isinstance(error, JobError | DataError) and name in ("open", "plan")
                answer = {"error": type(error).__name__, "says": str(error) if told else None}
                if isinstance(error, OutOfMemory):
                    answer["memory"] = error.fields
                array = NOTHING
            self._pipe.send(answer, array)

    def _prove(self, call: dict[str, Any], _given: Vector) -> tuple[dict[str, Any], Vector]:
        """Try what the sandbox should prevent, before any of the user's code could help it to look shut in."""
        _send_datagram(call["udp"])
        found = {
            "network": _connects(call["tcp"]),
            "hidden": any(_shows_something(path) for path in call["hidden"]),
            "writable": _opens_for_writing(call["data"]),
        }
        return found, NOTHING

    def _open(self, call: dict[str, Any], given: Vector) -> tuple[dict[str, Any], Vector]:
        self._loaded = None
        job = check_job(tomllib.loads(call["job"]), where="the job")
        engine = call.get("engine", "torch")
        self._loaded = Loaded(job, call["site"], Path(call["data"]), given, engine=engine)
        return self._loaded.describe(), NOTHING

    def _plan(self, call: dict[str, Any], _given: Vector) -> tuple[dict[str, Any], Vector]:
        from client.site import SitePlan

        assert self._loaded is not None
        self._loaded.plan(SitePlan(call["rows"], sgd=sgd_from(call["sgd"])))
        return {}, NOTHING

    def _train(self, call: dict[str, Any], given: Vector) -> tuple[dict[str, Any], Vector]:
        assert self._loaded is not None
        assert self._loaded.training is not None
        layout = self._loaded.layout
        ask = parse_request(call["ask"], given[: layout.asked])
        assert isinstance(ask, Ask)
        contribution, kept = self._loaded.training(ask, given[layout.asked :] if call["remembers"] else None)
        return {}, contribution if kept is None else np.concatenate([contribution, kept])

    def _own(self, call: dict[str, Any], given: Vector) -> tuple[dict[str, Any], Vector]:
        assert self._loaded is not None
        received = self._loaded.layout.asked
        memory = given[received:] if call["remembers"] else None
        return {}, self._loaded.own_model(given[:received], memory)

    def _evaluate(self, _call: dict[str, Any], given: Vector) -> tuple[dict[str, Any], Vector]:
        assert self._loaded is not None
        return {"metrics": self._loaded.evaluate(given)}, NOTHING


def sgd_record(sgd: RecordLevelSgd | None) -> dict[str, Any] | None:
    """What `sgd_from` makes the same training of, number for number, after a way through JSON."""
    if sgd is None:
        return None
    mechanism = sgd.mechanism
    return {
        "clip_norm": mechanism.clip_norm,
        "noise_multiplier": mechanism.noise_multiplier,
        "layers": list(mechanism.layers),
        "sampling_rate": sgd.sampling_rate,
        "steps": sgd.steps,
    }


def sgd_from(record: dict[str, Any] | None) -> RecordLevelSgd | None:
    if record is None:
        return None
    mechanism = GaussianSum(
        clip_norm=record["clip_norm"],
        noise_multiplier=record["noise_multiplier"],
        layers=tuple(record["layers"]),
    )
    return RecordLevelSgd(mechanism=mechanism, sampling_rate=record["sampling_rate"], steps=record["steps"])


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), _PROBE_S).close()
    except OSError:
        return False
    return True


def _send_datagram(port: int) -> None:
    """Whether it arrives the parent sees: on a loopback of the child's own sending it works as well."""
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.sendto(b"?", ("127.0.0.1", port))


def _shows_something(folder: str) -> bool:
    try:
        return bool(os.listdir(folder))
    except OSError:
        return False


def _opens_for_writing(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError:
        return False
    return True


def main() -> None:
    # Off descriptor 0, and not inherited: nothing that the user's code starts holds the parent's line.
    end = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        Child(Pipe(end)).serve()
    except PipeClosed:
        pass  # The parent has gone, or has given this process up.
    finally:
        end.close()
    # Without the user's exit handlers and threads, which nobody waits for.
    os._exit(0)


if __name__ == "__main__":
    main()
