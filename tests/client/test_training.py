"""Training on one flat buffer is SGD by the book; it depends on the records, the model and the seed alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.data import Records
from client.tasks import TabularClassification, Task, initial_model
from client.training import Trainer
from privacy.dpsgd import RecordLevelSgd
from privacy.errors import JobError
from privacy.mechanism import GaussianSum
from privacy.noise import SeededNoise
from strategies.job import Training
from strategies.job_task import TaskChoice
from strategies.parameters import Vector
from tests.client.test_tasks import LineThroughZero
from tests.strategies.jobs import make_job

FEATURES = 5
PRIVATE = RecordLevelSgd(mechanism=GaussianSum(clip_norm=1.0, noise_multiplier=1.0), sampling_rate=0.5, steps=3)


class WithModel(TabularClassification):
    """The tabular task on a model of the test's own."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__(TaskChoice())
        self._build = build

    def model(self, features: int, classes: int) -> nn.Module:
        return self._build()


class HalvedInTraining(nn.Module):
    """A layer that tells training from evaluation, as dropout does, without drawing anything."""

    def forward(self, features: Tensor) -> Tensor:
        return features / 2 if self.training else features


def some_records(rows: int = 23, classes: int = 2, seed: int = 0) -> Records:
    rng = np.random.default_rng(seed)
    return Records(rng.normal(size=(rows, FEATURES)).astype(np.float32), rng.integers(0, classes, rows))


def settings(**changes: Any) -> Training:
    return make_job(training={"local_steps": 7, "batch_size": 5, "device": "cpu", **changes}).training


def make_trainer(task: Task | None = None, *, classes: int = 2, **changes: Any) -> Trainer:
    task = task or TabularClassification(TaskChoice(model="mlp", hidden=[6]))
    model = initial_model(task, features=FEATURES, classes=classes, seed=3)
    return Trainer(task, model, settings(**changes))


def trained(trainer: Trainer, records: Records, start: Vector, *, seed: int = 11) -> Vector:
    trainer.load(start)
    trainer.train(trainer.place(records), seed=seed)
    return trainer.read().copy()


def trained_privately(trainer: Trainer, records: Records, start: Vector, *, round_number: int = 1) -> Vector:
    trainer.load(start)
    trainer.train_privately(trainer.place(records), PRIVATE, SeededNoise(1, "north", round_number))
    return trainer.read().copy()


def by_the_book(task: Task, model: nn.Module, records: Records, training: Training, seed: int) -> Vector:
    """The same batches with torch's own optimiser and freshly allocated gradients."""
    kind = torch.optim.AdamW if training.optimizer == "adam" else torch.optim.SGD
    optimiser = kind(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    features, targets = torch.from_numpy(records.features), torch.from_numpy(records.target)
    size = max(1, round(training.rate_for(len(records)) * len(records)))
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < training.steps_for(len(records)):
        batches += torch.split(torch.randperm(len(records), generator=generator), size)
    for chosen in batches[: training.steps_for(len(records))]:
        optimiser.zero_grad(set_to_none=True)
        task.loss(model(features[chosen]), targets[chosen]).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).numpy()


class TestAgainstTorch:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"weight_decay": 0.1},
            {"optimizer": "adam", "learning_rate": 0.01},
            {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.3},
            {"batch_size": 7, "physical_batch": 3},
            {"local_steps": 1},
            {"batch_size": 1},
            {"batch_size": 23},
            {"batch_size": 1000},
            {"batch_size": None, "sampling_rate": 0.3},
            {"local_steps": None, "local_epochs": 3},
            {"local_steps": None, "local_epochs": 2, "batch_size": 23, "weight_decay": 1.0},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("classes", [2, 4])
    def test_the_flat_buffer_ends_where_torchs_optimiser_does(self, changes: dict[str, Any], classes: int) -> None:
        task = TabularClassification(TaskChoice(model="mlp", hidden=[6]))
        records, trainer = some_records(classes=classes), make_trainer(task, classes=classes, **changes)
        model = initial_model(task, features=FEATURES, classes=classes, seed=3)
        expected = by_the_book(task, model, records, settings(**changes), seed=11)
        start = trainer.read().copy()
        result = trained(trainer, records, start)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
        assert np.abs(result - start).max() > 1e-3

    def test_one_step_by_hand(self) -> None:
        # y = w x on (1, 2), (2, 3), (3, 5) from w = 0 at rate 0.5: the gradient is -(2 + 6 + 15) / 3 = -23/3.
        records = Records(np.array([[1], [2], [3]], np.float32), np.array([2, 3, 5]))
        task = LineThroughZero(TaskChoice())
        trainer = Trainer(task, task.model(1, 2), settings(local_steps=1, batch_size=3))
        trainer.load(np.zeros(1, np.float32))
        sums = trainer.train(trainer.place(records), seed=0)
        assert trainer.read().tolist() == pytest.approx([23 / 6])
        # The losses at w = 0 are 2, 4.5 and 12.5.
        assert sums == {"loss": pytest.approx(19), "examples": 3}

    @pytest.mark.parametrize("batch", [1, 4, 23])
    def test_the_metric_sums_count_each_example_seen(self, batch: int) -> None:
        trainer = make_trainer(learning_rate=1e-9, local_steps=None, local_epochs=1, batch_size=batch)
        records = trainer.place(some_records())
        sums = trainer.train(records, seed=1)
        seen = min(23, batch * round(23 / batch))
        assert sums["examples"] == seen
        mean = float(trainer.evaluate(records.features, records.targets)["loss"].mean())
        assert sums["loss"] / seen == pytest.approx(mean, rel=0.2 if seen < 23 else 1e-4)


