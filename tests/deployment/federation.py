"""A federation in one process: real enrolment, seals, policies, gates and ledgers; Flower's messages in memory.

`Mail` stands for the SuperLink: it carries Flower messages between a `SealedTransport` and the sites' desks, and can
lose, alter, repeat or forge them on the way.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.desk import Desk
from client.enrol import accept, add_signatures, enrol, review
from client.initial import initial_parameters
from client.policy import Policy
from client.settings import Settings, SiteFolder
from client.site import SitePlan
from client.trainer_child import Loaded
from client.trainer_process import Opened
from privacy.enrolment import Invitation
from privacy.errors import FedchorusError
from privacy.keys import IdentityKey
from privacy.logbook import Logbook
from privacy.secagg.roster import Roster
from server.deployment import Deployment
from server.jobs import JobFolder
from server.membership import sign
from server.provision import provision
from server.sealed import SealedTransport
from strategies.job import Job
from strategies.messages import NOTHING, Ask, unflat
from strategies.parameters import Vector
from tests.strategies.jobs import raw_job

NAMES = ("north", "south", "west")
POLICY = """\
version = 1
purposes = ["training"]
[tasks]
allow = ["tabular-classification"]
[strategies]
allow = ["fedavg"]
[data.records]
unlimited = true
[privacy]
require = "none"
largest_delta = 0.1
minimum_noise_multiplier = 0.1
largest_epsilon = 100.0
allow_central = true
[secure_aggregation]
required = false
minimum_colluders = 0
"""


def deployed_job(**changes: Any) -> Job:
    """The smallest job as it travels."""
    from strategies.job import check_job

    raw = raw_job(**{"data": {"path": None, "client": None, "columns": {"x": {"range": [0, 1]}}}, **changes})
    return check_job(raw, where="a test").portable


class InProcess:
    """What `TrainerProcess` does, here: quick, and without its isolation."""

    isolation = "none: a test"

    def __init__(self, *, data: Path, **_: Any) -> None:
        self._data = data
        self.trained = 0

    def start(self) -> None: ...
    def close(self) -> None: ...

    def open(self, job: Job, site: str, evaluated: Vector = NOTHING) -> Opened:
        self._loaded = loaded = Loaded(job, site, self._data, evaluated)
        parameters, personal = loaded.trainer.parameters, loaded.strategy.traits.personal
        return Opened(len(loaded.data.train), len(loaded.data.test), parameters, "cpu", loaded.layout, personal)

    def plan(self, plan: SitePlan) -> None:
        self._loaded.plan(plan)

    def train(self, ask: Ask, memory: Vector | None) -> tuple[Vector, Vector | None]:
        self.trained += 1
        assert self._loaded.training is not None
        return self._loaded.training(ask, memory)

    def own_model(self, received: Vector, memory: Vector | None) -> Vector:
        return self._loaded.own_model(received, memory)

    def evaluate(self, model: Vector) -> dict[str, float]:
        return self._loaded.evaluate(model)


@dataclass
class Hospital:
    """One site's folder and its desk; `restart` is what a crash does to it."""

    folder: Path
    invitation: Invitation
    clock: Callable[[], float]
    said: io.StringIO = field(default_factory=io.StringIO)
    trainers: list[InProcess] = field(default_factory=list)
    desk: Desk = field(init=False)
    activations: int = 1
    pulls: int = 1
    answers: int = 0
    online: bool = True

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        files = SiteFolder(self.folder)
        self.desk = Desk(
            folder=files,
            settings=Settings.load(self.folder),
            policy=Policy.load(files.policy),
            invitation=self.invitation,
            identity=IdentityKey.load(files.identity),
            roster=Roster.load(files.roster),
            log=Logbook("site", None, stream=self.said),
            clock=self.clock,
            make_trainer=self._trainer,  # type: ignore[arg-type]  # The same methods.
        )

    def crash(self) -> None:
        self.restart()
        self.activations += 1

    def _trainer(self, **settings: Any) -> InProcess:
        self.trainers.append(InProcess(**settings))
        return self.trainers[-1]


