"""A trainer in a process of its own answers as one in this process, whatever happens to its process."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from client.life import OUTPUT_LIMIT
from client.pipe import HEADER_LIMIT, MalformedFrame, Pipe, PipeClosed
from client.sandbox import ROOT, Sandbox
from client.site import SitePlan
from client.trainer_child import sgd_from, sgd_record
from client.trainer_process import TrainerDied, TrainerFailed, TrainerProcess
from privacy.dpsgd import RecordLevelSgd
from privacy.errors import DataError, JobError, RunError
from privacy.mechanism import GaussianSum
from strategies.job import Job
from strategies.messages import Ask, ask_for
from strategies.parameters import Vector
from strategies.protocol import Traits
from strategies.total import layout_for
from tests.strategies.jobs import make_job

ROWS = 24
DATA = {"path": None, "client": None, "columns": {"x": {"range": [0, 1]}}}
JOB = make_job(data={**DATA, "files": {"north": "north.csv"}}, training={"local_steps": 3})
PLAIN_MODEL = np.array([0.5, -0.25], np.float32)
# A task of a site's own: the model's first number tells it what to do.
OWN_TASK = """
import os, sys
from torch import nn
from client.tasks import TabularClassification
from privacy.errors import JobError

class Model(nn.Sequential):
    def forward(self, x):
        match round(float(self[0].weight.detach()[0, 0])):
            case 101:
                print("record", x[0, 0].item())
                os.write(1, b"more of it")
                sys.stderr.write("and an error")
            case 102:
                raise ValueError(f"record {x[0, 0].item()}")
            case 103:
                raise JobError(f"record {x[0, 0].item()}")
            case 104:
                raise type("x" * 100, (Exception,), {})
        return super().forward(x)

class Own(TabularClassification):
    def model(self, features, classes):
        return Model(*super().model(features, classes))
