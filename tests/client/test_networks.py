"""Every network answers for each record by itself, in training and in per-record gradients."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.networks import CausalConvolution, MatrixFactorisation
from client.tasks import Task, initial_model, task_for
from privacy.dpsgd import VmapGradients, check_trainable
from privacy.errors import JobError
from tests.strategies.jobs import make_job

NUMBERS = {f"x{i}": {"range": [0, 1]} for i in range(5)}


def job_task(name: str, data: Mapping[str, Any], **task: Any) -> Task:
    return task_for(make_job(data=data, task={"name": name, **task}))


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


CLASSES = torch.tensor([0, 1, 1, 0, 1, 0])
TIMES = torch.tensor([[3.0, 1], [5.0, 0], [2.0, 1], [2.0, 1], [9.0, 0], [1.0, 0]])
WINDOWS = torch.tensor([[1, 2, 0, 3], [2, 2, -1, -1], [0, 1, 2, 3], [3, -1, -1, -1], [1, 1, 1, 1], [2, 0, -1, -1]])
LETTERS = {"columns": {"text": {"type": "characters", "alphabet": "abc", "window": 4}}, "target": "text"}
TABULAR = {"columns": NUMBERS}
NUMBER = {**TABULAR, "target_type": "number", "target_range": [0, 10]}
TIME = {**TABULAR, "target_type": "time", "event": "e"}
RATING = {"columns": {"item": {"type": "id", "count": 7}}, "target_type": "number", "target_range": [1, 5]}
BLOCKS = {"hidden": [8, 8]}
PICTURE = {"columns": {"picture": {"type": "image", "shape": [8, 8, 3]}}}
HAZARDS = {"loss": "discrete-time", "intervals": [2, 4, 8]}

CASES: dict[str, tuple[Callable[[], Task], Tensor, Tensor, int]] = {
    "logistic regression": (lambda: job_task("tabular-classification", TABULAR), rows_of(6, 5), CLASSES, 2),
    "mlp": (lambda: job_task("tabular-classification", TABULAR, model="mlp"), rows_of(6, 5), CLASSES, 2),
    "resnet": (
        lambda: job_task("tabular-classification", TABULAR, model="resnet", **BLOCKS),
        rows_of(6, 5),
        CLASSES,
        3,
    ),
    "ft-transformer": (
        lambda: job_task("tabular-classification", TABULAR, model="ft-transformer", heads=2, **BLOCKS),
        rows_of(6, 5),
        CLASSES,
        2,
    ),
    "linear regression": (
        lambda: job_task("tabular-regression", NUMBER, model="linear"),
        rows_of(6, 5),
        TIMES[:, 0],
        0,
    ),
    "huber": (
        lambda: job_task("tabular-regression", NUMBER, model="resnet", loss="huber", huber_delta=0.1, **BLOCKS),
        rows_of(6, 5),
        TIMES[:, 0],
        0,
    ),
    "discrete-time": (lambda: job_task("survival", TIME, model="mlp", **HAZARDS), rows_of(6, 5), TIMES, 0),
    "cnn": (lambda: job_task("image-classification", PICTURE, model="cnn", hidden=[4, 8]), rows_of(6, 192), CLASSES, 2),
    "next character": (
        lambda: job_task("next-character", {**LETTERS, "target_type": "next"}, model="causal-convolution", **BLOCKS),
        torch.tensor([[0.0, 1, 2, 3], [1, 2, 0, 0], [3, 0, 1, 2], [2, 0, 0, 0], [1, 1, 1, 1], [3, 2, 0, 0]]),
        WINDOWS,
        4,
    ),
    "recommendation": (
        lambda: job_task("recommendation", RATING, model="matrix-factorisation", hidden=[3]),
        torch.tensor([[0.0], [6], [2], [2], [4], [5]]),
        TIMES[:, 0].clamp(1, 5),
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
class TestEveryNetwork:
    def test_gives_each_record_the_answer_and_loss_that_it_has_alone(self, case: str) -> None:
        make, rows, targets, classes = CASES[case]
        task = make()
        model = initial_model(task, features=rows.shape[1], classes=classes, seed=1)
        whole = model(rows)
        metrics = task.metrics(whole, targets)
        losses = task.loss(whole, targets)
        torch.testing.assert_close(metrics["loss"], losses)
        for row in range(len(rows)):
            alone = model(rows[row : row + 1])
            torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-5)
            for name, values in task.metrics(alone, targets[row : row + 1]).items():
                assert values.shape == (1,)
                torch.testing.assert_close(values[0], metrics[name][row], rtol=1e-4, atol=1e-5)

    def test_has_per_record_gradients_that_are_those_of_a_loop(self, case: str) -> None:
        make, rows, targets, classes = CASES[case]
        task = make()
        model = initial_model(task, features=rows.shape[1], classes=classes, seed=1)
        check_trainable(model)
        parameters = list(model.parameters())
        with torch.no_grad():
            for parameter in parameters:  # Away from zero, where many gradients vanish.
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        found = VmapGradients(model, task.loss)(flat, rows, targets)
        for row in range(len(rows)):
            loss = task.loss(model(rows[row : row + 1]), targets[row : row + 1]).sum()
            expected = torch.cat([gradient.reshape(-1) for gradient in torch.autograd.grad(loss, parameters)])
            torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-5)
        assert found.abs().max() > 1e-3

    def test_is_the_same_for_the_same_seed_and_another_for_another(self, case: str) -> None:
        make, rows, _, classes = CASES[case]
        models = [initial_model(make(), features=rows.shape[1], classes=classes, seed=seed) for seed in (3, 3, 4)]
        flat = [torch.cat([p.detach().reshape(-1) for p in model.parameters()]) for model in models]
        assert torch.equal(flat[0], flat[1])
        assert torch.equal(flat[0], flat[2]) == (case in ("logistic regression", "linear regression"))


def test_a_position_of_a_window_does_not_depend_on_what_comes_after_it() -> None:
    torch.manual_seed(0)
    model = CausalConvolution(5, 8, 3)
    window = torch.randint(0, 5, (1, 12)).float()
    before = model(window)
    for position in range(12):
        other = window.clone()
        other[0, position] = (other[0, position] + 1) % 5
        changed = (model(other) - before).abs().amax(dim=-1)[0] > 1e-7
        assert not changed[:position].any()
        assert changed[position]


def test_a_transformer_learns_what_no_linear_model_can() -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.choice([-1.0, 1.0], (128, 2)).astype(np.float32))
    targets = (rows.prod(dim=1) > 0).long()
    task = job_task("tabular-classification", TABULAR, model="ft-transformer", heads=2, hidden=[8])
    model = initial_model(task, features=2, classes=2, seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimiser.zero_grad()
        task.loss(model(rows), targets).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert float(task.metrics(model(rows), targets)["accuracy"].mean()) == 1


def test_a_users_own_parameters_are_named_so() -> None:
    names = {name: tuple(p.shape) for name, p in MatrixFactorisation(7, 3).named_parameters()}
    own = {name for name in names if name.startswith("user.")}
    assert own == {"user.weight", "user.bias"}
    assert sum(math.prod(names[name]) for name in own) == 4
    assert names["items.weight"] == (7, 3)


def test_users_with_a_vector_of_their_own_fit_ratings_that_no_common_one_does() -> None:
    rng = np.random.default_rng(1)
    taste, kind = rng.normal(size=(12, 2)), rng.normal(size=(9, 2))
    ratings = torch.from_numpy(np.clip(3 + taste @ kind.T, 1, 5).astype(np.float32))
    task = job_task(
        "recommendation",
        {**RATING, "columns": {"item": {"type": "id", "count": 9}}},
        model="matrix-factorisation",
        hidden=[3],
    )
    items = torch.arange(9.0)[:, None]

    def rmse(own: bool) -> float:
        torch.manual_seed(0)
        shared = MatrixFactorisation(9, 3)
        users: list[nn.Linear] = [nn.Linear(3, 1) for _ in range(12)] if own else [shared.user] * 12
        parameters = [*shared.parameters(), *(p for user in users for p in user.parameters() if own)]
        optimiser = torch.optim.Adam(parameters, lr=0.05)
        for _ in range(150):
            optimiser.zero_grad()
            losses = []
            for user, wanted in zip(users, ratings, strict=True):
                shared.user = user
                losses.append(task.loss(shared(items), wanted).mean())
            torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        errors = []
        for user, wanted in zip(users, ratings, strict=True):
            shared.user = user
            errors.append(task.metrics(shared(items), wanted)["mae"].detach())
        return float(torch.cat(errors).square().mean().sqrt())

    assert rmse(own=True) < 0.5 * rmse(own=False)


@pytest.mark.parametrize(
    ("name", "data", "task", "said"),
    [
        ("tabular-classification", TABULAR, {"model": "resnet"}, "of one width, for example [32, 32]"),
        ("tabular-classification", TABULAR, {"model": "ft-transformer", "hidden": [6], "heads": 4}, "4 heads"),
        ("image-classification", PICTURE, {"model": "cnn", "hidden": [2, 2, 2, 2]}, "an image of 8 x 8"),
        ("recommendation", RATING, {"model": "matrix-factorisation", "hidden": [3, 3]}, "one number of factors"),
    ],
)
def test_a_model_that_cannot_be_is_refused(name: str, data: Mapping[str, Any], task: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError) as caught:
        initial_model(job_task(name, data, **task), features=5, classes=2, seed=0)
    assert said in str(caught.value)
