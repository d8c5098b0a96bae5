"""Want of memory is one line on what to set, of counts and settings alone; what was reserved stays spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.out_of_memory import Load, OutOfMemory, memory_for
from client.site import SitePlan
from client.tasks import TabularClassification
from client.trainer_process import TrainerProcess
from client.training import Trainer
from privacy.budget import LedgerAccounts
from privacy.dpsgd import RecordLevelSgd
from privacy.errors import FedchorusError, JobError
from privacy.keys import IdentityKey
from privacy.ledger import Ledger
from simulations.federation import Federation
from simulations.run_folder import RunFolder
from simulations.scenarios import scenario_path
from simulations.simulate import Watcher, start_run
from strategies.job import load_job
from strategies.job_task import TaskChoice
from tests.client.checkpoints import job_of
from tests.client.test_trainer_process import DATA, request, write_data
from tests.client.test_training import make_trainer, some_records, trained, trained_privately
from tests.strategies.jobs import make_job

SECRET = "record 0.7312"
PLAIN = Load("cpu", pretrained=False, texts=False)
MEMORY: list[Exception] = [
    MemoryError(SECRET),
    torch.OutOfMemoryError(f"Allocation on device 0 would exceed allowed memory. {SECRET}"),
    RuntimeError(f"[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: {SECRET}"),
    RuntimeError(f"DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes. {SECRET}"),
    RuntimeError(f"CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle) {SECRET}"),
    RuntimeError(f"MPS backend out of memory (MPS allocated: 18.13 GB) {SECRET}"),
]
Fail = Callable[..., NoReturn]


def failing(error: Exception) -> Fail:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail


def too_much(*_: Any, **__: Any) -> NoReturn:
    """What the allocator itself raises for more than any machine has."""
    torch.empty(2**60, dtype=torch.uint8)
    raise AssertionError("there was room")


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
def test_every_way_of_saying_it_is_told_alike_and_nothing_of_its_text(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as told, memory_for("training", PLAIN, rows=1024, batch=1500):
        raise error
    assert str(told.value) == (
        "out of memory while training on cpu, with 1024 rows at once; set training.physical_batch = 512 (a batch of "
        "1500 rows then takes 3 pieces), or take a machine with more"
    )
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")])
def test_any_other_error_passes_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as told, memory_for("training", PLAIN):
        raise error
    assert told.value is error


@given(
    rows=st.none() | st.integers(1, 10**6),
    batch=st.none() | st.integers(1, 10**6),
    pretrained=st.booleans(),
    texts=st.booleans(),
    device=st.sampled_from(["cpu", "cuda", "mps"]),
)
def test_the_advice_is_one_line_that_makes_it_smaller(
    rows: int | None, batch: int | None, pretrained: bool, texts: bool, device: str
) -> None:
    load = Load(device, pretrained=pretrained, texts=texts)
    line = str(OutOfMemory("evaluating", load, rows=rows, batch=batch))
    assert line.startswith(f"out of memory while evaluating on {device}")
    assert line.isprintable()
    assert ("task.checkpointing" in line) == pretrained
    assert ("data.columns.NAME.length" in line) == (pretrained and texts)
    if rows is not None and rows > 1:
        smaller = int(line.partition("training.physical_batch = ")[2].split()[0].rstrip(",;"))
        assert rows / 2 <= smaller < rows
        assert batch is None or f"{-(-batch // smaller)} pieces" in line
    else:
        assert "physical_batch" not in line


@pytest.mark.parametrize("error", MEMORY[:2], ids=["MemoryError", "OutOfMemoryError"])
@pytest.mark.parametrize("private", [False, True])
def test_a_trainer_that_ran_out_goes_on_as_a_new_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, private: bool
) -> None:
    train = trained_privately if private else trained
    trainer, records = make_trainer(), some_records()
    start = trainer.read().copy()
    expected = train(make_trainer(), records, start)
    with monkeypatch.context() as patch:
        patch.setattr(trainer._model, "forward", failing(error))
        with pytest.raises(OutOfMemory) as told:
            train(trainer, records, start)
    rows = 12 if private else 5  # Half of 23 is expected in a Poisson batch.
    assert f"while training on cpu, with {rows} rows at once" in str(told.value)
    np.testing.assert_array_equal(train(trainer, records, start), expected)


@pytest.mark.parametrize("use", ["evaluate", "loss", "place", "try_out"])
def test_all_that_a_trainer_does_with_records_is_covered(monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    trainer, records = make_trainer(), some_records()
    placed = trainer.place(records)
    uses: dict[str, Callable[[], object]] = {
        "evaluate": lambda: trainer.evaluate(placed.features, placed.targets),
        "loss": lambda: trainer.loss(placed),
        "place": lambda: trainer.place(records),
        "try_out": lambda: trainer.try_out(records),
    }
    monkeypatch.setattr(torch, "from_numpy", too_much) if use == "place" else monkeypatch.setattr(
        trainer._model, "forward", too_much
    )
    with pytest.raises(OutOfMemory, match="out of memory while"):
        uses[use]()


def test_what_is_evaluated_at_once_is_what_the_job_says(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, sizes = make_trainer(physical_batch=4), list[int]()
    forward = trainer._model.forward

    def counted(rows: torch.Tensor) -> Any:
        sizes.append(len(rows))
        return forward(rows)

    monkeypatch.setattr(trainer._model, "forward", counted)
    trainer.loss(trainer.place(some_records(10)))
    assert sizes == [4, 4, 2]


def test_a_pre_trained_model_that_ran_out_goes_on_and_names_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "texts.csv").write_text("text,label\n" + "the film is good,1\nit is a bad book,0\n" * 30)
    settings = ["privacy.record={noise_multiplier=1.0, delta=0.01, clip_norm=1.0}", "training.batch_size=8"]
    federation = Federation.load(job_of(tmp_path / "texts.csv", "bert", *settings, folder=tmp_path))
    trainer, records = federation.trainer, next(iter(federation.data.values())).train
    start = trainer.read().copy()
    expected = trained_privately(trainer, records, start)
    with monkeypatch.context() as patch:
        patch.setattr(trainer._model, "forward", too_much)
        with pytest.raises(OutOfMemory) as told:
            trained_privately(trainer, records, start)
    assert "with 16 rows at once; set training.physical_batch = 8 (" in str(told.value)
    assert 'task.checkpointing = true or task.precision = "bfloat16"' in str(told.value)
    assert "data.columns.NAME.length or task.tuning.depth" in str(told.value)
    np.testing.assert_array_equal(trained_privately(trainer, records, start), expected)


def test_what_was_reserved_for_a_round_that_ran_out_stays_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, train = [0], RecordLevelSgd.train

    def second_round_fails(self: RecordLevelSgd, *arguments: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] == 6:  # The first of five sites, in the second round.
            too_much()
        train(self, *arguments, **named)

    monkeypatch.setattr(RecordLevelSgd, "train", second_round_fails)
    settings = ["privacy.record.epsilon=none", "privacy.record.noise_multiplier=4.0", "simulation.baselines=false"]
    job = load_job(scenario_path("hospitals"), settings)
    with pytest.raises(OutOfMemory) as told:
        start_run(job, out=tmp_path / "run", parent=tmp_path, watcher=Watcher(), now=datetime(2026, 1, 1, tzinfo=UTC))
    assert isinstance(told.value, FedchorusError)
    assert "\n" not in str(told.value)
    folder = RunFolder.open(tmp_path / "run")
    assert folder.job.privacy.record is not None
    spent = [_spent(folder, name) for name in ("cancer-centre", "city-hospital")]
    steps = job.training.local_steps
    assert spent == [
        2 * (steps or 0),
        steps,
    ]  # It has reserved both rounds, and nothing came back; the next one its first.


def _spent(folder: RunFolder, site: str) -> int:
    files = folder.files_of(site)
    accounts = LedgerAccounts(Ledger(files.ledger, site, IdentityKey.load(files.identity))).now()
    return sum(event.count for event in accounts.spent("record"))


OWN_TASK = """
import torch
from torch import nn
from client.tasks import TabularClassification

