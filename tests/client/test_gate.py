"""Nothing passes the gate that the site's own ledger does not hold; a crash anywhere costs a round and no secret."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.gate import Account, Gate, Outbox, TrainingDiverged
from privacy.budget import Limit, SiteBudget, charged
from privacy.errors import BudgetExceeded
from privacy.events import GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import Entry, Head, Ledger, read_ledger
from strategies.messages import Ask, MalformedMessage, Refusal, Reply, ask_for
from strategies.parameters import Vector, vector_hash
from strategies.total import Layout

JOB = "ab" * 32
LAYOUT = Layout(3)
ROUNDS = 3
EVENT = GaussianEvent(noise_multiplier=8.0, clip_norm=1.0, sampling_rate=1.0, count=1, rng="seeded-simulation")
MODELS = [np.array([k, 0.5, -k], np.float32) for k in range(3)]


class Crash(Exception):
    """The process ends here; what is on disk stays."""


@dataclass(frozen=True)
class House:
    """One site's folder. Every `gate()` is a new process's: new objects on the same files."""

    folder: Path

    def gate(self, *, budget: type[SiteBudget] = SiteBudget, outbox: type[Outbox] = Outbox) -> Gate:
        ledger = Ledger(self.folder / "ledger.jsonl", "north", IdentityKey.load(self.folder / "identity.pem"))
        return Gate("north", JOB, LAYOUT, Account(budget(ledger), outbox(self.folder / "outbox" / "last.bin")))

    def entries(self) -> list[Entry]:
        """What an auditor reads: every hash and signature verified."""
        public = IdentityKey.load(self.folder / "identity.pem").public_hex
        return read_ledger(self.folder / "ledger.jsonl", "north", public)

    def kinds(self) -> list[str]:
        """The kinds of the entries after `open` and `plan`."""
        assert [entry.kind for entry in self.entries()[:2]] == ["open", "plan"]
        return [entry.kind for entry in self.entries()[2:]]

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site that has admitted a job of three rounds."""
    folder = tmp_path_factory.mktemp("planned")
    IdentityKey.create(folder / "identity.pem")
    budget = House(folder).gate().account
    assert budget is not None
    budget.budget.open(rows=10, simulation=True)
    budget.budget.plan(job=JOB, events=[EVENT], rounds=ROUNDS, limits=[Limit(epsilon=None, delta=1e-5)])
    return folder


@pytest.fixture
def house(planned: Path, tmp_path: Path) -> House:
    return House(Path(shutil.copytree(planned, tmp_path / "north")))


class Training:
    """A trainer that returns a new contribution at every call, and counts them."""

    def __init__(self, during: Callable[[], object] = lambda: None) -> None:
        self.calls, self._during = 0, during

    def __call__(self) -> Vector:
        self.calls += 1
        self._during()
        return np.array([self.calls, 0.25, -1.0, 10.0], np.float32)


def never() -> Vector:
    raise AssertionError("data were touched")


def ask(round_number: int = 1, model: Vector = MODELS[0], witness: str | None = None) -> Ask:
    return ask_for(JOB, round_number, model, witness)


def sent(answer: Reply | Refusal) -> bytes:
    assert isinstance(answer, Reply)
    return answer.contribution.tobytes()


class TestOrder:
    def test_reserve_is_on_disk_before_data_are_touched_and_commit_before_the_reply(self, house: House) -> None:
        seen: list[list[str]] = []
        answer = house.gate().pass_through(ask(witness="cd" * 32), Training(lambda: seen.append(house.kinds())))
        assert seen == [["reserve"]]
        assert house.kinds() == ["reserve", "commit"]
        reserve, commit = house.entries()[2:]
        assert reserve.body["events"] == [EVENT.as_dict()]
        assert (reserve.body["job"], reserve.body["round"]) == (JOB, 1)
        assert (reserve.body["model"], reserve.body["witness"]) == (vector_hash(MODELS[0]), "cd" * 32)
        assert isinstance(answer, Reply)
        assert commit.body == {
            "job": JOB,
            "round": 1,
            "reserve": reserve.seq,
            "output": vector_hash(answer.contribution),
        }
        assert (answer.site, answer.job, answer.round_number, answer.head) == ("north", JOB, 1, commit.head)

    def test_the_contribution_is_in_the_outbox_before_its_hash_is_committed(self, house: House) -> None:
        kept: list[Vector | None] = []

        class Watched(SiteBudget):
            def commit(self, reservation: Entry, *, output: str, round_number: int | None = None) -> Head:
                kept.append(Outbox(house.folder / "outbox" / "last.bin").get(output))
                return super().commit(reservation, output=output)

        answer = house.gate(budget=Watched).pass_through(ask(), Training())
        assert [None if vector is None else vector.tobytes() for vector in kept] == [sent(answer)]

    def test_each_round_is_charged_once(self, house: House) -> None:
        gate, training = house.gate(), Training()
        answers = [gate.pass_through(ask(n, MODELS[n - 1]), training) for n in (1, 2, 3)]
        assert house.kinds() == ["reserve", "commit"] * 3
        assert len({sent(answer) for answer in answers}) == training.calls == 3
        assert charged(house.entries()) == [EVENT] * 3


