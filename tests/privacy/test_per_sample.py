"""Gradients of single records from one pass over a batch: those of a loop, clipped to the integer, or a refusal."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from privacy.dpsgd import ClippedGradients, RecordLevelSgd
from privacy.errors import JobError
from privacy.gradients import Method, block_of_each, gradients_for
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from privacy.noise import SeededNoise
from privacy.per_sample import RowGradients
from tests.privacy.tiny_models import (
    FAMILIES,
    LORA,
    ROWS,
    by_hand,
    flat,
    made,
    one_loss_a_row,
    rows_for,
    trained,
    tune,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*Conv1D.*:UserWarning")

ATTENTIONS = {family: ("sdpa",) if family in ("resnet", "tabular") else ("sdpa", "eager") for family in FAMILIES}
CASES = [
    (family, attention, how)
    for family, attentions in ATTENTIONS.items()
    for attention in attentions
    for how in ("lora", "bias and norm", "head")
    if how != "lora" or family in LORA
]
ENGINES: list[Method] = ["leaves", "book-keeping"]


def mechanism(clip_norm: float, layers: tuple[int, ...] = ()) -> GaussianSum:
    return GaussianSum(clip_norm=clip_norm, noise_multiplier=1.0, layers=layers)


def summed(engine: ClippedGradients, model: nn.Module, rows: tuple[Tensor, Tensor], clip: float, *which: int) -> Any:
    chosen = torch.tensor(which or range(len(rows[0])))
    return engine.clipped_sum(flat(trained(model)), *rows, chosen, mechanism(clip))


def engine_for(model: nn.Module, method: Method = "leaves", rows: int = 3, loss: Any = one_loss_a_row) -> Any:
    return gradients_for(model, loss, method=method, physical_batch=rows)


@pytest.mark.parametrize(("family", "attention", "how"), CASES)
def test_gradients_equal_a_loop_over_single_records(family: str, attention: str, how: str) -> None:
    model = tune(made(FAMILIES[family], attention), how, family)
    features, targets = rows_for(family)
    expected = by_hand(model, features, targets)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, _ = RowGradients(model, one_loss_a_row, None).gradients(flat(trained(model)), features, targets)
    every = [
        torch.zeros(ROWS, p.numel()) if g is None else g.flatten(1) for g, p in zip(found, trained(model), strict=True)
    ]
    ours = torch.cat(every, dim=1)
    assert ours.dtype == torch.float32
    for mine, own in zip(ours, expected, strict=True):
        assert float((mine - own).norm()) <= 1e-5 * float(own.norm())
    assert float(expected.norm(dim=1).min()) > 1e-3
    # The model is left as it was.
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)

    # And the clipped sum is that of numpy, up to the step by which a rounding moves a coordinate of each row.
    clip = float(expected.norm(dim=1).median())
    total = summed(engine_for(model), model, (features, targets), clip)
    assert np.abs(total - mechanism(clip).quantised_sum(ours.numpy())).max() <= 3 * ROWS
    assert total.dtype == np.int64


class Small(nn.Module):
    """Layers of every kind, one of them called twice, one matrix in two modules; (B, 4, 6) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1, groups=1)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.group_norm, self.layer_norm, self.rms_norm = nn.GroupNorm(2, 4), nn.LayerNorm((2, 6)), nn.RMSNorm(6)
        self.twice, self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.places = nn.Embedding(4, 6, padding_idx=3)
        self.head = nn.Linear(24, 3)
        self.tail = nn.Linear(8, 3)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = rows + self.places(torch.arange(4).unsqueeze(0))
        hidden = self.twice(self.twice(hidden).tanh())
        hidden = self.rms_norm(hidden + self.other(self.one(hidden).tanh()))
        hidden = self.layer_norm(hidden.unflatten(1, (2, 2))) + hidden.unflatten(1, (2, 2))
        image = self.group_norm(self.convolution(hidden.flatten(1, 2).unsqueeze(1))).relu_()
        result: Tensor = self.head(hidden.flatten(1)) + self.tail(self.grouped(image).flatten(1))
        return result


@pytest.fixture
def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return made(Small), (torch.randn(ROWS, 4, 6, generator=generator), torch.arange(ROWS) % 3)


Given = tuple[nn.Module, tuple[Tensor, Tensor]]