class Model(nn.Sequential):
    def forward(self, x):
        match round(float(self[0].weight.detach()[0, 0])):
            case 101:
                raise MemoryError(f"record {x[0, 0].item()}")
            case 102:
                torch.empty(2**60, dtype=torch.uint8)
        return super().forward(x)

class Own(TabularClassification):
    def model(self, features, classes):
        return Model(*super().model(features, classes))
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "memory_task.py").write_text(OWN_TASK)
    with TrainerProcess(data=write_data(folder), code=folder, timeout_s=200) as process:
        opened = process.open(OWN_JOB, "north")
        process.plan(SitePlan(opened.rows))
        yield process


OWN_JOB = make_job(
    data={**DATA, "files": {"north": "north.csv"}}, training={"local_steps": 3}, task={"name": "memory_task:Own"}
)


@pytest.mark.parametrize("number", [101, 102])
def test_a_sites_own_process_says_it_too_without_a_record_and_goes_on(trainer: TrainerProcess, number: int) -> None:
    before = trainer.train(request(OWN_JOB))[0]
    with pytest.raises(JobError, match=r"^out of memory while training on c") as told:
        trainer.train(request(OWN_JOB, [float(number), 0.0]))
    assert "training.physical_batch" in str(told.value)
    assert "record" not in str(told.value)
    with pytest.raises(JobError, match=r"^out of memory while evaluating on c"):
        trainer.evaluate(np.array([number, 0.0], np.float32))
    np.testing.assert_array_equal(trainer.train(request(OWN_JOB))[0], before)


def test_a_trainer_says_so_for_a_model_of_its_own_task() -> None:
    trainer: Trainer = make_trainer(TabularClassification(TaskChoice(model="mlp", hidden=[4])), physical_batch=1)
    with pytest.raises(OutOfMemory) as told, memory_for("training", trainer._load, rows=1, batch=5):
        raise MemoryError
    assert str(told.value).endswith("with 1 rows at once; take a smaller model, or take a machine with more")
