"""What a site does with a message: the seal, the policy, the gate; and one constant answer for everything it refuses.

The order for an offer is the guarantee: seal -> job as it was hashed -> approvals, and all of the policy that needs no
data, with what it would run by its content -> the data and the task's code, in the trainer's process -> what it costs,
by the policy -> the plan in the ledger -> agreed. For a round: seal -> policy -> gate (`client.gate`, `client.secure`).
What is refused is explained in the site's own log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client.content import content_of
from client.history import History
from client.memory import SiteMemory
from client.policy import JobRequest, Policy, set_budgets
from client.secure import Stopwatch
from client.seen import SeenNonces
from client.settings import Settings, SiteFolder
from client.site import Files, Seat, Site, SitePlan
from client.trainer_process import Opened, TrainerProcess
from privacy.budget import SiteBudget
from privacy.enrolment import Invitation
from privacy.errors import DataError, FedchorusError, Refused, RunError
from privacy.keys import IdentityKey, is_signed_by
from privacy.ledger import Ledger
from privacy.logbook import Logbook
from privacy.noise import OsNoise
from privacy.record_folder import RecordFolder
from privacy.secagg.client import InMemory
from privacy.secagg.roster import Roster
from strategies.envelope import COORDINATOR, Seal, array_digest
from strategies.evaluation import reads_alike
from strategies.job import Job, parse_job
from strategies.measured import measures
from strategies.messages import (
    NOTHING,
    Agreed,
    Answer,
    Ask,
    Deliver,
    Offer,
    Refusal,
    Request,
    Step,
    Words,
    approval_of,
    check_deliver,
    flat_array,
    header,
    parse_request,
)
from strategies.parameters import Parameters, Vector, vector_hash
from strategies.secure import SecureSum

PRIVATE = ("keys", "state", "ledgers")  # What the trainer must not see.
MOST_PATIENCE_S = 7 * 24 * 3600.0
MOST_REPEATS = 60  # Of rounds, in a job that no ledger holds to its plan.
DEADLINE_S = 3600.0  # For training once, where the job says nothing.


def plan_of(job: Job, opened: Opened, *, sites: int, site: str) -> tuple[SitePlan, SecureSum | None]:
    """What a job will do and cost at `site`, with the data that its trainer opened; its secure sum, if it has one.

    Raises `JobError` for what cannot be protected, `BudgetExceeded` for what exceeds the job's own limits.
    """
    sizes, secure = opened.parameters.trained_sizes, None
    if job.secure_aggregation is not None:
        secure = SecureSum.make(job, sites=sites, layout=opened.layout, layers=sizes, most_rows=opened.rows)
    plan = SitePlan.make(
        job,
        rows=opened.rows,
        parameters=opened.parameters.trained,
        rng=OsNoise.kind,
        site=site,
        layers=sizes,
        secure=secure,
    )
    return plan, secure


def models_of(settings: Settings, folder: Path) -> Path | None:
    """The folder of the site's pre-trained checkpoints. Raises `RunError` for one that is not there."""
    if settings.trainer.models is None:
        return None
    path = (folder / settings.trainer.models).resolve()
    if not path.is_dir():
        raise RunError(f"trainer.models: {path} is no folder; correct it in site.toml")
    return path


def evaluated_model(job: Job, state: Path) -> Vector:
    """Of an evaluation the model that this site was delivered, or made its own of; of other jobs nothing.

    `state` is the site's folder of what it keeps. Raises `Refused` for a job that this site has not finished, or one of
    other data or another task.
    """
    choice = job.evaluation
    if choice is None:
        return NOTHING
    folder = state / "jobs" / choice.of
    shared, own = folder / "model.safetensors", folder / "own_model.safetensors"
    path = shared if choice.model == "shared" else own
    if not path.is_file() or not shared.is_file():
        raise Refused(f"an evaluation of job {choice.of[:12]}, of which this site has no {choice.model} model")
    trained = parse_job((folder / "job.toml").read_text(encoding="utf-8"), where="the evaluated job")
    if measures(trained) is not None:
        raise Refused(f"an evaluation of job {choice.of[:12]}, which trained no model")
    if vector_hash(Parameters.load(shared)[1]) != choice.model_hash:
        raise Refused(f"an evaluation of another model than job {choice.of[:12]} ended with here")
    if not reads_alike(job, trained):
        raise Refused(f"an evaluation of job {choice.of[:12]} that reads other data, or for another task")
    return Parameters.load(path)[1]


