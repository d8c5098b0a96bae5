"""A run folder: everything about one run, readable without the program that wrote it.

job.toml            the resolved job; its SHA-256 names the job
roster.json         the sites' public keys           plans.json   each site's rows, noise and sampling
participants.json   the signed roster of those whose updates are summed securely
ledgers/SITE.jsonl  what each site released          heads.jsonl  the ledgers' heads after each round
server.jsonl        what the server released, where it adds the noise
failed.jsonl        rounds that failed before they were run again, on a virtual clock
metrics.jsonl       one line a round                 summary.json the claims; written last: without it, unfinished
initial.safetensors, model.safetensors, MODEL_CARD.md, report.html
private/SITE/       the site's identity key and outbox: in deployment this lies at the site alone
private/_server/    the server's state after the last finished round, and its key: they are its own too
"""

from __future__ import annotations

import contextlib
import itertools
from datetime import datetime
from pathlib import Path
from typing import Any

from client.site import Files
from privacy.errors import RunError
from privacy.ledger import SERVER
from privacy.record_folder import RecordFolder
from strategies.job import Job, load_job


class RunFolder(RecordFolder):
    """Paths and files of one run."""

    @classmethod
    def create(cls, path: Path, job: Job) -> RunFolder:
        """Make a new run folder. Raises `RunError` when `path` holds anything already."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path}: exists and is not an empty folder; choose another --out, or `fedchorus resume` it")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        try:
            (path / "job.toml").touch(exist_ok=False)
        except FileExistsError:
            raise RunError(f"{path}: another run has just begun in it; choose another --out") from None
        folder.write_bytes("job.toml", job.toml)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing one. Raises `RunError` when `path` is not a run folder."""
        if not (path / "job.toml").is_file():
            raise RunError(f"{path}: no run folder (job.toml is missing)")
        return cls(path)

    @property
    def job(self) -> Job:
        """The resolved job. Raises `RunError` when the file is no longer what was resolved."""
        job = load_job(self.path / "job.toml")
        if job.hash != self.read("plans.json").get("job"):
            raise RunError(f"{self.path}: job.toml was changed after the run began; start a new run with it")
        return job

    def known_plans(self) -> dict[str, Any]:
        """Each site's plan as it was calibrated when the run began."""
        plans = self.read("plans.json").get("sites")
        if not isinstance(plans, dict) or not all(
            isinstance(p, dict) and "noise_multiplier" in p for p in plans.values()
        ):
            raise RunError(f"{self.path}: plans.json is damaged")
        return plans

    def known_release(self) -> dict[str, Any] | None:
        """The server's noise as it was calibrated when the run began."""
        planned = self.read("plans.json").get("client")
        if planned is not None and not (isinstance(planned, dict) and "calibrated" in planned):
            raise RunError(f"{self.path}: plans.json is damaged")
        return planned

    def hand_over(self, successor: Path) -> None:
        """Let `successor` go on with this run's ledgers, and nobody else: two copies would spend one budget twice.

        Raises `RunError` when another run did before.
        """
        try:
            with open(self.path / "continued", "x", encoding="utf-8") as file:
                file.write(f"{successor}\n")
        except FileExistsError:
            other = (self.path / "continued").read_text(encoding="utf-8").strip()
            raise RunError(f"{self.path}: its ledgers went on in {other}; give --after that run") from None

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    @property
    def initial_model(self) -> Path:
        return self.path / "initial.safetensors"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.path / "private" / SERVER / "checkpoint.safetensors"

    @property
    def participants(self) -> Path:
        return self.path / "participants.json"

    @property
    def server_files(self) -> Files:
        return Files.within(self.path / "private" / SERVER, ledger=self.path / "server.jsonl")

    def files_of(self, site: str) -> Files:
        return Files.within(self.path / "private" / site, ledger=self.path / "ledgers" / f"{site}.jsonl")


def fresh_path(job: Job, parent: Path, now: datetime) -> Path:
    """Make the empty folder `parent`/NAME-TIME, with a number behind it if that is taken."""
    stem = f"{job.name}-{now:%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        path = parent / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("numbers do not end")