class TestFlatBuffer:
    def test_what_is_loaded_is_read_back_bit_for_bit(self) -> None:
        trainer = make_trainer()
        model = np.random.default_rng(0).normal(size=trainer.parameters.size).astype(np.float32)
        trainer.load(model)
        np.testing.assert_array_equal(trainer.read(), model)

    def test_the_models_parameters_are_views_in_their_order(self) -> None:
        task = TabularClassification(TaskChoice(model="mlp", hidden=[6]))
        model = task.model(FEATURES, 2)
        trainer = Trainer(task, model, settings())
        vector = np.arange(trainer.parameters.size, dtype=np.float32)
        trainer.load(vector)
        for name, part in trainer.parameters.split(vector).items():
            np.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), part)
        with torch.no_grad():
            model.get_parameter("0.bias").fill_(-1)
        assert trainer.parameters.split(trainer.read())["0.bias"].tolist() == [-1] * 6

    def test_loading_copies(self) -> None:
        trainer = make_trainer()
        model = np.ones(trainer.parameters.size, np.float32)
        trainer.load(model)
        trainer.train(trainer.place(some_records()), seed=0)
        assert model.tolist() == [1] * len(model)

    def test_training_leaves_the_records_alone(self) -> None:
        trainer, records = make_trainer(), some_records()
        before = records.features.copy()
        placed = trainer.place(records)
        trainer.train(placed, seed=0)
        trainer.train_privately(placed, PRIVATE, SeededNoise(0))
        np.testing.assert_array_equal(records.features, before)

    def test_frozen_parameters_neither_move_nor_travel(self) -> None:
        def build() -> nn.Module:
            frozen = nn.Linear(FEATURES, 3).requires_grad_(False)
            return nn.Sequential(frozen, nn.ReLU(), nn.Linear(3, 1))

        task = WithModel(build)
        model = task.model(FEATURES, 2)
        before = model.get_parameter("0.weight").clone()
        trainer = Trainer(task, model, settings())
        assert list(trainer.parameters.shapes) == ["2.weight", "2.bias"]
        trained(trainer, some_records(), trainer.read().copy())
        trained_privately(trainer, some_records(), trainer.read().copy())
        torch.testing.assert_close(model.get_parameter("0.weight"), before, rtol=0, atol=0)


