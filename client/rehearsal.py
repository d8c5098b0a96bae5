"""Try a job at this site before a server offers it: its terms, its data, its cost. Nothing is agreed to or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from client.content import content_of
from client.desk import PRIVATE, evaluated_model, models_of, plan_of
from client.history import History
from client.policy import JobRequest, Policy
from client.settings import Settings, SiteFolder
from client.site import SitePlan
from client.trainer_process import Opened, TrainerProcess
from privacy.enrolment import Invitation
from privacy.errors import DataError
from privacy.ledger import Entry
from strategies.job import Job

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

    def terms(self) -> str:
        """Hold all but the job's cost to the policy, before any of its code runs."""
        request = self._request(parameters=0, plan=SitePlan(0))
        self.policy.check_offer(request, now=self.now, history=self._history)
        return f"the policy allows task {self.job.task.name} and strategy {self.job.strategy.name} on these terms"

    def schema(self) -> list[str]:
        """How the data differ from the job's schema, one line each; for this site's people alone."""
        from client.schema import differences
        from client.tables import read_table

        if self._path.suffix == ".npz" or self._path.is_dir():  # Images are checked when they are opened.
            return []
        return differences(read_table(self._path, self.job.data), self.job.data)

    def data(self) -> str:
        """Open the data in the trainer's process, against the whole schema, and build the model."""
        trainer = self.settings.trainer
        with TrainerProcess(
            data=self._path,
            hidden=[self.folder.path / name for name in PRIVATE if (self.folder.path / name).exists()],
            models=models_of(self.settings, self.folder.path),
            engine=self.settings.trainer.engine,
            isolation=trainer.isolation,
            timeout_s=min(LONGEST_S, trainer.longest_s),
            memory_bytes=int(trainer.memory_gb * 2**30) if trainer.memory_gb else None,
        ) as process:
            evaluated = evaluated_model(self.job, self.folder.state)
            opened = self._opened = process.open(self.job, self.settings.name, evaluated)
            return (
                f"they fit the schema: {opened.rows} rows to train on, {opened.test_rows} to test; a model of "
                f"{opened.parameters.size} parameters on {opened.device} ({process.isolation})"
            )

    def cost(self) -> str:
        """Hold the job, with what it would cost, to the whole policy and the budget."""
        assert self._opened is not None, "open the data first"
        plan, _ = plan_of(self.job, self._opened, sites=self.sites, site=self.settings.name)
        request = self._request(parameters=self._opened.parameters.size, plan=plan)
        self.policy.check(request, ledger=self.ledger, now=self.now, history=self._history)
        return "the policy and the budget admit it, once it has the approvals that it needs"

    @property
    def _path(self) -> Path:
        known = self.settings.data.get(self.job.data.dataset)
        if known is None:
            names = ", ".join(self.settings.data) or "none"
            raise DataError(f"data set {self.job.data.dataset!r} is not in site.toml; known here: {names}")
        return (self.folder.path / known.path).resolve()

    @property
    def _history(self) -> History:
        return History(self.folder.state / "history.jsonl")

    def _request(self, *, parameters: int, plan: SitePlan) -> JobRequest:
        """The job as it would be offered, signed by every approver: whether they will is not known here."""
        approvers = frozenset(self.invitation.approvers.values())
        return JobRequest(
            job=self.job,
            parameters=parameters,
            sites=self.sites,
            plan=plan,
            code=content_of(self.job),
            approvals=approvers | frozenset(self.policy.approvers or ()),
            approvers=approvers,
            approvals_required=self.invitation.required,
        )
