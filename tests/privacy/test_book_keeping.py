"""Full fine-tuning in one pass: the clipped sum of a loop over single records, within its stated sensitivity."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privacy.book_keeping import BookKeeping
from privacy.errors import JobError
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from tests.privacy.tiny_models import FAMILIES, ROWS, by_hand, flat, made, one_loss_a_row, rows_for, trained, tune

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CASES: list[tuple[str, str, dict[str, Any]]] = [
    (family, attention, {}) for family in FAMILIES for attention in ("sdpa", "eager")
]
CASES = [case for case in CASES if case[:2] not in {("resnet", "eager"), ("tabular", "eager")}]
# Models that write: the table of the words is the last layer's matrix, too.
CASES += [(family, "sdpa", {"writes": True}) for family in ("gpt2", "llama", "t5")]


def total_of(
    model: nn.Module, rows: tuple[Tensor, Tensor], clip: float, *which: int, engine: BookKeeping | None = None
) -> NDArray[np.int64]:
    engine = engine or BookKeeping(model, one_loss_a_row, physical_batch=4)
    chosen = torch.tensor(which or range(len(rows[0])))
    ours = GaussianSum(clip_norm=clip, noise_multiplier=1.0)
    return engine.clipped_sum(flat(trained(model)), *rows, chosen, ours).copy()


@pytest.mark.parametrize(("family", "attention", "more"), CASES)
def test_the_sum_and_each_row_equal_a_loop_over_single_records(
    family: str, attention: str, more: dict[str, Any]
) -> None:
    model = tune(made(FAMILIES[family], attention, **more), "full", family)
    rows = rows_for(family)
    expected = by_hand(model, *rows).double().numpy()
    lengths = np.linalg.norm(expected, axis=1)
    step = 1.5 * float(lengths.max()) / STEPS_PER_CLIP
    engine = BookKeeping(model, one_loss_a_row, physical_batch=4)
    for i in (0, 3, ROWS - 1):
        ours = total_of(model, rows, step * STEPS_PER_CLIP, i, engine=engine) * step
        assert np.abs(ours - expected[i]).max() <= step + 1e-6 * lengths[i]
    ours = total_of(model, rows, step * STEPS_PER_CLIP, engine=engine) * step
    assert np.abs(ours - expected.sum(axis=0)).max() <= step + 1e-6 * lengths.sum()

    # Clipped: shorter than the clip by the stated margins, and no more.
    clip = 0.5 * float(lengths.min())
    ours = total_of(model, rows, clip, engine=engine) * (clip / STEPS_PER_CLIP)
    by_loop = (expected * (clip / lengths)[:, None]).sum(axis=0)
    assert np.linalg.norm(ours - by_loop) <= 5e-3 * clip * ROWS
    for i in range(ROWS):
        row = total_of(model, rows, clip, i, engine=engine).astype(object)
        assert 0.99 * STEPS_PER_CLIP < math.isqrt(int((row * row).sum())) < STEPS_PER_CLIP


class Reused(nn.Module):
    """One matrix at many positions and at one; a table looked up twice, with repeats; (B, T) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(30, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.inner(self.words(rows)) + self.words(rows.flip(1) // 2)
        result: Tensor = self.head(self.inner(hidden.tanh().mean(1, keepdim=True))[:, 0].tanh())
        return result


# Few positions leave factors, many leave gradients, and between them one use of the matrix differs from the other.
@pytest.mark.parametrize("positions", [2, 7, 9, 40])
def test_a_tensor_used_at_few_and_at_many_positions_has_one_norm(positions: int) -> None:
    model = made(Reused)
    rows = (torch.randint(30, (ROWS, positions), generator=torch.Generator().manual_seed(1)), torch.arange(ROWS) % 3)
    expected = by_hand(model, *rows).double().numpy()
    lengths = np.linalg.norm(expected, axis=1)
    clip = 0.7 * float(lengths.min())
    for i in range(ROWS):
        ours = total_of(model, rows, clip, i) * (clip / STEPS_PER_CLIP)
        assert np.linalg.norm(ours - expected[i] * clip / lengths[i]) <= 3e-3 * clip


def test_a_norm_is_never_taken_for_shorter_than_it_is_where_positions_cancel() -> None:
    # The norm is the rest of what a thousand times larger terms leave: float32 alone gets it wrong by percents.
    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64, bias=False)

        def forward(self, rows: Tensor) -> Tensor:
            hidden = self.inner(rows)
            signs = torch.tensor([1.0, -1.0]).repeat(2)[:, None]
            return (hidden * signs).sum(1)[:, :3]  # type: ignore[no-any-return]

    model = made(Cancelling)
    generator = torch.Generator().manual_seed(2)
    for size in (1e-1, 1e-2, 1e-3, 1e-4):
        base = torch.randn(ROWS, 1, 64, generator=generator).expand(-1, 4, -1)
        features = base + size * torch.randn(ROWS, 4, 64, generator=generator)
        rows = (features, torch.arange(ROWS) % 3)
        lengths = by_hand(model.double(), features.double(), rows[1]).norm(dim=1)
        model.float()
        clip = 0.5 * float(lengths.min())
        for i in range(ROWS):
            row = total_of(model, rows, clip, i).astype(object)
            assert math.isqrt(int((row * row).sum())) <= STEPS_PER_CLIP


def test_the_next_call_is_what_overwrites_a_sum_and_it_starts_from_zero() -> None:
    model, rows = tune(made(FAMILIES["tabular"]), "full", "tabular"), rows_for("tabular")
    engine = BookKeeping(model, one_loss_a_row, physical_batch=4)
    first = total_of(model, rows, 1.0, engine=engine)
    assert np.array_equal(total_of(model, rows, 1.0, engine=engine), first)
    nobody = torch.zeros(0, dtype=torch.int64)
    ours = GaussianSum(clip_norm=1.0, noise_multiplier=1.0)
    assert not engine.clipped_sum(flat(trained(model)), *rows, nobody, ours).any()


def test_products_of_fewer_bits_are_refused() -> None:
    model, rows = tune(made(FAMILIES["tabular"]), "full", "tabular"), rows_for("tabular")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(JobError, match=r'set_float32_matmul_precision\("highest"\)'):
            total_of(model, rows, 1.0)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_margin_pays_for_rounding_each_of_many_coordinates() -> None:
    # So many coordinates that a clip norm is 500.9 steps in each: with no margin for them some row moves all by 501.
    model = nn.Linear(4096, 1070, bias=False)
    rows = (torch.full((6, 4096), 0.01), torch.zeros(6, dtype=torch.int64))
    engine = BookKeeping(model, lambda outputs, targets: outputs.sum(1), physical_batch=6)
    before = 0 * total_of(model, rows, 0.1, 0, engine=engine)
    for count in range(1, 7):
        after = total_of(model, rows, 0.1, *range(count), engine=engine)
        moved = int((after - before)[0])
        assert (after - before == moved).all()
        assert moved >= 498
        assert moved * math.sqrt(len(after)) <= STEPS_PER_CLIP
        before = after


# Opacus' own hooks: torch remarks that features, unlike parameters, need no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_the_sum_equals_that_of_opacus(family: str) -> None:
    from opacus.grad_sample import GradSampleModule  # Takes seconds to import.

    model, rows = tune(made(FAMILIES[family]), "full", family), rows_for(family)
    ours = total_of(model, rows, 100.0) * (100 / STEPS_PER_CLIP)
    hooked = GradSampleModule(model, loss_reduction="sum")
    one_loss_a_row(hooked(rows[0]), rows[1]).sum().backward()  # type: ignore[no-untyped-call]
    of_each: list[Any] = trained(model)
    theirs = torch.cat([p.grad_sample.reshape(ROWS, -1) for p in of_each], dim=1).sum(0)
    assert np.abs(ours - theirs.numpy()).max() <= 2e-4