@pytest.mark.parametrize("method", ENGINES)
class TestClippedSum:
    def test_holds_for_every_kind_of_layer_called_once_or_twice(self, method: Method, small: Given) -> None:
        model, rows = small
        expected = by_hand(model, *rows).double()
        clip = 2 * float(expected.norm(dim=1).max())
        engine = engine_for(model, method)
        for i in range(ROWS):
            ours = summed(engine, model, rows, clip, i) * (clip / STEPS_PER_CLIP)
            assert np.abs(ours - expected[i].numpy()).max() <= 3e-6 * clip

    @pytest.mark.parametrize("rows_at_once", [1, 3, 8])
    def test_does_not_depend_on_the_physical_batch_which_is_always_full(
        self, method: Method, small: Given, rows_at_once: int
    ) -> None:
        model, rows = small
        seen: list[int] = []
        model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        expected = summed(engine_for(model, method, rows=ROWS), model, rows, 1.0)
        seen.clear()
        ours = summed(engine_for(model, method, rows=rows_at_once), model, rows, 1.0)
        assert np.abs(ours - expected).max() <= 3 * ROWS
        checked, passes = seen[:3], seen[3:]
        assert checked == [2, 1, 1]  # The check of the first rows.
        assert passes == [rows_at_once] * math.ceil(ROWS / rows_at_once)

    def test_of_no_rows_is_zero_and_runs_no_model(self, method: Method, small: Given) -> None:
        model, rows = small
        model.register_forward_hook(lambda module, args, output: pytest.fail("ran"))
        nobody = torch.zeros(0, dtype=torch.int64)
        total = engine_for(model, method).clipped_sum(flat(trained(model)), *rows, nobody, mechanism(1.0))
        assert total.shape == flat(trained(model)).shape
        assert not total.any()

    def test_a_row_that_is_not_finite_contributes_nothing_and_poisons_no_other(
        self, method: Method, small: Given
    ) -> None:
        model, (features, targets) = small
        poisoned = features.clone()
        poisoned[2, 1, 1], poisoned[5] = math.inf, math.nan
        engine = engine_for(model, method, rows=ROWS)
        others = summed(engine, model, (features, targets), 1.0, 0, 1, 3, 4, 6).copy()
        assert np.abs(summed(engine, model, (poisoned, targets), 1.0) - others).max() <= 3 * ROWS
        assert not summed(engine, model, (poisoned, targets), 1.0, 2, 5).any()

    def test_the_parameters_given_count_and_not_the_model_s_own(self, method: Method, small: Given) -> None:
        model, rows = small
        other = made(Small, seed=1)
        own = flat(trained(model))
        total = (
            engine_for(model, method)
            .clipped_sum(flat(trained(other)), *rows, torch.arange(ROWS), mechanism(1.0))
            .copy()
        )
        assert np.abs(total - summed(engine_for(other, method), other, rows, 1.0)).max() <= ROWS
        assert torch.equal(flat(trained(model)), own)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_arrays_at_rest_contribute_zeros_and_take_no_part_in_the_norm(self, method: Method, small: Given) -> None:
        model, rows = small
        engine = engine_for(model, method)
        model.get_parameter("head.weight").requires_grad_(False)
        model.get_parameter("layer_norm.bias").requires_grad_(False)
        expected = summed(engine_for(model, method), model, rows, 0.5).copy()
        model.requires_grad_(True)
        whole = flat(trained(model))
        names = [name for name, _ in model.named_parameters()]
        for resting in ("head.weight", "layer_norm.bias"):
            model.get_parameter(resting).requires_grad_(False)
        total = engine.clipped_sum(whole, *rows, torch.arange(ROWS), mechanism(0.5))
        sizes = [p.numel() for p in model.parameters()]
        parts = dict(zip(names, np.split(total, np.cumsum(sizes)[:-1]), strict=True))
        assert not parts.pop("head.weight").any()
        assert not parts.pop("layer_norm.bias").any()
        # Book-keeping keeps a margin for all coordinates that there are.
        assert np.allclose(np.concatenate(list(parts.values())), expected, rtol=2e-4, atol=ROWS)

    def test_names_choose_the_parameters_and_their_order(self, method: Method, small: Given) -> None:
        model, rows = small
        names = ["head.bias", "twice.weight"]
        engine = gradients_for(model, one_loss_a_row, method=method, physical_batch=4, names=names)
        chosen = [model.get_parameter(name) for name in names]
        total = engine.clipped_sum(flat(chosen), *rows, torch.arange(ROWS), mechanism(100.0)) * (100 / STEPS_PER_CLIP)
        loss = one_loss_a_row(model(rows[0]), rows[1]).sum()
        expected = flat(torch.autograd.grad(loss, chosen)).numpy()
        assert np.allclose(total, expected, atol=2e-3)
        assert np.abs(expected).max() > 0.1

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_clips_each_row_to_the_norm_in_float32_and_in_bfloat16(self, method: Method, checkpointing: bool) -> None:
        from tests.privacy.tiny_models import bert

        model: Any = made(bert)
        if checkpointing:
            model.base.gradient_checkpointing_enable({"use_reentrant": False})
        features, targets = rows_for("bert")
        hand = by_hand(model, features, targets)
        clip = 0.3 * float(hand.norm(dim=1).min())

        class Autocast(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, rows: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    result: Tensor = self.inner(rows)
                return result

        for wrapped, least, agreement in ((model, 0.98, 0.9999), (Autocast(), 0.98, 0.99)):
            engine = engine_for(wrapped, method)
            for i in range(3):
                row = summed(engine, wrapped, (features, targets), clip, i).astype(object)
                length = math.isqrt(int((row * row).sum()))
                assert least * STEPS_PER_CLIP < length <= STEPS_PER_CLIP
                own = hand[i].double().numpy()
                assert float(row.astype(float) @ own) > agreement * length * float(np.linalg.norm(own))

    # torch's own RMSNorm remarks that its weight is not in bfloat16.
    @pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
    def test_computes_the_same_with_autocast_inside_the_model_and_around_training(
        self, method: Method, small: Given
    ) -> None:
        model, rows = small

        class Autocast(nn.Sequential):
            def forward(self, input: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    result: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
                return result

        inside = summed(engine_for(Autocast(model), method), model, rows, 0.5).copy()
        with torch.autocast("cpu", torch.bfloat16):
            around = summed(engine_for(model, method), model, rows, 0.5)
        assert np.array_equal(inside, around)
        assert not np.array_equal(inside, summed(engine_for(model, method), model, rows, 0.5))

    def test_clips_by_layer_as_numpy_does(self, method: Method, small: Given) -> None:
        model, rows = small
        sizes = [p.numel() for p in trained(model)]
        blocks = (sum(sizes[:4]), sum(sizes[4:5]), sum(sizes[5:]))
        one = mechanism(0.4, blocks)
        whole = by_hand(model, *rows)
        total = engine_for(model, method).clipped_sum(flat(trained(model)), *rows, torch.arange(ROWS), one)
        expected = one.quantised_sum(whole.numpy())
        assert np.allclose(total, expected, rtol=5e-3, atol=5e-3 * STEPS_PER_CLIP)
        if method == "leaves":
            assert np.abs(total - expected).max() <= 3 * ROWS

    @settings(max_examples=15, deadline=None)
    @given(clip=st.floats(0.01, 10), which=st.sets(st.integers(0, ROWS - 1), min_size=1), seed=st.integers(0, 99))
    def test_one_row_more_moves_the_integers_by_a_clip_norm_at_most(
        self, method: Method, clip: float, which: set[int], seed: int
    ) -> None:
        model = made(Small)
        features = torch.randn(ROWS, 4, 6, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 4 - 1)
        rows, engine = (features, torch.arange(ROWS) % 3), engine_for(model, method)
        others = [*which][1:]
        with_it = summed(engine, model, rows, clip, *which).copy()
        without = summed(engine, model, rows, clip, *others) if others else 0 * with_it
        moved = (with_it - without).astype(object)
        # The same rows lie in other pieces: float32 rounds their gradients otherwise.
        slack = STEPS_PER_CLIP * 1e-5 * len(which)
        assert math.isqrt(int((moved * moved).sum())) <= STEPS_PER_CLIP + slack * (method == "leaves")


class TestSelfCheck:
    def test_a_mean_over_the_tokens_of_a_batch_is_refused(self) -> None:
        from tests.privacy.tiny_models import bert

        def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
            losses = one_loss_a_row(outputs, targets)
            return losses / (1 + targets).sum()  # The others' numbers of tokens count, as in transformers' own loss.

        model = tune(made(bert), "head", "bert")
        for method in ENGINES:
            with pytest.raises(JobError, match=r"'head\.weight'.*depends on the other records.*itself \(no mean over"):
                summed(engine_for(model, method, loss=token_mean), model, rows_for("bert"), 1.0)

    def test_so_is_a_layer_that_couples_rows(self) -> None:
        class Centred(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

            def forward(self, rows: Tensor) -> Tensor:
                hidden = self.first(rows)
                result: Tensor = self.head((hidden - hidden.mean(0)).tanh() + 0.1)
                return result

        model, rows = made_as_is(Centred), (torch.randn(6, 5), torch.arange(6) % 3)
        with pytest.raises(JobError, match="depends on the other records"):
            summed(engine_for(model), model, rows, 1.0)

    def test_nor_does_a_head_of_zeros_hide_one_whose_parameter_is_told_apart_wrongly(self) -> None:
        class Picks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale, self.head = nn.Parameter(torch.ones(1)), nn.Linear(5, 3)
                nn.init.zeros_(self.head.weight)

            def forward(self, rows: Tensor) -> Tensor:
                result: Tensor = self.head(rows * self.scale[0])  # Of the first record's leaf alone.
                return result

        model, rows = made_as_is(Picks), (torch.randn(6, 5), torch.arange(6) % 3)
        with pytest.raises(JobError, match=r"gradient of 'scale'.*computes something else"):
            summed(engine_for(model), model, rows, 1.0)

    def test_a_loss_that_is_one_number_is_refused(self, small: Given) -> None:
        model, rows = small
        with pytest.raises(JobError, match=r"one value a record, got shape \(\) for 2 records"):
            summed(engine_for(model, loss=functional.cross_entropy), model, rows, 1.0)

    def test_dropout_rests_during_the_check_and_draws_a_mask_for_each_record_afterwards(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 3)).train()
        features, targets = torch.ones(8, 64), torch.zeros(8, dtype=torch.int64)
        engine = engine_for(model, rows=8)
        rows = {tuple((summed(engine, model, (features, targets), 100.0, i)[:64] != 0).tolist()) for i in range(8)}
        assert len(rows) == 8
        assert all(module.training for module in model.modules())

    def test_records_with_no_gradient_to_speak_of_pass(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3)).train()
        with torch.no_grad():
            model[0].bias.copy_(torch.tensor([40.0, 0.0, 0.0]))  # type: ignore[operator]
        rows = (torch.randn(4, 4), torch.zeros(4, dtype=torch.int64))
        assert not summed(engine_for(model), model, rows, 1.0).any()


def made_as_is(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.inner(rows) + 0.5 * rows @ self.inner.weight.t()
        return result


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(rows.unsqueeze(0).expand(4, -1, -1)).mean(0)  # type: ignore[no-any-return]


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.ones(5, 3))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.scores


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 3, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        return self.lstm(rows.unsqueeze(1))[0][:, 0]  # type: ignore[no-any-return]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(5, 1, batch_first=True), nn.Linear(5, 3)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.head(self.attention(rows[:, None], rows[:, None], rows[:, None])[0][:, 0])
        return result


class Replaced(nn.Sequential):
    def __init__(self) -> None:
        inner = nn.Linear(5, 3)
        inner.forward = lambda rows: functional.linear(rows, inner.weight)  # type: ignore[method-assign,assignment]
        super().__init__(inner)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "reads a matrix beside its layer": (Bypassed, r"reads 'inner\.weight' in another way"),
    "rows not first": (TimeFirst, r"'inner' \(Linear\) gets a tensor of shape \(4, 2, 5\) for 2 records"),
    "a parameter that is a matrix of its own": (
        Scored,
        r"gradient of 'scores' for a record .* computes something else",
    ),
    "a recurrent layer": (Recurrent, r"'lstm' \(LSTM\) is of a kind that is not covered"),
    "torch's attention": (Attending, r"'attention' \(MultiheadAttention\) is of a kind that is not covered"),
    "a forward that another library replaced": (Replaced, r"'0' \(Linear\) has had its forward replaced"),
    "padding that is not zeros": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5, 1)), nn.Conv2d(1, 3, 1, padding_mode="reflect")),
        r"'1' \(Conv2d\) pads by other means",
    ),
    "an embedding with a norm": (lambda: nn.Embedding(5, 3, max_norm=1.0), r"\(Embedding\) has max_norm"),
    "nothing to train": (nn.Tanh, "no parameters to train"),
}