class TestDeterminism:
    def test_the_same_seed_repeats_and_another_does_not(self) -> None:
        trainer = make_trainer()
        start = trainer.read().copy()
        first, again, other = (trained(trainer, some_records(), start, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-4

    def test_private_training_repeats_with_seeded_noise_and_differs_between_rounds(self) -> None:
        trainer = make_trainer()
        start = trainer.read().copy()
        first, again, other = (
            trained_privately(trainer, some_records(), start, round_number=round_number) for round_number in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-3

    @pytest.mark.parametrize("train", [trained, trained_privately])
    @pytest.mark.parametrize("before", ["nothing", "another site", "an evaluation", "private training"])
    def test_a_site_does_not_notice_who_was_trained_before(self, train: Callable[..., Vector], before: str) -> None:
        task = WithModel(lambda: nn.Sequential(HalvedInTraining(), nn.Linear(FEATURES, 1)))
        fresh, trainer = make_trainer(task), make_trainer(task)
        start = fresh.read().copy()
        if before == "another site":
            trained(trainer, some_records(40, seed=5), start + 1, seed=99)
        elif before == "private training":
            trained_privately(trainer, some_records(40, seed=5), start - 1, round_number=9)
        elif before == "an evaluation":
            records = trainer.place(some_records())
            trainer.evaluate(records.features, records.targets)
        np.testing.assert_array_equal(train(trainer, some_records(), start), train(fresh, some_records(), start))

    def test_neither_does_one_whose_model_drops_out_units(self) -> None:
        task = WithModel(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, 1)))
        trainer = make_trainer(task)
        start = trainer.read().copy()
        first = trained(trainer, some_records(), start)
        trained(trainer, some_records(40, seed=5), start, seed=99)
        np.testing.assert_array_equal(trained(trainer, some_records(), start), first)
        assert np.abs(first - trained(trainer, some_records(), start, seed=12)).max() > 1e-4

    def test_weight_decay_shrinks_the_private_model_too(self) -> None:
        start = make_trainer().read() + 10
        plain = trained_privately(make_trainer(), some_records(), start)
        decayed = trained_privately(make_trainer(weight_decay=0.1), some_records(), start)
        assert np.linalg.norm(decayed) < 0.95 * np.linalg.norm(plain)


class TestPrivateTraining:
    def test_without_any_row_drawn_it_is_noise_alone(self) -> None:
        # Sampled at 2^-60 nobody is drawn: the step is the noise, whatever the records.
        sgd = RecordLevelSgd(mechanism=PRIVATE.mechanism, sampling_rate=2.0**-60, steps=1)
        trainer, results = make_trainer(learning_rate=2.0**-60), []
        start = trainer.read().copy()
        for seed in (0, 1):
            trainer.load(start)
            trainer.train_privately(trainer.place(some_records(seed=seed)), sgd, SeededNoise(4))
            results.append(trainer.read().copy())
        np.testing.assert_array_equal(results[0], results[1])
        assert np.abs(results[0] - start).max() > 1e-3

    def test_little_noise_and_a_wide_clip_give_the_full_gradient_step(self) -> None:
        # Everyone drawn, clipped at 2^10 and with noise of 2^6: one step of plain SGD on all rows, up to that noise.
        task = LineThroughZero(TaskChoice())
        rows = 2000
        features = np.random.default_rng(0).normal(size=(rows, 1)).astype(np.float32)
        records = Records(features, np.full(rows, 3))
        sgd = RecordLevelSgd(
            mechanism=GaussianSum(clip_norm=2.0**10, noise_multiplier=0.0625), sampling_rate=1.0, steps=1
        )
        trainer = Trainer(task, task.model(1, 2), settings())
        trainer.load(np.ones(1, np.float32))
        trainer.train_privately(trainer.place(records), sgd, SeededNoise(4))
        gradient = float((features * (features * 1.0 - 3)).mean())
        assert trainer.read()[0] == pytest.approx(1 - 0.5 * gradient, abs=0.5 * 5 * 64 / rows)


class TestEvaluate:
    @pytest.mark.parametrize("classes", [2, 3])
    def test_metrics_are_means_over_examples_whatever_the_batches(self, classes: int) -> None:
        trainer = make_trainer(classes=classes)
        records = trainer.place(some_records(30, classes))
        whole = trainer.evaluate(records.features, records.targets)
        parts = [trainer.evaluate(records.features[part], records.targets[part]) for part in (slice(7), slice(7, 30))]
        for name, values in whole.items():
            assert values.shape == (30,)
            together = (7 * parts[0][name].mean() + 23 * parts[1][name].mean()) / 30
            torch.testing.assert_close(together, values.mean())

    def test_dropout_is_off(self) -> None:
        trainer = make_trainer(WithModel(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, 1))))
        records = trainer.place(some_records())
        trainer.train(records, seed=0)
        first, second = (trainer.evaluate(records.features, records.targets)["loss"] for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)

    def test_training_lowers_the_loss_of_what_can_be_learnt(self) -> None:
        records = some_records(200)
        learnable = Records(records.features, (records.features[:, 0] > 0).astype(np.int64))
        trainer = make_trainer(TabularClassification(TaskChoice()), learning_rate=1.0, local_steps=100, batch_size=20)
        placed = trainer.place(learnable)
        before = trainer.evaluate(placed.features, placed.targets)
        trainer.train(placed, seed=0)
        after = trainer.evaluate(placed.features, placed.targets)
        assert float(before["loss"].mean()) == pytest.approx(float(np.log(2)))
        assert float(after["loss"].mean()) < 0.2
        assert float(after["accuracy"].mean()) > 0.95


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(FEATURES), nn.SyncBatchNorm(FEATURES), nn.BatchNorm1d(FEATURES, affine=False)]
)
def test_batch_statistics_are_refused_by_name(layer: nn.Module) -> None:
    task = WithModel(lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), layer, nn.Linear(FEATURES, 1)))
    with pytest.raises(JobError, match=f"layer '1' is a {type(layer).__name__}: .* use GroupNorm or LayerNorm"):
        make_trainer(task)


@pytest.mark.parametrize("layer", [nn.LayerNorm(FEATURES), nn.GroupNorm(1, FEATURES)])
def test_statistics_of_one_record_are_welcome(layer: nn.Module) -> None:
    trainer = make_trainer(WithModel(lambda: nn.Sequential(layer, nn.Linear(FEATURES, 1))))
    start = trainer.read().copy()
    assert np.isfinite(trained(trainer, some_records(), start)).all()
    assert np.isfinite(trained_privately(trainer, some_records(), start)).all()


@pytest.mark.parametrize(
    ("device", "there"), [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())]
)
def test_a_device_that_is_not_there_is_refused(device: str, there: bool) -> None:
    if there:
        pytest.skip("this machine has one")
    with pytest.raises(JobError, match=f'training.device = "{device}": .* use "auto" or "cpu"'):
        make_trainer(device=device)


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert make_trainer(device="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert make_trainer(device="cpu").device.type == "cpu"
