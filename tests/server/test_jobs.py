"""A job's folder at the coordinator, and what is checked before there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import JobError, RunError
from privacy.keys import IdentityKey
from server.jobs import JobFolder, check_submission, jobs_in
from strategies.job import Job
from strategies.messages import approval_of
from strategies.parameters import Parameters, vector_hash
from tests.deployment.federation import deployed_job

VECTOR = np.array([0.5, -2.0], np.float32)
JOB = deployed_job()
PEOPLE = ("alice", "bob", "carol")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, IdentityKey]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: IdentityKey.create(folder / f"{name}.pem") for name in (*PEOPLE, "mallory")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "initial.safetensors"
    Parameters({"weight": (2,)}).save(VECTOR, path, {"job": JOB.hash, "round": "0"})
    return path


def approval(key: IdentityKey, job: Job = JOB, vector: Any = VECTOR) -> tuple[str, str]:
    return key.public_hex, key.sign(approval_of(job.hash, vector_hash(vector))).hex()


def submit(
    model: Path,
    *,
    toml: str | None = None,
    approvals: Sequence[tuple[str, str]] = (),
    approvers: dict[str, str] | None = None,
    required: int = 0,
    strategies: Sequence[str] = (),
) -> tuple[Job, str]:
    text = JOB.toml.decode() if toml is None else toml
    known = approvers or {}
    return check_submission(text, model, approvals, approvers=known, required=required, strategies=strategies)


class TestSubmission:
    def test_a_job_in_its_portable_form_with_its_model_is_taken(self, model: Path) -> None:
        assert submit(model) == (JOB, vector_hash(VECTOR))

    @pytest.mark.parametrize(
        ("toml", "said"),
        [
            ("name = ", "not valid TOML"),
            ("", "is missing"),
            (JOB.toml.decode() + "\n", "not in its resolved, portable form"),
            (JOB.toml.decode().replace('device = "auto"', 'device = "cuda"'), "not in its resolved, portable form"),
            (JOB.toml.decode().replace('folder = "."', 'folder = "/home/alice"'), "not in its resolved, portable form"),
            (JOB.toml.decode().replace('engine = "inline"', 'engine = "flower"'), "not in its resolved, portable form"),
        ],
    )
    def test_any_other_text_is_refused(self, toml: str, said: str, model: Path) -> None:
        assert toml != JOB.toml.decode()
        with pytest.raises(JobError, match=said) as caught:
            submit(model, toml=toml)
        assert str(caught.value).isprintable()

    def test_code_that_server_toml_does_not_list_is_refused_by_its_name(self, model: Path) -> None:
        toml = deployed_job(strategy={"name": "evil.module:Strategy"}).toml.decode()
        for allowed in ((), ("evil.module:Other",), ("evil.module",)):
            with pytest.raises(
                JobError, match=r"'evil\.module:Strategy' is not among the strategies .* \(server\.toml\)"
            ):
                submit(model, toml=toml, strategies=allowed)
        job, _ = submit(model, toml=toml, strategies=("evil.module:Strategy",))
        assert job.strategy.name == "evil.module:Strategy"

    @pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04pickle", bytes(100), b"\xff" * 8 + b"{}"])
    def test_a_model_that_is_none_is_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "model").write_bytes(content)
        with pytest.raises(JobError, match=r"the submitted model: .* not a model file of fedchorus"):
            submit(tmp_path / "model")

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_k_of_n_approvers_must_have_signed_each_counted_once(
        self, data: st.DataObject, keys: dict[str, IdentityKey], model: Path
    ) -> None:
        approvers = {name: keys[name].public_hex for name in PEOPLE}
        signers = data.draw(st.lists(st.sampled_from((*PEOPLE, "mallory")), max_size=6))
        required = data.draw(st.integers(0, 3))
        counted = set(signers) & set(PEOPLE)
        approvals = [approval(keys[name]) for name in signers]
        if len(counted) >= required:
            submit(model, approvals=approvals, approvers=approvers, required=required)
            return
        with pytest.raises(JobError, match=f"needs {required} approvals and has {len(counted)}; ask") as caught:
            submit(model, approvals=approvals, approvers=approvers, required=required)
        asked = str(caught.value).partition("; ask ")[2].removesuffix(" for `fedchorus approve`").split(", ")
        assert set(asked) == set(PEOPLE) - counted

    def test_a_signature_over_another_job_model_or_by_another_key_does_not_count(
        self, keys: dict[str, IdentityKey], model: Path
    ) -> None:
        alice, mallory = keys["alice"], keys["mallory"]
        public, signature = approval(alice)
        for wrong in (
            approval(alice, deployed_job(seed=1)),
            approval(alice, vector=VECTOR + 1),
            (public, approval(mallory)[1]),
            (mallory.public_hex, signature),
            (public, "no hexadecimal"),
            (public, signature.upper()),
            (public, signature[:-2]),
            (public.upper(), signature),
            ("", ""),
        ):
            with pytest.raises(JobError, match="needs 1 approvals and has 0"):
                submit(model, approvals=[wrong], approvers={"alice": public}, required=1)
        submit(model, approvals=[(public, signature)], approvers={"alice": public}, required=1)


class TestFolder:
    @pytest.fixture
    def folder(self, model: Path, tmp_path: Path) -> JobFolder:
        return JobFolder.create(tmp_path, JOB, model=model.read_bytes(), approvals=[("ab", "cd")])

    def test_keeps_what_was_submitted_byte_for_byte(self, folder: JobFolder, model: Path) -> None:
        assert folder.job == JOB
        assert (folder.path / "job.toml").read_bytes() == JOB.toml
        assert folder.initial.read_bytes() == model.read_bytes()
        assert folder.approvals == (("ab", "cd"),)
        assert folder.id == f"smallest-{JOB.hash[:8]}"
        assert folder.view()["state"] == folder.state == "queued"
        assert [event["event"] for event in folder.events()] == ["submitted", "state"]

    def test_the_same_job_is_not_taken_twice(self, folder: JobFolder, tmp_path: Path) -> None:
        with pytest.raises(JobError, match="this very job was submitted before"):
            JobFolder.create(tmp_path, JOB, model=b"other", approvals=[])
        assert folder.initial.read_bytes() != b"other"

    def test_what_a_crash_left_of_a_submission_is_no_job_and_can_be_submitted_again(
        self, folder: JobFolder, tmp_path: Path
    ) -> None:
        (folder.path / "state.json").unlink()
        assert jobs_in(tmp_path) == []
        JobFolder.create(tmp_path, JOB, model=b"again", approvals=[])
        assert [job.id for job in jobs_in(tmp_path)] == [folder.id]

    @pytest.mark.parametrize("change", [(b"rounds = 2", b"rounds = 3"), (b'"smallest"', b'"another"')])
    def test_a_job_file_that_was_changed_is_found_and_said(
        self, folder: JobFolder, change: tuple[bytes, bytes]
    ) -> None:
        path = folder.path / "job.toml"
        path.write_bytes(path.read_bytes().replace(*change))
        with pytest.raises(RunError, match=r"job\.toml was changed after it was submitted"):
            _ = folder.job
        view = folder.view()
        assert (view["id"], view["state"]) == (folder.id, "damaged")
        assert "job.toml was changed" in view["why"]

    @pytest.mark.parametrize("name", ["job.toml", "state.json", "metrics.jsonl"])
    def test_a_job_with_a_damaged_file_hides_no_other_job(self, folder: JobFolder, name: str) -> None:
        (folder.path / name).write_bytes(b"\xff{]\n")
        view = folder.view()
        assert view["state"] == "damaged"
        assert view["why"].isprintable()

    def test_events_are_read_from_any_on_and_a_damaged_line_hides_no_other(self, folder: JobFolder) -> None:
        with open(folder.path / "events.jsonl", "ab") as file:
            file.write(b"\xff not json\n")
        folder.note("goes on", why="a line\nwith a break")
        with open(folder.path / "events.jsonl", "ab") as file:
            file.write(b'{"event": "cut o')  # Of a crash, or of a write that is under way.
        assert [event["event"] for event in folder.events()] == ["submitted", "state", "damaged line", "goes on"]
        assert [event["event"] for event in folder.events(3)] == ["goes on"]
        assert folder.events(9) == []

    def test_a_folder_without_events_has_none(self, folder: JobFolder) -> None:
        (folder.path / "events.jsonl").unlink()
        assert folder.events() == []

    def test_is_found_by_its_id_or_a_beginning_that_only_it_has(
        self, folder: JobFolder, model: Path, tmp_path: Path
    ) -> None:
        other = JobFolder.create(tmp_path, deployed_job(seed=1), model=model.read_bytes(), approvals=[])
        assert JobFolder.open(tmp_path, folder.id).id == folder.id
        assert JobFolder.open(tmp_path, folder.id[:12]).id == folder.id
        assert {job.id for job in jobs_in(tmp_path)} == {folder.id, other.id}
        for name, said in (("smallest", "more than one begins so"), ("x", "no such job"), ("", "no such job")):
            with pytest.raises(RunError, match=f"{said}; known: {folder.id}, {other.id}"):
                JobFolder.open(tmp_path, name)

    @pytest.mark.parametrize("name", ["../jobs", "/etc", ".", "..", "a/../b", "\0", "smallest-\n"])
    def test_a_name_never_leads_out_of_the_folder(self, name: str, folder: JobFolder, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no such job") as caught:
            JobFolder.open(tmp_path, name)
        assert str(caught.value).isprintable()

    def test_what_lies_beside_the_jobs_is_no_job(self, folder: JobFolder, tmp_path: Path) -> None:
        (tmp_path / "notes-12345678").mkdir()
        (tmp_path / "smallest-ABCDEF12").mkdir()
        (tmp_path / "file-12345678").touch()
        assert [job.id for job in jobs_in(tmp_path)] == [folder.id]

    def test_a_stop_is_asked_for_and_seen(self, folder: JobFolder) -> None:
        assert not folder.wants_stop
        folder.ask_to_stop()
        folder.ask_to_stop()
        assert folder.wants_stop

    def test_a_view_shows_the_last_round_and_nothing_of_a_site(self, folder: JobFolder) -> None:
        line = {"round": 1, "contributors": ["north"], "failures": {}, "training_loss": 0.5, "seconds": 1.0}
        folder.append("metrics.jsonl", {**line, "secret": 3})
        folder.move("running")
        view = folder.view()
        assert (view["state"], view["rounds"], view["of"]) == ("running", 1, 2)
        assert view["last"] == {key: line[key] for key in ("contributors", "failures", "training_loss", "seconds")}