@dataclass
class Mail:
    """Flower's grid and our door in memory. `on_way` sees each message before it is answered, `on_back` each answer."""

    sites: dict[str, Hospital]
    waiting: list[Message] = field(default_factory=list)
    answers: dict[str, Message] = field(default_factory=dict)
    carried: list[tuple[str, Message]] = field(default_factory=list)
    on_way: Callable[[str, RecordDict], RecordDict | None] = lambda site, content: content
    on_back: Callable[[str, RecordDict], RecordDict | None] = lambda site, content: content
    version: int = 0

    # What `SealedTransport` asks of Flower's grid.
    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
        self.waiting += messages
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        return [self.answers.pop(one) for one in ids if one in self.answers]

    # ... and of the door.
    def wait(self, since: int, timeout_s: float) -> tuple[int, dict[str, dict[str, Any]]]:
        self.version += 1
        keys = ("activations", "pulls", "answers", "online")
        nodes = {name: number for number, name in enumerate(self.sites, start=10)}
        return self.version, {
            name: {"node": nodes[name], **{key: getattr(site, key) for key in keys}}
            for name, site in self.sites.items()
        }

    def ring(self, sites: list[str]) -> None:
        for message in self.waiting:
            name = list(self.sites)[message.metadata.dst_node_id - 10]
            self.carried.append((name, message))
            self._deliver(name, self.sites[name], message)
        self.waiting = []

    def _deliver(self, name: str, site: Hospital, message: Message) -> None:
        content = self.on_way(name, message.content)
        if content is None:
            return  # Lost on the way.
        answer = answered(site.desk, content)
        site.pulls += 1
        if isinstance(answer, RecordDict):
            back = self.on_back(name, answer)
            if back is None:
                return
            reply = Message(back, reply_to=message)
        else:
            reply = Message(Error(1, "this site gives no answer"), reply_to=message)
        self.answers[message.metadata.message_id] = reply
        site.answers += 1


def answered(desk: Desk, content: RecordDict) -> RecordDict | FedchorusError:
    """What a node makes of one message's content."""
    header = content["header"]
    array = unflat(header["array"]) if "array" in header else unflat(content["vector"]["flat"].data)
    try:
        text, seal, answer = desk.answer(header["json"], header["seal"], array)
    except FedchorusError as error:
        desk.log.warning("gave no answer", why=str(error))
        return error
    from strategies.messages import flat_array

    return RecordDict({"header": ConfigRecord({"json": text, "seal": seal, "array": Array(flat_array(answer)).data})})


class Thorax:
    """Three hospitals and their coordinator, enrolled."""

    def __init__(self, folder: Path, *, policy: str = POLICY, rows: int = 40) -> None:
        self.folder, self.coordinator = folder, folder / "coordinator"
        self.now = datetime.now(UTC).timestamp()
        now = datetime.now(UTC)
        (folder / "federation.toml").write_text('name = "thorax"\naddress = "127.0.0.1:9"\n')
        self.invitation = provision(folder / "federation.toml", self.coordinator, now=now).invitation
        requests = [enrol(self.invitation, name, folder / name, policy=policy) for name in NAMES]
        sign(self.coordinator, requests, now=now)
        signatures = {}
        for number, name in enumerate(NAMES):
            site = folder / name
            roster = accept(site, review(site, self.coordinator / "kits" / f"{name}.kit.json"), now=now)
            signatures[name] = roster.signatures[name]
            with open(site / "site.toml", "a") as file:
                file.write('[data.records]\npath = "records.csv"\n')
            x = np.random.default_rng(number).uniform(0, 1, rows)
            pd.DataFrame({"x": x, "y": (x > 0.5).astype(int)}).to_csv(site / "records.csv", index=False)
        for name in NAMES:
            self.roster = add_signatures(folder / name, signatures)
        self.sites = {name: Hospital(folder / name, self.invitation, lambda: self.now) for name in NAMES}
        self.mail = Mail(self.sites)
        self.key = IdentityKey.load(self.coordinator / "identity.pem")
        self.transport = SealedTransport(
            self.mail,
            self.mail,
            self.key,
            {member.name: member.key for member in self.roster.members},
            deadline_s=1.0,
            step_timeout_s=1.0,
            clock=lambda: self.now,
        )

    def submit(self, job: Job, approvals: list[tuple[str, str]] | None = None) -> JobFolder:
        parameters, vector = initial_parameters(job)
        path = self.folder / "initial.safetensors"
        parameters.save(vector, path, {"job": job.hash, "round": "0"})
        jobs = self.coordinator / "jobs"
        return JobFolder.create(jobs, job, model=path.read_bytes(), approvals=approvals or [])

    def deployment(self, job: JobFolder) -> Deployment:
        ledger = self.coordinator / "server.jsonl"
        return Deployment(job, self.roster, self.transport, self.key, ledger, patience_s=0.05, pause_s=0.01)

    def run(self, job: JobFolder) -> None:
        with a_server_app():
            self.deployment(job).run()


@contextmanager
def a_server_app() -> Iterator[None]:
    """Flower lets only a running task make messages."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 8, 1
    try:
        yield
    finally:
        TaskIdentity._run_id = TaskIdentity._task_id = TaskIdentity._node_id = None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