class TestCrashes:
    def test_a_crash_in_training_leaves_the_round_spent(self, house: House) -> None:
        def crash() -> None:
            raise Crash

        with pytest.raises(Crash):
            house.gate().pass_through(ask(), Training(crash))
        assert house.kinds() == ["reserve"]
        assert charged(house.entries()) == [EVENT]
        house.gate().pass_through(ask(), Training())
        assert house.kinds() == ["reserve", "reserve", "commit"]
        assert house.entries()[-1].body["reserve"] == house.entries()[-2].seq

    def test_what_left_is_sent_again_byte_for_byte_without_a_new_charge(self, house: House) -> None:
        first = house.gate().pass_through(ask(), Training())
        before = house.files()
        again = house.gate().pass_through(ask(), never)
        assert sent(again) == sent(first)
        assert isinstance(again, Reply)
        assert again.head == house.entries()[-1].head
        assert house.files() == before

    def test_what_was_never_committed_never_leaves(self, house: House) -> None:
        class CrashBeforeCommit(SiteBudget):
            def commit(self, reservation: Entry, *, output: str, round_number: int | None = None) -> Head:
                raise Crash

        training = Training()
        with pytest.raises(Crash):
            house.gate(budget=CrashBeforeCommit).pass_through(ask(), training)
        assert house.kinds() == ["reserve"]
        answer = house.gate().pass_through(ask(), training)
        assert training.calls == 2
        assert house.kinds() == ["reserve", "reserve", "commit"]
        assert isinstance(answer, Reply)
        assert answer.contribution[0] == 2

    @pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:-4] + b"abcd"])
    def test_an_outbox_that_is_not_what_was_committed_is_not_sent(
        self, house: House, damage: Callable[[bytes], bytes]
    ) -> None:
        training = Training()
        house.gate().pass_through(ask(), training)
        path = house.folder / "outbox" / "last.bin"
        path.write_bytes(damage(path.read_bytes()))
        answer = house.gate().pass_through(ask(), training)
        assert house.kinds() == ["reserve", "commit"] * 2
        assert vector_hash(np.frombuffer(sent(answer), np.float32)) == house.entries()[-1].body["output"]
        assert training.calls == 2

    def test_a_half_written_outbox_file_does_not_matter(self, house: House) -> None:
        first = house.gate().pass_through(ask(), Training())
        (house.folder / "outbox" / "last.partial").write_bytes(b"half")
        assert sent(house.gate().pass_through(ask(), never)) == sent(first)
        house.gate().pass_through(ask(2, MODELS[1]), Training())
        assert house.kinds() == ["reserve", "commit"] * 2

    @pytest.mark.parametrize("again", [ask(1, MODELS[1]), ask(2, MODELS[0])])
    def test_another_model_or_round_is_charged_anew(self, house: House, again: Ask) -> None:
        training = Training()
        first, second = (house.gate().pass_through(request, training) for request in (ask(1, MODELS[0]), again))
        assert sent(first) != sent(second)
        assert house.kinds() == ["reserve", "commit"] * 2

    @settings(max_examples=20, deadline=None)
    @given(
        steps=st.lists(
            st.tuples(st.integers(1, 2), st.integers(0, 1), st.sampled_from(["", "", "train", "outbox", "reply"])),
            max_size=8,
        )
    )
    def test_whatever_crashes_in_whatever_order_nothing_is_spent_twice_or_sent_without_a_charge(
        self, planned: Path, steps: list[tuple[int, int, str]]
    ) -> None:
        class CrashAfterPut(Outbox):
            def put(self, contribution: Vector) -> None:
                super().put(contribution)
                raise Crash

        def crash() -> None:
            raise Crash

        left: dict[tuple[int, int], bytes] = {}
        in_outbox, reserved, calls = b"", 0, 0
        with tempfile.TemporaryDirectory() as parent:
            house = House(Path(shutil.copytree(planned, Path(parent, "north"))))
            for round_number, model, where in steps:
                gate = house.gate(outbox=CrashAfterPut if where == "outbox" else Outbox)
                training = Training(crash if where == "train" else lambda: None)
                training.calls = calls
                answer: Reply | Refusal | None = None
                try:
                    answer = gate.pass_through(ask(round_number, MODELS[model]), training)
                except Crash:
                    assert where in ("train", "outbox")
                spent = sum(kind == "reserve" for kind in house.kinds())
                resent = left.get((round_number, model)) is not None and left[round_number, model] == in_outbox
                if resent:
                    assert (training.calls, spent) == (calls, reserved)
                    assert answer is not None
                    assert sent(answer) == in_outbox
                elif reserved == ROUNDS:
                    assert answer == Refusal("north", JOB, round_number)
                    assert (training.calls, spent) == (calls, reserved)
                else:
                    assert (training.calls, spent) == (calls + 1, reserved + 1)
                    assert (answer is None) == (where in ("train", "outbox"))
                    new = np.array([training.calls, 0.25, -1.0, 10.0], np.float32).tobytes()
                    if where != "train":
                        in_outbox = new
                    if answer is not None:
                        left[round_number, model] = new
                        assert sent(answer) == new
                calls, reserved = training.calls, spent
            outputs = {entry.body["output"] for entry in house.entries() if entry.kind == "commit"}
            assert {vector_hash(np.frombuffer(data, np.float32)) for data in left.values()} <= outputs
            assert reserved <= ROUNDS