@dataclass
class _Seated:
    """A job that this site agreed to, and what serves it."""

    job: Job
    site: Site
    folder: RecordFolder
    budget: SiteBudget | None
    first_model: str
    opened: Opened


@dataclass
class Desk:
    """One site's answers. For one caller at a time; `close` ends the trainer's process."""

    folder: SiteFolder
    settings: Settings
    policy: Policy
    invitation: Invitation
    identity: IdentityKey
    roster: Roster
    log: Logbook
    clock: Callable[[], float] = time.time
    make_trainer: Callable[..., TrainerProcess] = TrainerProcess
    history: History = field(init=False)
    answered: int = 0
    refused: int = 0
    _seen: SeenNonces = field(init=False)
    _seated: _Seated | None = None
    _trainer: TrainerProcess | None = None
    _noise: OsNoise = field(default_factory=OsNoise)

    def __post_init__(self) -> None:
        self.folder.state.mkdir(mode=0o700, exist_ok=True)
        self.history = History(self.folder.state / "history.jsonl")
        self._seen = SeenNonces(self.folder.state / "nonces")

    @property
    def name(self) -> str:
        return self.settings.name

    def answer(self, text: str, seal: str, array: Vector | Words) -> tuple[str, str, Answer]:
        """Answer one sealed message: the answer's header, its seal and itself.

        Raises a `FedchorusError` where there is to be no answer: nothing of it may leave.
        """
        sealed = Seal.parse(seal)
        self._check_seal(sealed, text, array)
        request = parse_request(text, array)
        answer = self._answer(request)
        said = header(answer)
        now = self.clock()
        reply = Seal(
            kind="answer", sender=self.name, recipient=COORDINATOR, nonce=sealed.nonce, time=now, until=sealed.until
        )
        return said, reply.signed(self.identity, said, array_digest(flat_array(answer))).text, answer

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
        self._seated = None

    def _check_seal(self, seal: Seal, text: str, array: Vector | Words) -> None:
        expected = {"kind": "request", "sender": COORDINATOR, "recipient": self.name}
        seal.check(self.invitation.coordinator, text, array_digest(array), **expected)
        now, skew = self.clock(), self.settings.max_clock_skew_s
        if seal.time > now + skew or now > seal.until + skew:
            away, how = (seal.time - now, "ahead of") if seal.time > now else (now - seal.until, "behind")
            raise Refused(
                f"a message is {away:.0f} s {how} this site's clock, and {skew:g} s are allowed (site.toml); set both "
                "clocks by NTP"
            )
        if seal.until - seal.time > MOST_PATIENCE_S:
            raise Refused("a message that is to be believed for longer than a week")
        self._seen.add(seal.nonce, until=seal.until + skew, now=now)

    def _answer(self, request: Request) -> Answer:
        match request:
            case Offer():
                return self._consider(request)
            case Deliver():
                return self._keep(request)
        return self._round(request)

    # -- offers --------------------------------------------------------------------------------------------------------

    def _consider(self, offer: Offer) -> Answer:
        try:
            seated = self._take_seat(offer)
        except (FedchorusError, OSError) as error:
            # Whatever it is, the server learns that this site does not take part, and no more.
            self.refused += 1
            why = str(error) if isinstance(error, FedchorusError) else type(error).__name__
            self.log.warning("refused a job", job=offer.job, why=why)
            self.close()
            return Refusal(self.name, offer.job, 0)
        self.log.info("agreed to a job", job=offer.job, name=seated.job.name, rounds=seated.job.training.rounds)
        return Agreed(self.name, offer.job, 0, seated.budget.ledger.head if seated.budget is not None else None)

    def _take_seat(self, offer: Offer) -> _Seated:
        if self._seated is not None and self._seated.job.hash == offer.job:
            return self._seated
        self.close()
        job = parse_job(offer.toml, where="the offered job")
        if job.hash != offer.job or job != job.portable:
            raise Refused("the offered job is not the one that its hash names")
        if offer.version != version("fedchorus"):
            raise Refused(f"the server runs fedchorus {offer.version}, this site {version('fedchorus')}; agree on one")
        approved = approval_of(job.hash, offer.model_hash)
        approvals = frozenset(
            key for key, signature in offer.approvals if is_signed_by(key, bytes.fromhex(signature), approved)
        )
        request = JobRequest(
            job=job,
            parameters=offer.parameters,
            sites=len(self.roster.members),
            plan=SitePlan(0),
            code=content_of(job),
            approvals=approvals,
            approvers=frozenset(self.invitation.approvers.values()),
            approvals_required=self.invitation.required,
        )
        now = datetime.fromtimestamp(self.clock(), UTC)
        self.policy.check_offer(request, now=now, history=self.history)
        path = self._data_of(job)
        # Whether data fit a job's schema says something about them: each try counts as one of the day's jobs.
        self.history.admit(job.hash, now=now)
        trainer = self._trainer = self.make_trainer(
            data=path,
            hidden=[
                self.folder.path / name for name in ("keys", "state", "ledgers") if (self.folder.path / name).exists()
            ],
            models=models_of(self.settings, self.folder.path),
            engine=self.settings.trainer.engine,
            isolation=self.settings.trainer.isolation,
            timeout_s=min(job.cohort.deadline_s or DEADLINE_S, self.settings.trainer.longest_s),
            memory_bytes=int(self.settings.trainer.memory_gb * 2**30) if self.settings.trainer.memory_gb else None,
        )
        evaluated = evaluated_model(job, self.folder.state)
        trainer.start()
        self.log.info("the trainer is shut in", isolation=trainer.isolation)
        opened = trainer.open(job, self.name, evaluated)
        if (opened.parameters.size, opened.parameters.digest) != (offer.parameters, offer.shapes):
            raise Refused("the offered model has other arrays than the task builds here")
        plan, secure = plan_of(job, opened, sites=len(self.roster.members), site=self.name)
        ledger = Ledger(self.folder.ledger(job.data.dataset), self.name, self.identity)
        ledger.refresh()
        request = replace(request, parameters=opened.parameters.size, plan=plan)
        self.policy.check(request, ledger=ledger.entries, now=now, history=self.history)
        trainer.plan(plan)
        folder = self._folder_of(job.hash)
        files = Files.within(folder.path, ledger=ledger.path)
        files = replace(files, identity=self.folder.identity, journal=self.folder.state / "journal")
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        budget = None
        if plan.events:
            budget = SiteBudget(ledger)
            budget.open(rows=plan.rows, simulation=False, dataset=job.data.dataset)
            set_budgets(budget, self.policy.budgets(job.data.dataset))
        site = Site(
            self.name,
            job=job,
            plan=plan,
            layout=opened.layout,
            train=trainer.train,
            guard_noise=lambda _: self._noise,
            files=files,
            simulation=False,
            seat=None if secure is None else Seat(secure, self.roster, InMemory(), Stopwatch()),
            identity=self.identity,
        )
        site.open()
        folder.write_bytes("job.toml", job.toml)
        shapes = [[name, list(shape)] for name, shape in opened.parameters.shapes.items()]
        told = {"received": opened.layout.asked, "personal": opened.personal}
        folder.write("shapes.json", {"shapes": shapes, "received_only": opened.parameters.received_only, **told})
        folder.write_text("offer.json", header(offer))  # To sit down again after a restart. Last: it is what is asked.
        self._seated = _Seated(job, site, folder, budget, offer.model_hash, opened)
        return self._seated

    def _data_of(self, job: Job) -> Path:
        known = self.settings.data.get(job.data.dataset)
        if known is None:
            names = ", ".join(self.settings.data) or "none"
            raise DataError(f"data set {job.data.dataset!r} is not in site.toml; known here: {names}")
        return (self.folder.path / known.path).resolve()

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _round(self, request: Ask | Step) -> Answer:
        seated = self._seat_of(request.job)
        if (seated.folder.path / "report.json").exists():
            raise Refused("a round of a job that is over")
        if request.round_number > seated.job.training.rounds:
            raise Refused(f"round {request.round_number} of a job that has {seated.job.training.rounds}")
        asked = request if isinstance(request, Ask) else request.ask
        first = (
            asked.model[: seated.opened.parameters.size] if asked is not None and request.round_number == 1 else None
        )
        if first is not None and vector_hash(first) != seated.first_model:
            raise Refused("the model of round 1 is not the one that the job was offered, and approved, with")
        trains = isinstance(request, Ask) or request.stage == "mask"
        began = time.monotonic()
        if trains or (isinstance(request, Step) and request.stage == "advertise"):
            # Before a secure sum begins, too: who drops out of it later wastes what the others pay.
            now = datetime.fromtimestamp(self.clock(), UTC)
            try:
                self.policy.check_round(request.job, now=now, history=self.history)
            except FedchorusError as error:
                self.refused += 1
                self.log.warning("refused a round", job=request.job, round=request.round_number, why=str(error))
                return Refusal(self.name, request.job, request.round_number)
            if (
                seated.budget is None
                and self.history.rounds_of(request.job) >= seated.job.training.rounds + MOST_REPEATS
            ):
                raise Refused("a job that charges nothing has had its rounds, and more repeats than crashes explain")
            if trains:
                self.history.answer(request.job, request.round_number, now=now)
        answer = seated.site.handle(request)
        if trains:
            refused = isinstance(answer, Refusal)
            self.answered, self.refused = self.answered + (not refused), self.refused + refused
            said = self.log.warning if refused else self.log.info
            said(
                "refused a round: the budget is used up" if refused else "answered a round",
                job=request.job,
                round=request.round_number,
                seconds=round(time.monotonic() - began, 3),
            )
        return answer

    def _keep(self, message: Deliver) -> Answer:
        """Keep the job's last model, free what was not spent, and see how it does on this site's test rows.

        The first two need nothing but what was kept when the site agreed: not the policy, the data or the trainer.
        """
        if self._has(message):  # It came before, and the answer was lost.
            return Agreed(self.name, message.job, message.round_number)
        if (self._folder_of(message.job).path / "report.json").exists():
            raise Refused("another model for a job that is over")
        offer, folder = self._offer_of(message.job), self._folder_of(message.job)
        job = parse_job(offer.toml, where="the job that this site agreed to")
        known = folder.read("shapes.json")
        last = tuple(known.get("received_only", ()))
        parameters = Parameters({str(name): tuple(shape) for name, shape in known["shapes"]}, last)
        check_deliver(message, job=job.hash, parameters=known["received"])
        metadata = {"job": message.job, "round": str(message.round_number)}
        shared = message.model[: parameters.size]
        parameters.save(shared, folder.path / "model.safetensors", metadata)
        report: dict[str, Any] = {"job": job.hash, "name": job.name, "model_hash": vector_hash(message.model)}
        head, path = None, self.folder.ledger(job.data.dataset)
        if path.exists():
            budget = SiteBudget(Ledger(path, self.name, self.identity))
            accounts = budget.accounts()
            if (account := accounts.jobs.get(job.hash)) is not None:
                budget.settle(job.hash)
                head = budget.ledger.head
                report["epsilon"] = [
                    {**limit.as_dict(), "epsilon": accounts.epsilon(limit.unit, limit.delta, spent_only=True)}
                    for limit in account.limits
                ]
        self.log.info("a job is over", job=message.job, name=job.name, model=str(folder.path / "model.safetensors"))
        try:
            self._seat_of(message.job)
            assert self._trainer is not None
            model = shared
            if known["personal"]:
                model = self._own_model(message.model, folder)
                parameters.save(model, folder.path / "own_model.safetensors", metadata)
            if measures(job) is None:  # What was measured is the federation's, and in the model itself.
                report["metrics"] = self._trainer.evaluate(model)
        except (FedchorusError, OSError) as error:
            why = str(error) if isinstance(error, FedchorusError) else type(error).__name__
            self.log.warning("the model could not be evaluated here", why=why)
        folder.write("report.json", report)
        return Agreed(self.name, message.job, message.round_number, head)

    def _own_model(self, received: Vector, folder: RecordFolder) -> Vector:
        """The model of this site's own that the job's strategy makes of what was delivered and what was kept here."""
        assert self._trainer is not None
        assert self._seated is not None
        files, size = Files.within(folder.path, ledger=folder.path), self._seated.opened.layout.memory
        return self._trainer.own_model(received, SiteMemory.in_file(files.memory, size))

    def _has(self, message: Deliver) -> bool:
        folder = self._folder_of(message.job)
        if not (folder.path / "report.json").exists():
            return False
        return folder.read("report.json").get("model_hash") == message.model_hash

    def _seat_of(self, job: str) -> _Seated:
        """The job's seat; after a restart it is taken again, under the policy as it is now."""
        if self._seated is not None and self._seated.job.hash == job:
            return self._seated
        offer = self._offer_of(job)
        self.log.info("takes its seat again", job=job)
        return self._take_seat(offer)

    def _folder_of(self, job: str) -> RecordFolder:
        if not re.fullmatch("[0-9a-f]{64}", job):
            raise Refused("a job that is not named by its hash")
        return RecordFolder(self.folder.state / "jobs" / job)

    def _offer_of(self, job: str) -> Offer:
        """The offer of a job that this site agreed to."""
        path = self._folder_of(job).path / "offer.json"
        if not path.exists():
            raise Refused("a message of a job that this site has not agreed to")
        offer = parse_request(path.read_text(encoding="utf-8"), NOTHING)
        assert isinstance(offer, Offer)
        return offer
