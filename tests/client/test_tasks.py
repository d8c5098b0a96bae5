"""A task's loss and metrics are per example, so that they add up over any batches; users bring their own by name."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from client.tasks import TASKS, TabularClassification, Task, initial_model, task_for
from privacy.errors import JobError
from strategies.catalogue import resolve
from strategies.job_task import TaskChoice
from tests.strategies.jobs import make_job


class LineThroughZero:
    """y = w x with squared error: a task of the user's own, small enough to compute by hand."""

    def __init__(self, choice: TaskChoice) -> None:
        self.choice = choice

    def model(self, features: int, classes: int) -> nn.Module:
        return nn.Linear(features, 1, bias=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - targets) ** 2 / 2

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {"loss": self.loss(outputs, targets), "accuracy": (outputs.squeeze(-1).round() == targets).float()}


class TaskContract:
    """What a trainer relies on, whatever the task."""

    classes = 2

    def make(self) -> Task:
        raise NotImplementedError

    def outputs_and_targets(self, rows: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rows)
        model = initial_model(self.make(), features=4, classes=self.classes, seed=1)
        outputs: Tensor = model(torch.randn(rows, 4, generator=generator)).detach()
        return outputs, torch.randint(self.classes, (rows,), generator=generator)

    @pytest.mark.parametrize("rows", [1, 2, 7])
    def test_loss_and_metrics_are_one_finite_value_for_each_example(self, rows: int) -> None:
        outputs, targets = self.outputs_and_targets(rows)
        losses = self.make().loss(outputs, targets)
        metrics = self.make().metrics(outputs, targets)
        assert {"loss", "accuracy"} <= set(metrics)
        for values in (losses, *metrics.values()):
            assert values.shape == (rows,)
            assert values.isfinite().all()
        torch.testing.assert_close(metrics["loss"], losses)

    def test_the_value_of_an_example_does_not_depend_on_its_batch(self) -> None:
        outputs, targets = self.outputs_and_targets(6)
        whole = self.make().metrics(outputs, targets)
        for row in range(6):
            alone = self.make().metrics(outputs[row : row + 1], targets[row : row + 1])
            for name, values in alone.items():
                torch.testing.assert_close(values[0], whole[name][row])

    def test_the_initial_model_depends_on_the_seed_alone(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first, second = (initial_model(self.make(), features=4, classes=self.classes, seed=9) for _ in range(2))
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(torch.rand(3), expected)  # Nor does it move torch's own generator.


class TestLogisticRegression(TaskContract):
    def make(self) -> Task:
        return TabularClassification(TaskChoice())


class TestMlp(TaskContract):
    def make(self) -> Task:
        return TabularClassification(TaskChoice(model="mlp"))


class TestManyClasses(TaskContract):
    classes = 5

    def make(self) -> Task:
        return TabularClassification(TaskChoice(model="mlp", hidden=[8]))


class TestOfTheUsersOwn(TaskContract):
    def make(self) -> Task:
        return task_for(make_job(task={"name": f"{__name__}:LineThroughZero"}))

    def test_is_made_from_the_table_of_the_job(self) -> None:
        task = task_for(make_job(task={"name": f"{__name__}:LineThroughZero", "hidden": [7]}))
        assert isinstance(task, LineThroughZero)
        assert task.choice.hidden == [7]


class TestTabularClassification:
    @pytest.mark.parametrize(
        ("choice", "classes", "shapes"),
        [
            (TaskChoice(), 2, [(1, 4), (1,)]),
            (TaskChoice(), 3, [(3, 4), (3,)]),
            (TaskChoice(hidden=[9]), 2, [(1, 4), (1,)]),
            (TaskChoice(model="mlp"), 2, [(32, 4), (32,), (16, 32), (16,), (1, 16), (1,)]),
            (TaskChoice(model="mlp", hidden=[5]), 7, [(5, 4), (5,), (7, 5), (7,)]),
            (TaskChoice(model="mlp", hidden=[]), 2, [(1, 4), (1,)]),
        ],
    )
    def test_two_classes_share_one_logit_and_more_have_one_each(
        self, choice: TaskChoice, classes: int, shapes: list[tuple[int, ...]]
    ) -> None:
        model = TabularClassification(choice).model(4, classes)
        assert [tuple(parameter.shape) for parameter in model.parameters()] == shapes

    def test_logistic_loss_by_hand(self) -> None:
        # log(1 + e^-z) for a positive, log(1 + e^z) for a negative.
        outputs, targets = torch.tensor([[0.0], [2.0], [2.0], [-1.0]]), torch.tensor([1, 1, 0, 0])
        expected = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(2)), math.log(1 + math.exp(-1))]
        metrics = TabularClassification(TaskChoice()).metrics(outputs, targets)
        assert metrics["loss"].tolist() == pytest.approx(expected)
        assert metrics["accuracy"].tolist() == [0, 1, 0, 1]

    def test_cross_entropy_by_hand(self) -> None:
        outputs, targets = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 3.0]]), torch.tensor([2, 2])
        expected = [math.log(3), math.log(math.e + 1 + math.exp(3)) - 3]
        metrics = TabularClassification(TaskChoice()).metrics(outputs, targets)
        assert metrics["loss"].tolist() == pytest.approx(expected)
        assert metrics["accuracy"].tolist() == [0, 1]

    def test_another_seed_gives_another_initial_network(self) -> None:
        task = TabularClassification(TaskChoice(model="mlp"))
        first, second = (initial_model(task, features=4, classes=2, seed=seed) for seed in (1, 2))
        assert not torch.equal(next(first.parameters()), next(second.parameters()))


@pytest.mark.parametrize("name", TASKS)
def test_every_name_in_the_catalogue_resolves(name: str) -> None:
    assert callable(resolve(name, TASKS, key="task.name"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "tabular-clasification",
            "task.name: unknown name 'tabular-clasification'; did you mean 'tabular-classification'",
        ),
        (f"{__name__}:Absent", "has no 'Absent'"),
        ("mine.tasks:Mine", "cannot import 'mine.tasks'"),
    ],
)
def test_a_task_that_does_not_exist_is_refused(name: str, said: str) -> None:
    with pytest.raises(JobError) as caught:
        task_for(make_job(task={"name": name}))
    assert said in str(caught.value)