@pytest.mark.parametrize("method", ENGINES)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_apart_is_refused_by_name_with_the_way_out(case: str, method: Method) -> None:
    build, message = REFUSED[case]
    model = made_as_is(build)
    with pytest.raises(JobError, match=message) as caught:
        summed(engine_for(model, method), model, (torch.randn(6, 5), torch.arange(6) % 3), 1.0)
    assert "\n" not in str(caught.value)
    if trained(model):
        assert 'freeze it, or use the gradient method "vmap"' in str(caught.value)


@pytest.mark.parametrize("method", ENGINES)
def test_checkpointing_of_the_reentrant_kind_is_refused_with_the_way_out(method: Method) -> None:
    from tests.privacy.tiny_models import llama

    model: Any = made(llama)
    model.base.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(JobError, match=r'gradient_checkpointing_enable\(\{"use_reentrant": False\}\)'):
        summed(engine_for(model, method), model, rows_for("llama"), 1.0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ia3", r"\(ParameterDict\) is of a kind that is not covered"),
        ("dora", r"\(DoraLinearLayer\) is of a kind that is not covered"),
    ],
)
def test_adapters_without_layers_of_their_own_are_refused(kind: str, message: str) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    from tests.privacy.tiny_models import bert

    model: Any = made(bert)
    configs = {
        "ia3": IA3Config(target_modules=["query"], feedforward_modules=[]),
        "dora": LoraConfig(r=2, target_modules=["query"], use_dora=True),
    }
    model.base = get_peft_model(model.base, configs[kind])
    with pytest.raises(JobError, match=message):
        engine_for(model)