"""
OWN_JOB = make_job(
    data={**DATA, "files": {"north": "north.csv"}}, training={"local_steps": 3}, task={"name": "own_task:Own"}
)


def write_data(folder: Path, rows: int = ROWS) -> Path:
    lines = ["x,y", *(f"{(7 * row % 24) / 24},{row % 2}" for row in range(rows))]
    path = folder / "north.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def request(job: Job, model: list[float] | None = None, round_number: int = 1) -> Ask:
    return ask_for(job.hash, round_number, np.array(model or PLAIN_MODEL, np.float32), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "keys").mkdir()
    (folder / "keys" / "identity.pem").write_text("secret")
    (folder / "code").mkdir()
    (folder / "code" / "own_task.py").write_text(OWN_TASK)
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def trainer(site: Path) -> Iterator[TrainerProcess]:
    process = TrainerProcess(data=site / "north.csv", hidden=[site / "keys"], code=site / "code", timeout_s=200)
    with process:
        opened = process.open(OWN_JOB, "north")
        process.plan(SitePlan(opened.rows))
        yield process


def in_process(job: Job, site: Path, ask: Ask) -> tuple[Vector, dict[str, float]]:
    """The same training and evaluation here, put together from the parts that a simulation uses."""
    from client.data import encode, split
    from client.local import LocalTraining
    from client.tables import read_frame
    from client.tasks import initial_model, task_for
    from client.training import Trainer
    from privacy.noise import OsNoise
    from strategies.catalogue import strategy_for

    task = task_for(job)
    trainer = Trainer(task, initial_model(task, features=1, classes=2, seed=job.seed), job.training)
    data = split(encode(read_frame(site / "north.csv", job.data), job.data, where="here"), job.data, site="north")
    train = LocalTraining(
        "north",
        job=job,
        plan=SitePlan(len(data.train)),
        strategy=strategy_for(job),
        trainer=trainer,
        records=data.train,
        layout=layout_for(job, 2, Traits()),
        noise=lambda _: OsNoise(),
    )
    contribution, _ = train(ask)
    trainer.load(ask.model)
    test = trainer.place(data.test)
    figures = trainer.figures(trainer.outputs(test.features), test.targets)
    known = {name: value for name, value in figures.items() if value is not None}
    return contribution, {**known, "rows": len(data.test)}


def kill(process: TrainerProcess) -> None:
    life = process._life
    assert life is not None
    os.kill(life._process.pid, signal.SIGKILL)
    while not life.has_ended:
        time.sleep(0.001)


class TestRealTrainer:
    def test_answers_to_the_bit_as_in_this_process_and_again_after_it_was_killed(
        self, trainer: TrainerProcess, site: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(site / "code"))
        ask = request(OWN_JOB)
        expected, means = in_process(OWN_JOB, site, ask)
        first = trainer.train(ask)[0]
        np.testing.assert_array_equal(first, expected)
        assert trainer.evaluate(ask.model) == means
        kill(trainer)
        np.testing.assert_array_equal(trainer.train(ask)[0], expected)
        np.testing.assert_array_equal(first, expected)
        assert np.abs(trainer.train(request(OWN_JOB, round_number=2))[0] - expected).max() > 1e-4

    def test_tells_what_a_plan_needs(self, trainer: TrainerProcess) -> None:
        assert trainer._opened is not None
        assert (trainer._opened.rows, trainer._opened.test_rows) == (18, 6)
        assert trainer._opened.parameters.shapes == {"0.weight": (1, 1), "0.bias": (1,)}
        assert trainer._opened.device in ("cpu", "cuda")

    def test_says_what_isolation_is_in_force(self, trainer: TrainerProcess) -> None:
        best = Sandbox.available()[0]
        words = {
            "bubblewrap": "bubblewrap: no network, the site's keys hidden, its data read-only",
            "namespaces": "namespaces: no network, the site's keys hidden, its data read-only",
            "limits": (
                "resource limits only: the network, the site's keys, writing to its data within the trainer's reach"
            ),
        }
        assert trainer.isolation == words[best.wrapper]

    def test_what_the_task_prints_stays_apart_from_its_answers(self, trainer: TrainerProcess) -> None:
        trainer.train(request(OWN_JOB, [101.0, 0.0]))[0]
        np.testing.assert_array_equal(trainer.train(request(OWN_JOB))[0], trainer.train(request(OWN_JOB))[0])
        assert all(words in trainer.output for words in (b"record", b"more of it", b"and an error"))

    @pytest.mark.parametrize(("number", "word"), [(102, "ValueError"), (103, "JobError"), (104, "an error")])
    def test_nothing_of_a_record_is_in_the_error_of_a_task(
        self, trainer: TrainerProcess, number: int, word: str
    ) -> None:
        with pytest.raises(TrainerFailed) as raised:
            trainer.train(request(OWN_JOB, [float(number), 0.0]))[0]
        assert str(raised.value).startswith(f"the task failed with {word} in the call 'train'; ")
        assert "record" not in str(raised.value)
        assert raised.value.__cause__ is None
        # It goes on as before, with no new process.
        assert trainer.train(request(OWN_JOB))[0].shape == (5,)

    def test_a_plan_that_is_not_the_jobs_is_refused(self, trainer: TrainerProcess) -> None:
        sgd = RecordLevelSgd(mechanism=GaussianSum(clip_norm=1.0, noise_multiplier=1.0), sampling_rate=0.5, steps=1)
        with pytest.raises(JobError, match="the plan is for 5 training rows, the data have 18"):
            trainer.plan(SitePlan(5))
        with pytest.raises(JobError, match="differ on record-level privacy"):
            trainer.plan(SitePlan(18, sgd=sgd))
        trainer.plan(SitePlan(18))

    def test_wrong_data_and_wrong_jobs_are_told_in_their_own_words(self, trainer: TrainerProcess, site: Path) -> None:
        wrong = make_job(data={**DATA, "files": {"north": "north.csv"}, "columns": {"z": {"range": [0, 1]}}})
        unknown = make_job(data={**DATA, "files": {"north": "north.csv"}}, task={"name": "no_such:Task"})
        with pytest.raises(DataError, match=r"north.csv: column 'z' is absent; is its first line a header\?"):
            trainer.open(wrong, "north")
        with pytest.raises(JobError, match=r"task\.name: cannot import 'no_such'"):
            trainer.open(unknown, "north")
        # And a private job, in the same process: what is noisy is not the same twice.
        private = make_job(
            data={**DATA, "files": {"north": "north.csv"}},
            training={"local_steps": 2, "batch_size": None, "sampling_rate": 1.0},
            privacy={"record": {"noise_multiplier": 4.0, "delta": 1e-3}},
        )
        opened = trainer.open(private, "north")
        trainer.plan(SitePlan.make(private, rows=opened.rows, parameters=2, rng="os", site="north"))
        first, second = (trainer.train(request(private))[0] for _ in range(2))
        assert (first.shape, first[2]) == ((3,), 18)
        assert np.abs(first - second).max() > 1e-4


FAKE = """
import array, json, os, signal, socket, struct, sys, time
end = socket.socket(fileno=os.dup(0))

