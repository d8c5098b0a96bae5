"""What a site does with a message: the seal, the policy, the gate; and one constant answer for everything it refuses.

The order for an offer is the guarantee: seal -> job as it was hashed -> approvals -> what it would run, by content and
before any of it runs -> data, in the trainer's process -> the whole policy -> the plan in the ledger -> agreed. For a
round: seal -> policy -> gate (`client.gate`, `client.secure`). What is refused is explained in the site's own log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client.content import content_of
from client.history import History
from client.policy import JobRequest, Policy, set_budgets
from client.secure import Stopwatch
from client.seen import SeenNonces
from client.settings import Settings, SiteFolder
from client.site import Files, Seat, Site, SitePlan
from client.trainer_process import TrainerProcess
from privacy.budget import SiteBudget
from privacy.enrolment import Invitation
from privacy.errors import DataError, FedchorusError, Refused
from privacy.keys import IdentityKey, is_signed_by
from privacy.ledger import Ledger
from privacy.logbook import Logbook
from privacy.noise import OsNoise
from privacy.record_folder import RecordFolder
from privacy.secagg.client import InMemory
from privacy.secagg.roster import Roster
from strategies.envelope import COORDINATOR, Seal, array_digest
from strategies.job import Job, parse_job
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
from strategies.total import layout_for

PRIVATE = ("keys", "state", "ledgers")  # What the trainer must not see.
DEADLINE_S = 3600.0  # For training once, where the job says nothing.


@dataclass
class _Seated:
    """A job that this site agreed to, and what serves it."""

    job: Job
    plan: SitePlan
    parameters: Parameters
    site: Site
    folder: RecordFolder
    budget: SiteBudget | None


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
        self._seen = SeenNonces(self.folder.state / "nonces", keep_s=2 * self.settings.max_clock_skew_s)

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
        reply = Seal(kind="answer", sender=self.name, recipient=COORDINATOR, nonce=sealed.nonce, time=self.clock())
        return said, reply.signed(self.identity, said, array_digest(flat_array(answer))).text, answer

    def close(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
        self._seated = None

    def _check_seal(self, seal: Seal, text: str, array: Vector | Words) -> None:
        expected = {"kind": "request", "sender": COORDINATOR, "recipient": self.name}
        seal.check(self.invitation.coordinator, text, array_digest(array), **expected)
        away = seal.time - self.clock()
        if abs(away) > self.settings.max_clock_skew_s:
            raise Refused(
                f"a message is {abs(away):.0f} s {'ahead of' if away > 0 else 'behind'} this site's clock, and "
                f"{self.settings.max_clock_skew_s:g} s are allowed (site.toml); set both clocks by NTP"
            )
        self._seen.add(seal.nonce, now=self.clock())

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
        code = content_of(job)
        self.policy.check_code(job, code)  # Before any of it runs.
        path = self._data_of(job)
        trainer = self._trainer = self.make_trainer(
            data=path,
            hidden=[
                self.folder.path / name for name in ("keys", "state", "ledgers") if (self.folder.path / name).exists()
            ],
            isolation=self.settings.trainer.isolation,
            timeout_s=job.cohort.deadline_s or DEADLINE_S,
            memory_bytes=int(self.settings.trainer.memory_gb * 2**30) if self.settings.trainer.memory_gb else None,
        )
        trainer.start()
        self.log.info("the trainer is shut in", isolation=trainer.isolation)
        opened = trainer.open(job, self.name)
        if (opened.parameters.size, opened.parameters.digest) != (offer.parameters, offer.shapes):
            raise Refused("the offered model has other arrays than the task builds here")
        layout, secure = layout_for(job, opened.parameters.size), None
        if job.secure_aggregation is not None:
            sizes, members = opened.parameters.sizes, len(self.roster.members)
            secure = SecureSum.make(job, sites=members, layout=layout, layers=sizes, most_rows=opened.rows)
        plan = SitePlan.make(
            job,
            rows=opened.rows,
            parameters=opened.parameters.size,
            rng=OsNoise.kind,
            site=self.name,
            layers=opened.parameters.sizes,
            secure=secure,
        )
        ledger = Ledger(self.folder.ledger(job.data.dataset), self.name, self.identity)
        ledger.refresh()
        request = JobRequest(
            job=job,
            parameters=opened.parameters.size,
            sites=len(self.roster.members),
            plan=plan,
            code=code,
            approvals=approvals,
            approvers=frozenset(self.invitation.approvers.values()),
            approvals_required=self.invitation.required,
        )
        now = datetime.fromtimestamp(self.clock(), UTC)
        self.policy.check(request, ledger=ledger.entries, now=now, history=self.history)
        trainer.plan(plan)
        folder = RecordFolder(self.folder.state / "jobs" / job.hash)
        files = Files.within(folder.path, ledger=ledger.path)
        files = Files(files.ledger, self.folder.identity, files.outbox, self.folder.state / "journal", files.session)
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
            layout=layout,
            train=trainer.train,
            guard_noise=lambda _: self._noise,
            files=files,
            simulation=False,
            seat=None if secure is None else Seat(secure, self.roster, InMemory(), Stopwatch()),
            identity=self.identity,
        )
        site.open()
        self.history.admit(job.hash, now=now)
        folder.write_bytes("job.toml", job.toml)
        folder.write_text("offer.json", header(offer))  # To sit down again after a restart.
        self._seated = _Seated(job, plan, opened.parameters, site, folder, budget)
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
        trains = isinstance(request, Ask) or request.stage == "mask"
        began = time.monotonic()
        if trains:
            now = datetime.fromtimestamp(self.clock(), UTC)
            try:
                self.policy.check_round(request.job, now=now, history=self.history)
            except FedchorusError as error:
                self.refused += 1
                self.log.warning("refused a round", job=request.job, round=request.round_number, why=str(error))
                return Refusal(self.name, request.job, request.round_number)
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
        """Keep the job's last model, see how it does on this site's test rows, and free what was not spent."""
        if self._has(message):  # It came before, and the answer was lost.
            return Agreed(self.name, message.job, message.round_number)
        seated = self._seat_of(message.job)
        check_deliver(message, job=seated.job.hash, parameters=seated.parameters.size)
        path = seated.folder.path / "model.safetensors"
        metadata = {"job": message.job, "round": str(message.round_number)}
        seated.parameters.save(message.model, path, metadata)
        if seated.budget is not None:
            seated.budget.settle(message.job)
        self.log.info("a job is over", job=message.job, name=seated.job.name, model=str(path))
        self._evaluate(seated, message.model)
        head = seated.budget.ledger.head if seated.budget is not None else None
        return Agreed(self.name, message.job, message.round_number, head)

    def _has(self, message: Deliver) -> bool:
        folder = RecordFolder(self.folder.state / "jobs" / message.job)
        return (
            re.fullmatch("[0-9a-f]{64}", message.job) is not None
            and (folder.path / "report.json").exists()
            and folder.read("report.json").get("model_hash") == message.model_hash
        )

    def _seat_of(self, job: str) -> _Seated:
        """The job's seat; after a restart it is taken again, under the policy as it is now."""
        if self._seated is not None and self._seated.job.hash == job:
            return self._seated
        path = self.folder.state / "jobs" / job / "offer.json"
        if not re.fullmatch("[0-9a-f]{64}", job) or not path.exists():
            raise Refused("a message of a job that this site has not agreed to")
        offer = parse_request(path.read_text(encoding="utf-8"), NOTHING)
        assert isinstance(offer, Offer)
        self.log.info("takes its seat again", job=job)
        return self._take_seat(offer)

    def _evaluate(self, seated: _Seated, model: Vector) -> None:
        assert self._trainer is not None
        report: dict[str, Any] = {"job": seated.job.hash, "name": seated.job.name, "model_hash": vector_hash(model)}
        try:
            report["metrics"] = self._trainer.evaluate(model)
        except FedchorusError as error:
            self.log.warning("the model could not be evaluated here", why=str(error))
        if seated.budget is not None:
            accounts = seated.budget.accounts()
            report["epsilon"] = [
                {**limit.as_dict(), "epsilon": accounts.epsilon(limit.unit, limit.delta, spent_only=True)}
                for limit in seated.plan.limits
            ]
        seated.folder.write("report.json", report)