DIE = """
import os, signal, sys
from pathlib import Path
from client.gate import Outbox
from privacy.budget import SiteBudget
from tests.client.test_gate import House, Training, ask

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class DiesAfterPut(Outbox):
    def put(self, contribution):
        super().put(contribution)
        die()

class DiesAfterCommit(SiteBudget):
    def commit(self, reservation, *, output):
        super().commit(reservation, output=output)
        die()

where, folder = sys.argv[1:]
gate = House(Path(folder)).gate(
    outbox=DiesAfterPut if where == "put" else Outbox,
    budget=DiesAfterCommit if where == "commit" else SiteBudget,
)
gate.pass_through(ask(), Training(die if where == "train" else lambda: None))
"""


class TestKill:
    @pytest.mark.parametrize(
        ("where", "on_disk", "after"),
        [
            ("train", ["reserve"], ["reserve", "reserve", "commit"]),
            ("put", ["reserve"], ["reserve", "reserve", "commit"]),
            ("commit", ["reserve", "commit"], ["reserve", "commit"]),
        ],
    )
    def test_a_killed_client_starts_again_and_goes_on(
        self, house: House, where: str, on_disk: list[str], after: list[str]
    ) -> None:
        killed = subprocess.run(
            [sys.executable, "-c", DIE, where, str(house.folder)], check=False, env={**os.environ, "PYTHONPATH": "."}
        )
        assert killed.returncode == -signal.SIGKILL
        assert house.kinds() == on_disk
        training = Training()
        training.calls = 5
        answer = house.gate().pass_through(ask(), training)
        assert house.kinds() == after
        assert training.calls == 5 + after.count("reserve") - on_disk.count("reserve")
        assert vector_hash(np.frombuffer(sent(answer), np.float32)) == house.entries()[-1].body["output"]