def exactly(count):
    data = b""
    while len(data) < count:
        more = end.recv(count - len(data))
        if not more:
            os._exit(0)
        data += more
    return data

with open(sys.argv[1], "a+") as marks:
    marks.write("x")
    marks.seek(0)
    lives = len(marks.read())
calls = 0
while True:
    version, text, numbers = struct.unpack("<4sIQ", exactly(16))
    call = json.loads(exactly(text))
    model = array.array("f", exactly(numbers))
    name = call["call"]
    calls += 1
    answer, vector = {}, b""
    if name == "prove":
        answer = {"network": True, "hidden": True, "writable": True}
    if name == "open":
        answer = {"job": HASH, "rows": 18, "test_rows": 6, "shapes": [["w", [1, 1]], ["b", [1]]], "device": "cpu"}
        layout = {"sent": 2, "metrics": ["loss", "examples"], "received": 2, "memory": 0, "received_only": 0}
        answer["layout"] = {**layout, "personal": False}
    if name == "train":
        vector = struct.pack("<5f", *(2 * x for x in model), calls, lives, 0)
    if name == "evaluate":
        answer = {"metrics": {"loss": 1.5}}
    if name == "close":
        break
    ACTION
    answer = json.dumps(answer).encode()
    end.sendall(struct.pack("<4sIQ", b"fct1", len(answer), len(vector)) + answer + vector)
