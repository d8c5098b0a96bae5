"""Jobs as the coordinator keeps them: one folder each, from the submission to the model, readable without a program.

job.toml               the job, byte for byte what its hash covers
initial.safetensors    the model that round 1 starts from       approvals.json   who signed both
state.json             where it stands, and why                 events.jsonl     what happened, with times
participants.json      the roster it began with
metrics.jsonl          one line a round                         heads.jsonl      the ledgers' heads after each round
checkpoint.safetensors the state after the last round           model.safetensors, summary.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from privacy.errors import JobError, RunError
from privacy.record_folder import RecordFolder
from strategies.job import Job, parse_job
from strategies.parameters import Parameters, vector_hash

State = Literal["queued", "waiting", "running", "delivering", "finished", "stopped", "paused"]
UNFINISHED: tuple[State, ...] = ("queued", "waiting", "running", "delivering")
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9a-f]{8}")


class JobFolder(RecordFolder):
    """One submitted job."""

    @classmethod
    def create(cls, parent: Path, job: Job, *, model: bytes, approvals: Sequence[tuple[str, str]]) -> JobFolder:
        """Keep a job that was checked, and its initial model. Raises `JobError` for a job that is here already."""
        folder = cls(parent / f"{job.name}-{job.hash[:8]}")
        if (folder.path / "state.json").exists():
            raise JobError(f"job {folder.id}: this very job was submitted before; give it another name or seed")
        folder.write_bytes("job.toml", job.toml)
        folder.write_bytes("initial.safetensors", model)
        folder.write("approvals.json", {"approvals": [list(pair) for pair in approvals]})
        folder.note("submitted", job=job.hash, approvals=len(approvals))
        folder.move("queued")  # Last: a folder with a state is a job.
        return folder

    @classmethod
    def open(cls, parent: Path, name: str) -> JobFolder:
        """Find a job by its id, or by the beginning of it. Raises `RunError`."""
        found = [folder for folder in jobs_in(parent) if folder.id == name]
        found = found or [folder for folder in jobs_in(parent) if name and folder.id.startswith(name)]
        if len(found) != 1:
            known = ", ".join(folder.id for folder in jobs_in(parent)) or "none"
            raise RunError(f"job {name!r}: {'more than one begins so' if found else 'no such job'}; known: {known}")
        return found[0]

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def job(self) -> Job:
        """Raises `RunError` when the file is no longer the one that was submitted."""
        text = (self.path / "job.toml").read_text(encoding="utf-8", errors="replace")  # Its hash tells.
        job = parse_job(text, where=str(self.path / "job.toml"))
        if job.hash[:8] != self.id[-8:]:
            raise RunError(f"{self.path}: job.toml was changed after it was submitted; submit it as a new job")
        return job

    @property
    def approvals(self) -> tuple[tuple[str, str], ...]:
        return tuple((str(key), str(signature)) for key, signature in self.read("approvals.json")["approvals"])

    @property
    def initial(self) -> Path:
        return self.path / "initial.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def state(self) -> State:
        state: State = self.read("state.json")["state"]
        return state

    def move(self, state: State, why: str = "") -> None:
        """Record where the job stands; `why` is for a person."""
        self.write("state.json", {"state": state, "why": why, "since": _now()})
        self.note("state", state=state, why=why)

    def note(self, event: str, **fields: Any) -> None:
        """Add a line to the job's events: never a record, an update or a key."""
        with open(self.path / "events.jsonl", "ab") as file:
            file.write(json.dumps({"time": _now(), "event": event, **fields}).encode() + b"\n")

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """The events from number `after` on."""
        try:
            lines = (self.path / "events.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return list(_parsed(lines[after:]))

    @property
    def lacks_delivery(self) -> bool:
        """Whether it is over, and some sites were not there to get its model."""
        return self.state == "finished" and bool(self.read("summary.json").get("not_delivered"))

    @property
    def wants_stop(self) -> bool:
        return (self.path / "stop").exists()

    def ask_to_stop(self) -> None:
        (self.path / "stop").touch()

    def view(self) -> dict[str, Any]:
        """What `fedchorus status` shows; of a job whose files are damaged, that they are."""
        try:
            rounds, kept, job = self.lines("metrics.jsonl"), self.read("state.json"), self.job
        except (RunError, JobError) as error:
            nothing = dict.fromkeys(("contributors", "failures", "training_loss", "seconds"))
            damaged = {"state": "damaged", "why": str(error), "since": "", "rounds": 0, "of": 0, "last": nothing}
            return {"id": self.id, "name": self.id[:-9], "hash": "", **damaged}
        last = rounds[-1] if rounds else {}
        return {
            "id": self.id,
            "name": job.name,
            "hash": job.hash,
            **kept,
            "rounds": len(rounds),
            "of": job.training.rounds,
            "last": {key: last.get(key) for key in ("contributors", "failures", "training_loss", "seconds")},
        }


def jobs_in(parent: Path) -> list[JobFolder]:
    """Every job, the oldest first."""
    found = [path for path in parent.glob("*") if JOB_ID.fullmatch(path.name) and (path / "state.json").is_file()]
    return [JobFolder(path) for path in sorted(found, key=lambda path: (path / "job.toml").stat().st_mtime_ns)]


def check_submission(
    toml: str,
    model: Path,
    approvals: Sequence[tuple[str, str]],
    *,
    approvers: Mapping[str, str],
    required: int,
    strategies: Sequence[str],
) -> tuple[Job, str]:
    """Check what was submitted before anything is kept: the job, its model and who approved both; the model's hash.

    `approvers` are names to public keys (hexadecimal), of whom `required` must have signed. `strategies` are those of
    users' own that this coordinator runs. Raises `JobError`.
    """
    from privacy.keys import is_signed_by
    from strategies.messages import approval_of

    job = parse_job(toml, where="the submitted job")
    if job.toml.decode() != toml or job != job.portable:
        raise JobError("the submitted job: not in its resolved, portable form; send it with `fedchorus submit`")
    if ":" in job.strategy.name and job.strategy.name not in strategies:
        raise JobError(
            f"strategy.name: {job.strategy.name!r} is not among the strategies that this coordinator runs (server.toml)"
        )
    try:
        _, vector = Parameters.load(model)
    except RunError as error:
        raise JobError(f"the submitted model: {error}") from None
    digest = vector_hash(vector)
    signed = {
        name
        for name, key in approvers.items()
        for signer, signature in approvals
        if signer == key
        and re.fullmatch("[0-9a-f]{128}", signature)
        and is_signed_by(key, bytes.fromhex(signature), approval_of(job.hash, digest))
    }
    if len(signed) < required:
        missing = ", ".join(sorted(set(approvers) - signed))
        raise JobError(
            f"the job needs {required} approvals and has {len(signed)}; ask {missing} for `fedchorus approve`"
        )
    return job, digest


def _parsed(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            yield {"time": "", "event": "damaged line"}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
