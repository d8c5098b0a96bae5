"""A job runs at real sites' desks from the offer to the delivery, through crashes, and past nobody's policy."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from client.initial import initial_parameters
from privacy.budget import Accounts
from privacy.errors import JobError
from privacy.keys import IdentityKey
from privacy.ledger import SERVER, read_ledger
from server.collect import Failure
from strategies.job import Job
from strategies.messages import Agreed, Answer, Deliver, Offer, Reply, Request, approval_of, ask_for
from strategies.parameters import Parameters, Vector, vector_hash
from tests.deployment.federation import NAMES, POLICY, Thorax, a_server_app, deployed_job

RECORD = {"record": {"noise_multiplier": 4.0, "delta": 1e-2, "spare_rounds": 6}}
EVERYBODY = {"training": {"batch_size": None, "sampling_rate": 1.0}}
SECURE = {"secure_aggregation": {"colluders": 0, "retries": 5}}


@pytest.fixture
def thorax(tmp_path: Path) -> Thorax:
    return Thorax(tmp_path)


def ledger_of(thorax: Thorax, name: str) -> Accounts:
    path = thorax.folder / name
    key = IdentityKey.load(path / "keys" / "identity.pem").public_hex
    return Accounts.of(name, read_ledger(path / "ledgers" / "records.jsonl", name, key))


def reserved(thorax: Thorax, name: str) -> int:
    return sum(job.used for job in ledger_of(thorax, name).jobs.values())


class TestAJob:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"privacy": RECORD, **EVERYBODY},
            SECURE,
            {"privacy": RECORD, **EVERYBODY, "secure_aggregation": {"colluders": 0}},
            {
                "privacy": {"client": {"noise_multiplier": 4.0, "epsilon": 90.0, "delta": 1e-2}},
                "strategy": {"weighting": "equal"},
            },
            {
                "privacy": {"client": {"noise_multiplier": 8.0, "delta": 1e-2, "placement": "distributed"}},
                "strategy": {"weighting": "equal"},
                "secure_aggregation": {"colluders": 0},
            },
        ],
        ids=["plain", "record", "secure", "secure record", "central", "distributed"],
    )
    def test_is_offered_run_and_delivered(self, thorax: Thorax, changes: dict[str, Any]) -> None:
        job = deployed_job(**changes)
        folder = thorax.submit(job)
        thorax.run(folder)
        assert folder.state == "finished"
        lines = folder.lines("metrics.jsonl")
        assert [line["round"] for line in lines] == [1, 2]
        assert all(line["contributors"] == list(NAMES) and not line["failures"] for line in lines)
        _, model = Parameters.load(folder.model)
        assert np.isfinite(model).all()
        for name in NAMES:
            kept = thorax.folder / name / "state" / "jobs" / job.hash
            assert vector_hash(Parameters.load(kept / "model.safetensors")[1]) == vector_hash(model)
            assert (kept / "report.json").exists()
        if job.privacy.at_sites:
            assert {reserved(thorax, name) for name in NAMES} == {2}
            assert all(account.settled for name in NAMES for account in ledger_of(thorax, name).jobs.values())
        if job.privacy.central is not None:
            entries = read_ledger(thorax.coordinator / "server.jsonl", SERVER, thorax.key.public_hex)
            assert sum(entry.kind == "commit" for entry in entries) == 2

    def test_gives_the_same_model_as_a_simulation_over_the_same_rows(self, thorax: Thorax, tmp_path: Path) -> None:
        from datetime import datetime

        from simulations.inline import InlineTransport  # noqa: F401 (the engine that is compared with)
        from simulations.simulate import Watcher, start_run
        from strategies.job import check_job
        from tests.strategies.jobs import raw_job

        job = deployed_job()
        folder = thorax.submit(job)
        thorax.run(folder)
        files = {name: str(thorax.folder / name / "records.csv") for name in NAMES}
        raw = raw_job(data={"path": None, "client": None, "files": files}, simulation={"baselines": False})
        out = tmp_path / "simulated"
        now = datetime.now()
        start_run(check_job(raw, where="a test"), out=out, parent=tmp_path, watcher=Watcher(), now=now)
        _, deployed = Parameters.load(folder.model)
        _, simulated = Parameters.load(out / "model.safetensors")
        np.testing.assert_array_equal(deployed, simulated)

    def test_waits_for_sites_that_are_away_and_says_so(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(cohort={"minimum": 3}))
        thorax.sites["west"].online = False
        looks = []

        def look(since: int, timeout_s: float) -> Any:
            looks.append(folder.read("state.json"))
            if len(looks) == 12:
                thorax.sites["west"].online = True
            return type(thorax.mail).wait(thorax.mail, since, timeout_s)

        thorax.mail.wait = look  # type: ignore[method-assign]
        thorax.run(folder)
        assert folder.state == "finished"
        assert {"waiting": "for west: 2 of 3 needed sites are there"}.items() <= {
            look["state"]: look["why"] for look in looks
        }.items()

    def test_goes_on_without_a_site_that_is_away_if_it_may(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job())
        thorax.sites["west"].online = False
        thorax.run(folder)
        assert folder.read("summary.json")["contributions"] == {"north": 2, "south": 2, "west": 0}
        assert folder.read("summary.json")["not_delivered"] == ["west"]
        assert folder.read("state.json")["why"] == "not delivered to west"

    def test_that_too_many_sites_refuse_needs_a_person(self, thorax: Thorax) -> None:
        for name in ("north", "south", "west"):
            (thorax.folder / name / "policy.toml").write_text(POLICY.replace('["training"]', '["care"]'))
            thorax.sites[name].restart()
        folder = thorax.submit(deployed_job())
        with pytest.raises(JobError, match="3 sites refuse the job"):
            thorax.run(folder)
        assert "purposes" in thorax.sites["north"].said.getvalue()
        assert not any(event.get("why") and "purposes" in event["why"] for event in folder.events())

    def test_stops_when_a_person_asks_and_goes_on_when_resumed(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(training={"rounds": 4}))

        def stop_in_round_two(site: str, content: RecordDict) -> RecordDict:
            if '"round": 2' in content["header"]["json"]:
                folder.ask_to_stop()
            return content

        thorax.mail.on_way = stop_in_round_two
        thorax.run(folder)
        assert folder.read("state.json")["state"] == "stopped"
        assert len(folder.lines("metrics.jsonl")) == 2
        (folder.path / "stop").unlink()
        thorax.run(folder)
        assert folder.state == "finished"
        assert [line["round"] for line in folder.lines("metrics.jsonl")] == [1, 2, 3, 4]


class TestCrashes:
    def crash_on(self, thorax: Thorax, name: str, sign: str, *, before: bool, times: int = 1) -> None:
        """Kill a site once when a message with `sign` in it comes: before it is answered, or after."""
        left = [times]

        def interfere(site: str, content: RecordDict) -> RecordDict | None:
            if site == name and sign in content["header"]["json"] and left[0]:
                left[0] -= 1
                thorax.sites[name].crash()
                return None
            return content

        setattr(thorax.mail, "on_way" if before else "on_back", interfere)

    def test_a_site_that_dies_before_it_trains_is_asked_again(self, thorax: Thorax) -> None:
        job = deployed_job(privacy=RECORD, **EVERYBODY)
        folder = thorax.submit(job)
        self.crash_on(thorax, "south", '"kind": "ask"', before=True)
        thorax.run(folder)
        assert folder.read("summary.json")["contributions"] == dict.fromkeys(NAMES, 2)
        assert {name: reserved(thorax, name) for name in NAMES} == dict.fromkeys(NAMES, 2)

    def test_a_site_that_dies_with_its_answer_sends_the_same_bytes_again_and_pays_once(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(privacy=RECORD, **EVERYBODY))
        self.crash_on(thorax, "south", '"kind": "reply"', before=False)
        thorax.run(folder)
        assert folder.read("summary.json")["contributions"] == dict.fromkeys(NAMES, 2)
        assert reserved(thorax, "south") == 2
        assert sum(trainer.trained for trainer in thorax.sites["south"].trainers) == 2

    @pytest.mark.parametrize("stage", ["advertise", "share", "mask", "agree", "reveal"])
    @pytest.mark.parametrize("before", [True, False])
    def test_a_site_that_dies_in_a_secure_sum_costs_a_round_and_no_vector_leaves_twice(
        self, thorax: Thorax, stage: str, before: bool
    ) -> None:
        folder = thorax.submit(deployed_job(privacy=RECORD, **EVERYBODY, secure_aggregation={"colluders": 0}))
        self.crash_on(thorax, "south", f'"stage": "{stage}"', before=before)
        masked: list[tuple[str, str]] = []
        watch = thorax.mail.on_back

        def note(site: str, content: RecordDict) -> RecordDict | None:
            header = content["header"]["json"]
            if '"stage": "mask"' in header:
                masked.append((site, digest_of(content)))
            return watch(site, content)

        thorax.mail.on_back = note
        thorax.run(folder)
        assert folder.state == "finished"
        assert folder.read("summary.json")["contributions"] == dict.fromkeys(NAMES, 2)
        assert len(set(masked)) == len(masked)
        for name in NAMES:
            assert 2 <= reserved(thorax, name) <= 3
            sent = sum(site == name for site, _ in masked)
            assert sent <= reserved(thorax, name)

    def test_a_server_that_dies_between_rounds_goes_on_where_it_was(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(privacy=RECORD, training={"rounds": 3, **EVERYBODY["training"]}))

        class Killed(BaseException):
            pass

        def kill(site: str, content: RecordDict) -> RecordDict:
            if '"round": 2' in content["header"]["json"] and '"reply"' in content["header"]["json"]:
                thorax.mail.on_back = lambda site, content: content
                raise Killed
            return content

        thorax.mail.on_back = kill
        with pytest.raises(Killed):
            thorax.run(folder)
        thorax.mail.waiting, thorax.mail.answers = [], {}
        thorax.run(folder)
        assert [line["round"] for line in folder.lines("metrics.jsonl")] == [1, 2, 3]
        # The site whose answer was lost with the server sends the same again: nobody pays for round 2 twice.
        assert {reserved(thorax, name) for name in NAMES} == {3}

    def test_a_site_that_dies_after_it_kept_the_model_says_so_when_it_is_asked_again(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(privacy=RECORD, **EVERYBODY))
        self.crash_on(thorax, "south", '"kind": "agreed", "job": "' + folder.job.hash + '", "round": 2', before=False)
        thorax.run(folder)
        assert folder.read("summary.json")["not_delivered"] == []
        assert thorax.sites["south"].activations == 2
        assert reserved(thorax, "south") == 2

    def test_a_site_that_comes_back_after_the_offer_is_offered_the_job(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(training={"rounds": 3}))
        thorax.sites["west"].online = False

        def come_back(site: str, content: RecordDict) -> RecordDict:
            if '"round": 2' in content["header"]["json"]:
                thorax.sites["west"].online = True
            return content

        thorax.mail.on_back = come_back
        thorax.run(folder)
        assert folder.read("summary.json")["contributions"]["west"] == 1


class TestWhatAServerMayNot:
    """Each attack on one site: it gives no answer, its log says why, and the others go on."""

    def run_with(self, thorax: Thorax, change: Any, **job: Any) -> str:
        folder = thorax.submit(deployed_job(**job))
        thorax.mail.on_way = lambda site, content: change(content) if site == "north" else content
        thorax.run(folder)
        assert folder.read("summary.json")["contributions"] == {"north": 0, "south": 2, "west": 2}
        return thorax.sites["north"].said.getvalue()

    def test_alter_a_header(self, thorax: Thorax) -> None:
        def change(content: RecordDict) -> RecordDict:
            header = dict(content["header"])
            header["json"] = header["json"].replace('"round": 1', '"round": 2').replace('"version"', '"version"  ')
            header["json"] = header["json"].replace('"kind"', ' "kind"')
            return RecordDict({"header": ConfigRecord(header)})

        assert "altered, or sent in another's name" in self.run_with(thorax, change)

    def test_alter_an_array(self, thorax: Thorax) -> None:
        def change(content: RecordDict) -> RecordDict:
            header = dict(content["header"])
            data = bytearray(header["array"])
            if len(data) > 128:
                data[-1] ^= 1
            return RecordDict({"header": ConfigRecord({**header, "array": bytes(data)})})

        assert "altered" in self.run_with(thorax, change)

    def test_replay_a_message(self, thorax: Thorax) -> None:
        seen: list[RecordDict] = []

        def change(content: RecordDict) -> RecordDict:
            seen.append(content)
            return seen[0]

        folder = thorax.submit(deployed_job())
        thorax.mail.on_way = lambda site, content: change(content) if site == "north" else content
        thorax.run(folder)
        assert "replayed" in thorax.sites["north"].said.getvalue()
        assert folder.read("summary.json")["contributions"]["north"] == 0

    def test_replay_a_message_after_a_restart(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job())
        thorax.run(folder)
        from tests.deployment.federation import answered

        _, message = next(pair for pair in thorax.mail.carried if pair[0] == "north")
        thorax.sites["north"].crash()
        error = answered(thorax.sites["north"].desk, message.content)
        assert "second time" in str(error)

    def test_send_one_sites_message_to_another(self, thorax: Thorax) -> None:
        others: dict[str, RecordDict] = {}

        def change(site: str, content: RecordDict) -> RecordDict:
            others[site] = content
            return others.get("south", content) if site == "west" else content

        folder = thorax.submit(deployed_job())
        thorax.mail.on_way = change
        thorax.run(folder)
        assert "recipient is not the expected one" in thorax.sites["west"].said.getvalue()
        assert folder.read("summary.json")["contributions"]["west"] == 0

    @pytest.mark.parametrize(("ahead", "word"), [(400, "ahead of"), (-400, "behind")])
    def test_have_another_clock(self, thorax: Thorax, ahead: float, word: str) -> None:
        thorax.transport.clock = lambda: thorax.now + ahead
        folder = thorax.submit(deployed_job())

        def stop(site: str, content: RecordDict) -> RecordDict:
            folder.ask_to_stop()
            return content

        thorax.mail.on_way = stop
        thorax.run(folder)
        assert folder.lines("metrics.jsonl") == []
        assert re.search(f"(400|399) s {word} this site's clock", thorax.sites["north"].said.getvalue())
        assert "NTP" in thorax.sites["north"].said.getvalue()

    def test_run_another_version(self, thorax: Thorax, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("server.deployment.version", lambda name: "9.9.9")
        folder = thorax.submit(deployed_job())
        with pytest.raises(JobError, match="refuse"):
            thorax.run(folder)
        assert "the server runs fedchorus 9.9.9" in thorax.sites["north"].said.getvalue()


class TestWhatAServerMayNotAsk:
    """Of a site that agreed to a job: each request is sealed by the coordinator, and refused all the same."""

    def agreed(self, thorax: Thorax, **changes: Any) -> tuple[Job, Vector]:
        job = deployed_job(**changes)
        folder, start = thorax.submit(job), initial_parameters(job)[1]
        deployment = thorax.deployment(folder)
        parameters = initial_parameters(job)[0]
        offer = Offer(
            job.hash, job.toml.decode(), vector_hash(start), parameters.size, parameters.digest, version("fedchorus")
        )
        with a_server_app():
            deployment._offer(["north"], offer)
        assert deployment._agreed == {"north"}
        return job, start

    def ask(self, thorax: Thorax, request: Request) -> Answer | Failure:
        with a_server_app():
            ((_, answer),) = thorax.transport.exchange({"north": request})
        return answer

    def test_a_round_that_the_job_does_not_have(self, thorax: Thorax) -> None:
        job, start = self.agreed(thorax)
        assert isinstance(self.ask(thorax, ask_for(job.hash, 2, start, None)), Reply)
        assert isinstance(self.ask(thorax, ask_for(job.hash, 3, start, None)), Failure)
        assert "round 3 of a job that has 2" in thorax.sites["north"].said.getvalue()

    def test_another_first_model_than_was_approved(self, thorax: Thorax) -> None:
        job, start = self.agreed(thorax)
        assert isinstance(self.ask(thorax, ask_for(job.hash, 1, start + 1, None)), Failure)
        assert isinstance(self.ask(thorax, ask_for(job.hash, 1, start, None)), Reply)

    def test_the_same_rounds_again_and_again(self, thorax: Thorax, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("client.desk.MOST_REPEATS", 3)
        job, start = self.agreed(thorax)
        answers = [self.ask(thorax, ask_for(job.hash, 2, start + number, None)) for number in range(8)]
        assert [isinstance(answer, Reply) for answer in answers] == [True] * 5 + [False] * 3

    def test_a_job_it_never_offered(self, thorax: Thorax) -> None:
        _, start = self.agreed(thorax)
        assert isinstance(self.ask(thorax, ask_for("ab" * 32, 1, start, None)), Failure)
        assert isinstance(self.ask(thorax, Deliver("ab" * 32, 1, start, vector_hash(start))), Failure)

    def test_a_round_after_the_job_was_delivered(self, thorax: Thorax) -> None:
        job, start = self.agreed(thorax)
        assert isinstance(self.ask(thorax, Deliver(job.hash, 2, start, vector_hash(start))), Agreed)
        assert isinstance(self.ask(thorax, ask_for(job.hash, 1, start, None)), Failure)
        assert "a job that is over" in thorax.sites["north"].said.getvalue()

    def test_what_the_policy_refuses_starts_no_trainer_and_opens_no_data(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(purpose="care"))
        with pytest.raises(JobError):
            thorax.run(folder)
        assert thorax.sites["north"].trainers == []

    def test_whether_data_fit_more_often_than_the_policy_allows_jobs(self, tmp_path: Path) -> None:
        thorax = Thorax(tmp_path, policy=POLICY + "[limits]\njobs_per_day = 3\n")
        columns = {"columns": {"absent": {"range": [0, 1]}}}
        for seed in range(5):
            with pytest.raises(JobError):
                thorax.run(thorax.submit(deployed_job(seed=seed, data={"target": "x", **columns})))
        assert len(thorax.sites["north"].trainers) == 3
        assert "limits.jobs_per_day" in thorax.sites["north"].said.getvalue()


class TestTheEnd:
    def test_a_delivery_that_was_stopped_is_resumed(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(privacy=RECORD, **EVERYBODY))

        def stop(site: str, content: RecordDict) -> RecordDict | None:
            if '"kind": "deliver"' in content["header"]["json"] and site != "north":
                folder.ask_to_stop()
                return None
            return content

        thorax.mail.on_way = stop
        thorax.run(folder)
        assert folder.read("state.json")["state"] == "stopped"
        thorax.mail.on_way = lambda site, content: content
        (folder.path / "stop").unlink()
        thorax.run(folder)
        assert folder.read("summary.json")["not_delivered"] == []
        assert all(account.settled for name in NAMES for account in ledger_of(thorax, name).jobs.values())

    def test_the_budget_is_freed_whatever_the_policy_and_the_data_say_by_then(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(privacy=RECORD, **EVERYBODY))

        def change_everything(site: str, content: RecordDict) -> RecordDict:
            if site == "south" and '"kind": "deliver"' in content["header"]["json"]:
                (thorax.folder / "south" / "policy.toml").write_text(POLICY.replace('["training"]', '["care"]'))
                (thorax.folder / "south" / "records.csv").unlink(missing_ok=True)
                thorax.sites["south"].restart()
            return content

        thorax.mail.on_way = change_everything
        thorax.run(folder)
        assert all(account.settled for account in ledger_of(thorax, "south").jobs.values())
        kept = thorax.folder / "south" / "state" / "jobs" / folder.job.hash
        assert (kept / "model.safetensors").exists()
        assert "metrics" not in json.loads((kept / "report.json").read_text())

    def test_a_job_goes_on_with_the_members_it_began_with_or_not_at_all(self, thorax: Thorax) -> None:
        folder = thorax.submit(deployed_job(training={"rounds": 3}))

        def stop(site: str, content: RecordDict) -> RecordDict:
            folder.ask_to_stop()
            return content

        thorax.mail.on_back = stop
        thorax.run(folder)
        (folder.path / "stop").unlink()
        thorax.roster = replace(thorax.roster, version=2, signatures={})
        with pytest.raises(JobError, match="members or keys changed"):
            thorax.run(folder)

    def test_the_servers_ledger_is_settled_after_a_crash_at_the_very_end(self, thorax: Thorax) -> None:
        central = {"client": {"noise_multiplier": 4.0, "epsilon": 90.0, "delta": 1e-2, "spare_rounds": 3}}
        folder = thorax.submit(deployed_job(privacy=central, strategy={"weighting": "equal"}))
        thorax.mail.on_way = self.kill_at_delivery
        with pytest.raises(KeyboardInterrupt):
            thorax.run(folder)
        thorax.mail.on_way = lambda site, content: content
        thorax.mail.waiting = []
        thorax.run(folder)
        entries = read_ledger(thorax.coordinator / "server.jsonl", SERVER, thorax.key.public_hex)
        assert Accounts.of(SERVER, entries).jobs[folder.job.hash].settled
        assert Accounts.of(SERVER, entries).jobs[folder.job.hash].used == 2

    @staticmethod
    def kill_at_delivery(site: str, content: RecordDict) -> RecordDict:
        if '"kind": "deliver"' in content["header"]["json"]:
            raise KeyboardInterrupt
        return content

    def test_of_a_secret_cohort_nothing_is_written_down(self, thorax: Thorax) -> None:
        central = {"client": {"noise_multiplier": 4.0, "epsilon": 90.0, "delta": 1e-2}}
        changes = {"privacy": central, "strategy": {"weighting": "equal"}, "cohort": {"rate": 0.5}}
        folder = thorax.submit(deployed_job(training={"rounds": 6}, **changes))
        thorax.run(folder)
        rounds = [event for event in folder.events() if event["event"] == "round"]
        assert len(rounds) == 6
        assert all(event["contributors"] is None and not event["failures"] for event in rounds)
        agreed = [number for number, event in enumerate(folder.events()) if event["event"] == "agreed"]
        first = next(number for number, event in enumerate(folder.events()) if event["event"] == "round")
        assert len(agreed) == 3
        assert max(agreed) < first
        assert folder.read("summary.json")["contributions"] is None


class TestWhatASiteMayNot:
    def contributions(self, thorax: Thorax, on_back: Any) -> tuple[dict[str, int], str]:
        folder = thorax.submit(deployed_job())
        thorax.mail.on_back = on_back
        thorax.run(folder)
        return folder.read("summary.json")["contributions"], str(folder.events())

    def test_answer_in_anothers_name(self, thorax: Thorax) -> None:
        kept: dict[str, RecordDict] = {}

        def forge(site: str, content: RecordDict) -> RecordDict:
            kept[site] = content
            return kept["north"] if site == "south" and '"reply"' in content["header"]["json"] else content

        counted, events = self.contributions(thorax, forge)
        assert counted == {"north": 2, "south": 0, "west": 2}
        assert "sender is not the expected one" in events

    def test_repeat_an_older_answer(self, thorax: Thorax) -> None:
        first: list[RecordDict] = []

        def repeat(site: str, content: RecordDict) -> RecordDict:
            if site == "south" and '"reply"' in content["header"]["json"]:
                first.append(content)
                return first[0]
            return content

        counted, events = self.contributions(thorax, repeat)
        assert counted["south"] == 1
        assert "nonce is not the expected one" in events

    def test_have_its_answer_altered_on_the_way(self, thorax: Thorax) -> None:
        def alter(site: str, content: RecordDict) -> RecordDict:
            header = dict(content["header"])
            if site == "south" and '"reply"' in header["json"]:
                header["array"] = header["array"][:-1] + bytes([header["array"][-1] ^ 1])
            return RecordDict({"header": ConfigRecord(header)})

        counted, events = self.contributions(thorax, alter)
        assert counted == {"north": 2, "south": 0, "west": 2}
        assert "signature is not its sender's" in events

    @pytest.mark.parametrize("content", [RecordDict(), RecordDict({"header": ConfigRecord({"json": "{}"})})])
    def test_answer_something_else(self, thorax: Thorax, content: RecordDict) -> None:
        counted, events = self.contributions(
            thorax, lambda site, good: content if site == "south" and '"reply"' in good["header"]["json"] else good
        )
        assert counted["south"] == 0
        assert "malformed reply" in events


class TestApprovals:
    @pytest.fixture
    def approver(self, tmp_path: Path) -> IdentityKey:
        return IdentityKey.create(tmp_path / "alice.pem")

    def needs(self, thorax: Thorax, approver: IdentityKey) -> None:
        text = POLICY + "[limits]\napprovals = 1\n"
        text = f'approvers = ["{approver.public_hex}"]\n' + text
        for name in NAMES:
            (thorax.folder / name / "policy.toml").write_text(text)
            thorax.sites[name].restart()

    def test_a_job_that_nobody_approved_is_refused_and_one_that_was_runs(
        self, thorax: Thorax, approver: IdentityKey
    ) -> None:
        self.needs(thorax, approver)
        with pytest.raises(JobError, match="refuse the job"):
            thorax.run(thorax.submit(deployed_job()))
        assert "limits.approvals" in thorax.sites["north"].said.getvalue()
        job = deployed_job(seed=1)
        digest_of_model = vector_hash(initial_parameters(job)[1])
        signature = approver.sign(approval_of(job.hash, digest_of_model)).hex()
        folder = thorax.submit(job, [(approver.public_hex, signature)])
        thorax.run(folder)
        assert folder.state == "finished"

    def test_an_approval_of_another_job_does_not_count(self, thorax: Thorax, approver: IdentityKey) -> None:
        self.needs(thorax, approver)
        signature = approver.sign(approval_of("ab" * 32, "cd" * 32)).hex()
        with pytest.raises(JobError, match="refuse the job"):
            thorax.run(thorax.submit(deployed_job(), [(approver.public_hex, signature)]))


class TestBudgets:
    def test_a_second_job_that_would_exceed_the_sites_budget_is_refused(self, tmp_path: Path) -> None:
        policy = POLICY.replace("unlimited = true", "epsilon = 1.5\ndelta = 1e-2")
        thorax = Thorax(tmp_path, policy=policy)
        privacy = {"record": {"epsilon": 1.0, "delta": 1e-2}}
        first = thorax.submit(deployed_job(privacy=privacy, **EVERYBODY))
        thorax.run(first)
        assert first.state == "finished"
        with pytest.raises(JobError, match="refuse the job"):
            thorax.run(thorax.submit(deployed_job(privacy=privacy, seed=1, **EVERYBODY)))
        assert "data.records.epsilon" in thorax.sites["north"].said.getvalue()


def digest_of(content: RecordDict) -> str:
    import hashlib

    return hashlib.sha256(content["header"]["array"]).hexdigest()