"""


def fake(folder: Path, action: str = "pass", *, timeout_s: float = 60.0, begun: bool = True) -> TrainerProcess:
    """A trainer whose child is another writing of the protocol, without torch. It does `action` before it answers.

    Its contribution holds twice the model, the number of calls of its process, and how many processes there were.
    """
    program = folder / "fake.py"
    program.write_text(FAKE.replace("HASH", repr(JOB.hash)).replace("ACTION", textwrap.indent(action, "    ").lstrip()))
    child = (sys.executable, "-S", "-I", str(program), str(folder / "lives"))
    process = TrainerProcess(data=write_data(folder), isolation="none", timeout_s=60.0, child=child)
    if begun:
        process.start()
        process.open(JOB, "north")
        process.plan(SitePlan(18))
    process._timeout_s = timeout_s  # Not for the start, which a busy machine may delay.
    return process


def trained(process: TrainerProcess) -> list[float]:
    try:
        return list(map(float, process.train(request(JOB))[0]))
    finally:
        process.close()


def failure(process: TrainerProcess) -> RunError:
    """What `train` raises; afterwards nothing is left of the child."""
    with pytest.raises(RunError) as raised:
        trained(process)
    assert "\n" not in str(raised.value)
    assert process._life is None
    return raised.value


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


class TestDeath:
    def test_a_call_without_one_takes_one_process(self, tmp_path: Path) -> None:
        assert trained(fake(tmp_path)) == [1.0, -0.5, 4, 1, 0]

    def test_within_a_call_is_mended_by_the_same_call_in_a_new_process(self, tmp_path: Path) -> None:
        assert trained(fake(tmp_path, f"if name == 'train' and lives == 1: {KILL}")) == [1.0, -0.5, 4, 2, 0]

    def test_between_calls_is_not_counted_against_the_next(self, tmp_path: Path) -> None:
        process = fake(tmp_path, f"if name == 'train' and lives == 2: {KILL}")
        kill(process)
        assert trained(process) == [1.0, -0.5, 4, 3, 0]

    def test_in_the_middle_of_an_answer_is_one_too(self, tmp_path: Path) -> None:
        action = (
            "if name == 'train' and lives == 1: end.send(struct.pack('<4sIQ', b'fct1', 2, 20) + b'{}abc'); os._exit(0)"
        )
        assert trained(fake(tmp_path, action)) == [1.0, -0.5, 4, 2, 0]

    @pytest.mark.parametrize(
        ("action", "words"),
        [
            (KILL, "was killed, perhaps out of memory, twice in the same call"),
            ("os._exit(3)", "ended with status 3 twice in the same call"),
            ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV twice in the same call"),
        ],
    )
    def test_in_the_same_call_again_is_told_in_words(self, tmp_path: Path, action: str, words: str) -> None:
        error = failure(fake(tmp_path, f"if name == 'train': {action}"))
        assert isinstance(error, TrainerDied)
        assert f"the trainer {words}" in str(error)
        assert (tmp_path / "lives").read_text() == "xx"

    def test_at_the_start_tells_the_childs_last_words(self, tmp_path: Path) -> None:
        process = fake(tmp_path, begun=False)
        process._argv[3] = "/no/such/program.py"
        with pytest.raises(TrainerDied, match=r"ended with status 2 twice .* its last words: .*No such file"):
            process.start()

    def test_of_a_child_whose_own_child_holds_the_pipe_is_noticed(self, tmp_path: Path) -> None:
        action = "if name == 'train' and os.fork(): print('x'); os._exit(3)\nif name == 'train': time.sleep(60)"
        assert "ended with status 3" in str(failure(fake(tmp_path, action)))
        deadline = time.monotonic() + 5
        while left_over(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left_over(tmp_path)

    def test_changed_data_are_not_trained_on_in_place_of_the_ones_planned_for(self, tmp_path: Path) -> None:
        action = f"if name == 'train': {KILL}\nif name == 'open' and lives > 1: answer['rows'] = 17"
        process = fake(tmp_path, action)
        for _ in range(2):
            with pytest.raises(DataError, match=r"north.csv: the data changed while the job ran"):
                process.train(request(JOB))[0]
        process.close()


class TestWatchdog:
    @pytest.mark.parametrize(
        "action",
        [
            "while True: pass",
            "while True: print('record' * 1000)",
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
            "while True: end.send(b'x') if time.sleep(0.01) else end.send(struct.pack('<4sIQ', b'fct1', 9**6, 0))",
        ],
        ids=["loops", "prints without end", "sleeps", "trickles"],
    )
    def test_ends_a_child_that_does_not_answer(self, tmp_path: Path, action: str) -> None:
        process = fake(tmp_path, f"if name == 'train':\n    {action}", timeout_s=0.5)
        started = time.monotonic()
        assert "took longer than 0.5 s" in str(failure(process))
        assert time.monotonic() - started < 30
        assert (tmp_path / "lives").read_text() == "x"
        assert len(process.output) <= OUTPUT_LIMIT

    def test_lets_the_next_call_start_anew(self, tmp_path: Path) -> None:
        process = fake(tmp_path, "if name == 'train' and lives == 1: time.sleep(60)", timeout_s=1.0)
        with pytest.raises(TrainerDied):
            process.train(request(JOB))[0]
        process._timeout_s = 60.0
        assert trained(process) == [1.0, -0.5, 4, 2, 0]


def raw(data: str) -> str:
    return f"end.sendall({data}); time.sleep(60)"


def frame(text: bytes, array: int = 0) -> str:
    return raw(f"struct.pack('<4sIQ', b'fct1', {len(text)}, {array}) + {text!r}")


class TestMalformedAnswer:
    @pytest.mark.parametrize(
        ("action", "why"),
        [
            (raw("b'x' * 16"), "this version's mark"),
            (raw(f"struct.pack('<4sIQ', b'fct1', {HEADER_LIMIT + 1}, 0)"), "claims a header of"),
            (raw("struct.pack('<4sIQ', b'fct1', 2, 2**60)"), "claims an array of"),
            (raw("struct.pack('<4sIQ', b'fct1', 2, 16)"), "claims an array of 16 bytes, expected 20"),
            (frame(b"{"), "not JSON"),
            (frame(b"\xff\xff"), "not JSON"),
            (frame(b'{"a": NaN}'), "not JSON"),
            (frame(b"[" * 100_000), "not JSON"),
            (frame(b"[]"), "not a JSON object"),
            (frame(b'{"array": true}'), "it has no array"),
            ("vector = b''", "it has no array"),
        ],
    )
    def test_is_refused_at_once_and_ends_the_child(self, tmp_path: Path, action: str, why: str) -> None:
        process = fake(tmp_path, f"if name == 'train':\n    {action}")
        tracemalloc.start()
        try:
            error = failure(process)
            assert tracemalloc.get_traced_memory()[1] < 20 * HEADER_LIMIT
        finally:
            tracemalloc.stop()
        assert isinstance(error, TrainerFailed)
        assert "the trainer's answer was refused" in str(error)
        assert why in str(error)
        assert (tmp_path / "lives").read_text() == "x"

    @pytest.mark.parametrize(
        "change",
        [
            {"rows": 0},
            {"rows": True},
            {"test_rows": 2.0},
            {"job": "another"},
            {"device": 1},
            {"shapes": []},
            {"shapes": [["w", [2**40]]]},
            {"shapes": [["w", [2**20, 2**20]]]},
            {"shapes": [["w", [-1, -1]]]},
            {"shapes": [["w", [1]], ["w", [1]]]},
            {"shapes": [["w"]]},
            {"shapes": "wb"},
            {"shapes": None},
            {"layout": None},
            {"layout": {"sent": 2, "metrics": [], "received": 2, "memory": -1, "received_only": 0, "personal": False}},
            {
                "layout": {
                    "sent": 2**50,
                    "metrics": [],
                    "received": 2,
                    "memory": 0,
                    "received_only": 0,
                    "personal": False,
                }
            },
            {"layout": {"sent": 2, "metrics": [], "received": 2, "memory": 0, "received_only": 3, "personal": False}},
            {"layout": {"sent": 2, "metrics": [], "received": 2, "memory": 0, "received_only": -1, "personal": False}},
            {"layout": {"sent": 2, "metrics": [7], "received": 2, "memory": 0, "received_only": 0, "personal": False}},
            {"layout": {"sent": 2, "metrics": [], "received": "2", "memory": 0, "received_only": 0, "personal": False}},
        ],
    )
    def test_to_open_promises_no_model_that_cannot_be(self, tmp_path: Path, change: dict[str, object]) -> None:
        process = fake(tmp_path, f"if name == 'open': answer.update({change!r})", begun=False)
        process.start()
        with pytest.raises(TrainerFailed, match="the trainer's answer was refused"):
            process.open(JOB, "north")
        process.close()

    @pytest.mark.parametrize("metrics", [{"loss": "record"}, {"loss": None}, {"loss": True}, [1.0], None])
    def test_to_evaluate_is_numbers_or_nothing(self, tmp_path: Path, metrics: object) -> None:
        process = fake(tmp_path, f"if name == 'evaluate': answer = {{'metrics': {metrics!r}}}")
        with pytest.raises(TrainerFailed, match="its metrics are not numbers"):
            process.evaluate(PLAIN_MODEL)
        process.close()

    def test_that_is_an_error_of_many_lines_becomes_one_short_line(self, tmp_path: Path) -> None:
        action = "if name == 'open': answer = {'error': 'DataError', 'says': 'a\\n\\x1b[31mb' + 10**5 * 'c'}"
        process = fake(tmp_path, action, begun=False)
        process.start()
        with pytest.raises(DataError) as raised:
            process.open(JOB, "north")
        assert str(raised.value).startswith("a [31mbccc")
        assert len(str(raised.value)) <= 500
        process.close()

    def test_that_names_no_kind_of_error_is_an_error(self, tmp_path: Path) -> None:
        process = fake(tmp_path, "if name == 'train': answer = {'error': ['record'], 'says': 'record'}")
        assert "the task failed with an error in the call 'train'" in str(failure(process))

    @pytest.mark.parametrize("call", ["train", "evaluate"])
    def test_says_nothing_in_words_once_it_has_met_records(self, call: str, tmp_path: Path) -> None:
        process = fake(tmp_path, f"if name == {call!r}: answer = {{'error': 'JobError', 'says': 'Jane Doe'}}")
        said = str(failure(process) if call == "train" else evaluation_failure(process))
        assert "Jane" not in said
        assert "the task failed with JobError" in said

    @pytest.mark.parametrize("field", ["doing", "device", "rows", "batch"])
    def test_says_of_its_memory_nothing_but_what_there_is_to_say(self, field: str, tmp_path: Path) -> None:
        memory = {"doing": "training", "device": "cpu", "rows": 8, "batch": 64, "pretrained": True, "texts": False}
        told = {**memory, field: "Jane Doe"}
        process = fake(tmp_path, f"if name == 'train': answer = {{'error': 'OutOfMemory', 'memory': {told!r}}}")
        said = str(failure(process))
        assert "Jane" not in said
        assert "the task failed with OutOfMemory" in said


def evaluation_failure(process: TrainerProcess) -> TrainerFailed:
    with pytest.raises(TrainerFailed) as raised:
        process.evaluate(PLAIN_MODEL)
    process.close()
    return raised.value


class TestStart:
    def test_refuses_required_isolation_that_does_not_hold(self, tmp_path: Path) -> None:
        if not Sandbox.available()[0].cuts_network:
            pytest.skip("nothing on this machine cuts the network")
        process = fake(tmp_path, begun=False)
        # The marks of its lives cannot be written in there: this child writes to /tmp, which is its own.
        process._asked, process._argv = "required", [*process._argv[:4], "/tmp/lives"]
        process._code = tmp_path
        with pytest.raises(RunError, match=r"isolation is required, but does not hold .*the network, the site's keys"):
            process.start()
        assert process._life is None

    def test_a_datagram_or_a_connection_counts_whatever_the_child_says(self, tmp_path: Path) -> None:
        silent = "if name == 'prove': answer = dict.fromkeys(answer, False)"
        send = "socket.socket(type=socket.SOCK_DGRAM).sendto(b'?', ('127.0.0.1', call['udp']))"
        heard = f"{silent}\nif name == 'prove': {send}"
        for number, (action, words) in enumerate([(silent, "no network"), (heard, "the network within")]):
            (tmp_path / str(number)).mkdir()
            process = fake(tmp_path / str(number), action)
            assert words in process.isolation
            process.close()

    def test_closing_twice_and_starting_anew_are_allowed(self, tmp_path: Path) -> None:
        process = fake(tmp_path)
        process.close()
        process.close()
        process.start()
        process.close()
        assert not left_over(tmp_path)

    def test_the_node_needs_neither_torch_nor_pandas(self) -> None:
        code = "import sys, client.trainer_process; print([m for m in ('torch', 'pandas', 'flwr') if m in sys.modules])"
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert ran.stdout == "[]\n"


def left_over(folder: Path) -> bool:
    """Whether a fake child of this folder runs, or waits to be reaped."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder / "lives").encode() in (entry / "cmdline").read_bytes():
                return True
        except OSError:  # It has ended since it was listed.
            continue
    return False


