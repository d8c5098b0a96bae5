"""Try a job at this site before a server offers it: its code, its data, the policy. Nothing is agreed to or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from client.content import content_of
from client.desk import PRIVATE
from client.history import History
from client.policy import JobRequest, Policy
from client.settings import Settings, SiteFolder
from client.site import SitePlan
from client.trainer_process import Opened, TrainerProcess
from privacy.enrolment import Invitation
from privacy.errors import DataError
from privacy.ledger import Entry
from privacy.noise import OsNoise
from strategies.job import Job
from strategies.secure import SecureSum
from strategies.total import layout_for

LONGEST_S = 600.0  # For opening the data once.


@dataclass
class Rehearsal:
    """One job's steps, in this order; each says in words what it found, or raises the error that the client would log.

    `job` is in its portable form, `sites` the number of the roster's members, `ledger` the verified entries of the
    job's data set.
    """

    job: Job
    folder: SiteFolder
    settings: Settings
    policy: Policy
    invitation: Invitation
    sites: int
    ledger: Sequence[Entry]
    now: datetime
    _opened: Opened | None = field(default=None, init=False)

    def code(self) -> str:
        """Hold what the job would run to the policy, before any of it runs."""
        self.policy.check_code(self.job, content_of(self.job))
        return f"the policy allows task {self.job.task.name} and strategy {self.job.strategy.name}"

    def data(self) -> str:
        """Open the data in the trainer's process, against the whole schema, and build the model."""
        known, trainer = self.settings.data.get(self.job.data.dataset), self.settings.trainer
        if known is None:
            names = ", ".join(self.settings.data) or "none"
            raise DataError(f"data set {self.job.data.dataset!r} is not in site.toml; known here: {names}")
        with TrainerProcess(
            data=(self.folder.path / known.path).resolve(),
            hidden=[self.folder.path / name for name in PRIVATE if (self.folder.path / name).exists()],
            isolation=trainer.isolation,
            timeout_s=LONGEST_S,
            memory_bytes=int(trainer.memory_gb * 2**30) if trainer.memory_gb else None,
        ) as process:
            opened = self._opened = process.open(self.job, self.settings.name)
            return (
                f"they fit the schema: {opened.rows} rows to train on, {opened.test_rows} to test; a model of "
                f"{opened.parameters.size} parameters on {opened.device} ({process.isolation})"
            )

    def rules(self) -> str:
        """Hold the job to the whole policy and the budget, as if every approver had signed it."""
        assert self._opened is not None, "open the data first"
        job, parameters = self.job, self._opened.parameters
        layout, secure = layout_for(job, parameters.size), None
        if job.secure_aggregation is not None:
            secure = SecureSum.make(
                job, sites=self.sites, layout=layout, layers=parameters.sizes, most_rows=self._opened.rows
            )
        plan = SitePlan.make(
            job,
            rows=self._opened.rows,
            parameters=parameters.size,
            rng=OsNoise.kind,
            site=self.settings.name,
            layers=parameters.sizes,
            secure=secure,
        )
        approvers = frozenset(self.invitation.approvers.values())
        request = JobRequest(
            job=job,
            parameters=parameters.size,
            sites=self.sites,
            plan=plan,
            code=content_of(job),
            approvals=approvers | frozenset(self.policy.approvers or ()),
            approvers=approvers,
            approvals_required=self.invitation.required,
        )
        history = History(self.folder.state / "history.jsonl")
        self.policy.check(request, ledger=self.ledger, now=self.now, history=history)
        return "the policy and the budget admit it, once it has the approvals that it needs"