class TestBudget:
    def test_beyond_the_plan_the_site_refuses_without_touching_data_or_disk(self, house: House) -> None:
        gate = house.gate()
        for n in range(ROUNDS):
            gate.pass_through(ask(n + 1), Training())
        before = house.files()
        for request in (ask(ROUNDS + 1), ask(1, MODELS[1])):
            for each in (gate, house.gate()):
                answer = each.pass_through(request, never)
                assert answer == Refusal("north", JOB, request.round_number)
        assert house.files() == before

    def test_what_left_last_is_sent_again_even_then(self, house: House) -> None:
        answers = [house.gate().pass_through(ask(n + 1), Training()) for n in range(ROUNDS)]
        assert sent(house.gate().pass_through(ask(ROUNDS), never)) == sent(answers[-1])

    def test_crashes_use_the_plan_up(self, house: House) -> None:
        def crash() -> None:
            raise Crash

        for _ in range(ROUNDS):
            with pytest.raises(Crash):
                house.gate().pass_through(ask(), Training(crash))
        assert isinstance(house.gate().pass_through(ask(), never), Refusal)
        assert charged(house.entries()) == [EVENT] * ROUNDS

    def test_a_budget_that_is_exceeded_while_training_is_the_trainers_error_not_a_refusal(self, house: House) -> None:
        def exceed() -> None:
            raise BudgetExceeded("by something else than the reservation")

        with pytest.raises(BudgetExceeded):
            house.gate().pass_through(ask(), Training(exceed))


NOT_FINITE = [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]]


class TestWhatIsNotFinite:
    @pytest.mark.parametrize("values", NOT_FINITE, ids=str)
    def test_never_leaves_and_stays_spent(self, house: House, values: list[float]) -> None:
        contribution = np.array([*values, *[1.0] * (LAYOUT.size - len(values))], np.float32)
        with pytest.raises(TrainingDiverged, match="north: training diverged") as caught:
            house.gate().pass_through(ask(), lambda: contribution)
        assert "nan" not in str(caught.value)
        assert house.kinds() == ["reserve"]
        assert not (house.folder / "outbox").exists()

    @pytest.mark.parametrize("values", NOT_FINITE, ids=str)
    def test_never_leaves_an_unprotected_job_either(self, values: list[float]) -> None:
        contribution = np.array([*values, *[1.0] * (LAYOUT.size - len(values))], np.float32)
        with pytest.raises(TrainingDiverged):
            Gate("north", JOB, LAYOUT, None).pass_through(ask(), lambda: contribution)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (replace(ask(), job="0" * 64), "another job"),
        (replace(ask(), round_number=0), "round numbers start at 1"),
        (replace(ask(), model_hash="0" * 64), "not the one that its hash names"),
        (replace(ask(), model=MODELS[1]), "not the one that its hash names"),
        (ask(model=np.array([0, np.nan, 0], np.float32)), "the model is not finite"),
        (ask(model=np.array([0, np.inf, 0], np.float32)), "the model is not finite"),
        (ask(model=np.zeros(2, np.float32)), r"the model must be float32 \(3,\)"),
        (replace(ask(), model=np.zeros(3)), r"must be float32 \(3,\), got float64"),  # type: ignore[arg-type]
    ],
)
def test_a_request_that_was_not_approved_is_refused_before_anything_is_written(
    house: House, request_: Ask, said: str
) -> None:
    before = house.files()
    for gate in (house.gate(), Gate("north", JOB, LAYOUT, None)):
        with pytest.raises(MalformedMessage, match=said):
            gate.pass_through(request_, never)
    assert house.files() == before


def test_an_unprotected_job_keeps_no_ledger_and_trains_each_time() -> None:
    gate, training = Gate("north", JOB, LAYOUT, None), Training()
    first, second = (gate.pass_through(ask(), training) for _ in range(2))
    assert sent(first) != sent(second)
    assert isinstance(first, Reply)
    assert first.head is None


class TestOutbox:
    @settings(max_examples=25, deadline=None)
    @given(values=st.lists(st.floats(width=32), max_size=20))
    def test_keeps_the_last_vector_bit_for_bit_under_its_hash_alone(self, values: list[float]) -> None:
        vector, other = np.array(values, np.float32), np.array([*values, 1.0], np.float32)
        with tempfile.TemporaryDirectory() as folder:
            outbox = Outbox(Path(folder, "deep", "last.bin"))
            assert outbox.get(vector_hash(vector)) is None
            outbox.put(other)
            outbox.put(vector)
            kept = outbox.get(vector_hash(vector))
            assert outbox.get(vector_hash(other)) is None
            assert [path.name for path in Path(folder, "deep").iterdir()] == ["last.bin"]
        assert kept is not None
        assert kept.dtype == np.float32
        assert kept.tobytes() == vector.tobytes()