headers = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=4)
vectors = hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32))


class TestPipe:
    @given(headers, vectors)
    def test_brings_a_header_and_an_array_to_the_other_end(self, header: dict[str, object], array: Vector) -> None:
        near, far = socket.socketpair()
        with near, far:
            Pipe(near).send(header, array)
            into = np.empty_like(array)
            received = Pipe(far).receive(into)
        assert received == {**header, "array": array.size > 0}
        assert into.tobytes() == array.tobytes()

    @settings(max_examples=300)
    @given(st.binary(max_size=60), st.booleans())
    def test_takes_any_bytes_for_a_frame_a_malformed_one_or_an_end(self, data: bytes, marked: bool) -> None:
        near, far = socket.socketpair()
        with far:
            with near:
                near.sendall(struct.pack("<4sI", b"fct1", len(data) // 2) + bytes(8) + data if marked else data)
            try:
                assert isinstance(Pipe(far).receive(np.empty(3, np.float32)), dict)
            except (MalformedFrame, PipeClosed) as error:
                assert repr(data)[2:-1] not in str(error) or len(data) < 3  # noqa: PT017

    def test_does_not_send_a_header_that_no_reader_takes(self) -> None:
        near, far = socket.socketpair()
        with near, far, pytest.raises(MalformedFrame, match="the limit is"):
            Pipe(near).send({"job": "x" * HEADER_LIMIT})


@given(
    st.floats(2.0**-100, 2.0**100),
    st.floats(1 / 16, 2.0**20),
    st.lists(st.integers(1, 99), max_size=3),
    st.floats(0, 1, exclude_min=True),
    st.integers(1, 10**9),
)
def test_the_plan_that_is_trained_with_is_the_one_that_is_charged(
    clip_norm: float, noise: float, layers: list[int], rate: float, steps: int
) -> None:
    mechanism = GaussianSum(clip_norm=clip_norm, noise_multiplier=noise, layers=tuple(layers))
    sgd = RecordLevelSgd(mechanism=mechanism, sampling_rate=rate, steps=steps)
    assert sgd_from(json.loads(json.dumps(sgd_record(sgd)))) == sgd
    assert sgd_from(sgd_record(None)) is None


def test_a_pretrained_model_is_found_among_the_site_s_models_and_trained_as_in_a_simulation(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from client.data import encode, split
    from client.local import LocalTraining
    from client.tables import read_frame
    from client.tasks import initial_model, task_for
    from client.training import Trainer
    from privacy.noise import OsNoise
    from strategies.catalogue import strategy_for
    from tests.client.checkpoints import job_of

    lines = ["text,label", *(f"the film is {'good' if row % 2 else 'bad'},{row % 2}" for row in range(ROWS))]
    (tmp_path / "north.csv").write_text("\n".join(lines) + "\n")
    here = job_of(tmp_path / "north.csv", "bert", folder=tmp_path)
    task = task_for(here)
    trainer = Trainer(task, initial_model(task, features=8, classes=2, seed=here.seed), here.training)
    ask = ask_for(here.portable.hash, 1, trainer.read().copy(), None)
    with TrainerProcess(data=tmp_path / "north.csv", models=tmp_path, timeout_s=200) as process:
        opened = process.open(here.portable, "north")
        process.plan(SitePlan(opened.rows))
        contribution, _ = process.train(ask)
    assert opened.parameters == trainer.parameters
    assert opened.layout.received_only > 0
    records = split(encode(read_frame(tmp_path / "north.csv", here.data), here.data, where="here"), here.data, site="n")
    training = LocalTraining(
        "north",
        job=here.portable,
        plan=SitePlan(len(records.train)),
        strategy=strategy_for(here),
        trainer=trainer,
        records=records.train,
        layout=opened.layout,
        noise=lambda _: OsNoise(),
    )
    np.testing.assert_allclose(contribution, training(ask).contribution, rtol=1e-4, atol=1e-6)