def test_unknown_methods_names_and_batches_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(JobError, match=r'"vmap", "leaves" or "book-keeping", got .hooks.'):
        engine_for(model, "hooks")  # type: ignore[arg-type]
    with pytest.raises(JobError, match="no parameter 'wieght'"):
        gradients_for(model, one_loss_a_row, method="leaves", physical_batch=1, names=["wieght"])
    with pytest.raises(JobError, match="physical_batch must be at least 1"):
        engine_for(model, rows=0)


@pytest.mark.parametrize("layers", [(3, 7), (10, 1), (4,), (2, 8)])
def test_a_block_that_cuts_a_tensor_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(JobError, match="do not hold whole tensors"):
        block_of_each([4, 6], layers)


def test_blocks_hold_one_tensor_or_several() -> None:
    assert block_of_each([4, 6, 1, 2], (10, 3)) == [0, 0, 1, 1]
    assert block_of_each([4, 6], (4, 6)) == [0, 1]
    assert block_of_each([4, 6], ()) == [0, 0]


def test_all_engines_train_to_the_same_model(small: Given) -> None:
    model, rows = small
    start = flat(trained(model))
    ours = RecordLevelSgd(mechanism=mechanism(0.5), sampling_rate=0.5, steps=4)
    reached = []
    for method in ("leaves", "book-keeping"):
        parameters = start.clone()
        ours.train(parameters, *rows, gradients=engine_for(model, method), source=SeededNoise(3), learning_rate=0.1)
        reached.append(parameters)
    moved = float((reached[0] - start).norm())
    assert float((reached[0] - reached[1]).norm()) < 5e-3 * moved


# Opacus' own hooks: torch remarks that features, unlike parameters, need no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_equal_those_of_opacus(family: str) -> None:
    from opacus.grad_sample import GradSampleModule  # Takes seconds to import.

    model = tune(made(FAMILIES[family]), "lora", family)
    features, targets = rows_for(family)
    found, _ = RowGradients(model, one_loss_a_row, None).gradients(flat(trained(model)), features, targets)
    hooked = GradSampleModule(model, loss_reduction="sum")
    one_loss_a_row(hooked(features), targets).sum().backward()  # type: ignore[no-untyped-call]
    of_each: list[Any] = trained(model)
    for ours, parameter in zip(found, of_each, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, parameter.grad_sample, rtol=1e-4, atol=1e-5)
