"""DP-SGD is the algorithm on paper: exact per-example gradients, Poisson batches, a noise draw a step, all charged."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from privacy.dpsgd import ClippedPieces, PerExampleGradients, RecordLevelSgd, VmapGradients, check_trainable
from privacy.errors import JobError
from privacy.mechanism import GaussianSum
from privacy.noise import NoiseSource, SeededNoise, discrete_gaussian, poisson_sample

ACCEPT, REJECT = 1e-3, 1e-9


class ConvolutionalNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x).flatten(1))
        return result


class TokenClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.embedding(x)).mean(1))
        return result


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def whole_numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "perceptron": (perceptron, numbers(9, 5)),
    "convolutions with GroupNorm": (ConvolutionalNet, numbers(9, 1, 8, 8)),
    "embedding with LayerNorm": (TokenClassifier, whole_numbers(11, 9, 7)),
}
TARGETS = whole_numbers(3, 9)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainable(model)])


def load(model: nn.Module, parameters: Tensor) -> None:
    offset = 0
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(parameters[offset : offset + parameter.numel()].view_as(parameter))
            offset += parameter.numel()


def by_hand(model: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    """Per-example gradients by autograd, one record at a time."""
    rows = []
    for index in range(len(features)):
        loss = cross_entropy(model(features[index : index + 1]), targets[index : index + 1]).sum()
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trainable(model))]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
class TestPerExampleGradients:
    def test_equal_a_loop_over_single_records(self, name: str) -> None:
        build, features = MODELS[name]
        model = made(build)
        ours = VmapGradients(model, cross_entropy)(flat(model), features, TARGETS)
        assert ours.shape == (9, flat(model).numel())
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, by_hand(model, features, TARGETS), rtol=0, atol=1e-6)
        assert float(ours.abs().max()) > 0.01

    # Opacus' own hooks: torch remarks that features, unlike parameters, need no gradient.
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
    def test_equal_those_of_opacus(self, name: str) -> None:
        from opacus.grad_sample import GradSampleModule  # Takes seconds to import.

        build, features = MODELS[name]
        model = made(build)
        hooked = GradSampleModule(made(build), loss_reduction="sum")
        cross_entropy(hooked(features), TARGETS).sum().backward()  # type: ignore[no-untyped-call]
        theirs = torch.cat([p.grad_sample.reshape(9, -1) for p in hooked.parameters()], dim=1)
        torch.testing.assert_close(
            VmapGradients(model, cross_entropy)(flat(model), features, TARGETS), theirs, rtol=0, atol=1e-5
        )

    def test_are_taken_at_the_parameters_given_and_not_at_the_model_s_own(self, name: str) -> None:
        build, features = MODELS[name]
        model, other = made(build), made(build, seed=1)
        before = flat(model)
        ours = VmapGradients(model, cross_entropy)(flat(other), features, TARGETS)
        torch.testing.assert_close(ours, by_hand(other, features, TARGETS), rtol=0, atol=1e-6)
        assert torch.equal(flat(model), before)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_do_not_depend_on_the_other_records_of_the_batch(self, name: str) -> None:
        build, features = MODELS[name]
        model = made(build)
        gradients = VmapGradients(model, cross_entropy)
        whole = gradients(flat(model), features, TARGETS)
        for index in range(9):
            alone = gradients(flat(model), features[index : index + 1], TARGETS[index : index + 1])
            torch.testing.assert_close(alone[0], whole[index], rtol=0, atol=1e-6)

    def test_leave_frozen_parameters_out(self, name: str) -> None:
        build, features = MODELS[name]
        model = made(build)
        frozen = next(model.parameters())
        frozen.requires_grad_(False)
        ours = VmapGradients(model, cross_entropy)(flat(model), features, TARGETS)
        assert ours.shape[1] == sum(p.numel() for p in model.parameters()) - frozen.numel()
        torch.testing.assert_close(ours, by_hand(model, features, TARGETS), rtol=0, atol=1e-6)


def test_each_record_draws_a_dropout_mask_of_its_own() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 3))
    features = torch.ones(1, 64).repeat(8, 1)
    ours = VmapGradients(model, cross_entropy)(flat(model), features, torch.zeros(8, dtype=torch.int64))
    masks = {tuple((row[:64] != 0).tolist()) for row in ours}
    assert len(masks) == 8


# A seam simple enough to compute by hand: the gradient of a record is the record, and no float is ever rounded.


def the_records_themselves(parameters: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    return features


@dataclass
class Watch:
    """`PerExampleGradients` that keeps what it was asked for."""

    batches: list[list[int]] = field(default_factory=list)

    def __call__(self, parameters: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        self.batches.append(targets.tolist())
        return torch.zeros(len(features), parameters.numel())


def sgd(*, clip: float = 1.0, noise: float = 1.0, rate: float = 0.5, steps: int = 1) -> RecordLevelSgd:
    return RecordLevelSgd(
        mechanism=GaussianSum(clip_norm=clip, noise_multiplier=noise), sampling_rate=rate, steps=steps
    )


def trained(
    ours: RecordLevelSgd,
    features: Tensor,
    targets: Tensor | None = None,
    *,
    gradients: PerExampleGradients = the_records_themselves,
    start: Tensor | None = None,
    source: NoiseSource | None = None,
    learning_rate: float = 0.1,
    weight_decay: float = 0.0,
    physical_batch: int = 1024,
) -> Tensor:
    parameters = torch.zeros(features.shape[1]) if start is None else start.clone()

    def decay(gradient: Tensor, parameters: Tensor) -> None:
        gradient.add_(parameters, alpha=weight_decay)

    ours.train(
        parameters,
        features,
        torch.arange(len(features)) if targets is None else targets,
        gradients=ClippedPieces(gradients, physical_batch),
        source=source or SeededNoise(1),
        learning_rate=learning_rate,
        adjust=decay,
    )
    return parameters


class TestStep:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("weight_decay", [0.0, 0.3])
    def test_training_equals_the_algorithm_written_out_by_hand(self, name: str, weight_decay: float) -> None:
        build, features = MODELS[name]
        model, clip, noise, rate, steps, learning_rate = made(build), 0.5, 0.7, 0.4, 4, 0.2
        ours = trained(
            sgd(clip=clip, noise=noise, rate=rate, steps=steps),
            features,
            TARGETS,
            gradients=VmapGradients(model, cross_entropy),
            start=flat(model),
            source=SeededNoise(7, name),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
        )

        # Abadi et al. 2016, Alg. 1, in float64; batches and noise in the order in which they are drawn.
        source, reference, parameters, clipped = SeededNoise(7, name), made(build), flat(model).double(), 0
        for _ in range(steps):
            batch = poisson_sample(source, 9, rate)
            load(reference, parameters.float())
            total = torch.zeros_like(parameters)
            for index in batch.tolist():
                row = by_hand(reference, features[index : index + 1], TARGETS[index : index + 1])[0].double()
                clipped += bool(row.norm() > clip)
                total += row * min(1.0, clip / float(row.norm()))
            scale = math.sqrt((noise * 2**20) ** 2 + 1 / 12)
            total += torch.from_numpy(discrete_gaussian(source, scale, len(total))).double() * clip / 2**20
            parameters = parameters - learning_rate * (total / (rate * 9) + weight_decay * parameters)
        assert clipped > 0
        torch.testing.assert_close(ours, parameters.float(), rtol=0, atol=2e-5)
        assert float((ours - flat(model)).abs().max()) > 0.01

    def test_a_single_step_is_exact_where_no_float_is_rounded(self) -> None:
        features = torch.tensor([[0.5, -0.25], [0.0, 0.5], [3.0, 4.0]])
        ours = trained(sgd(rate=1.0, noise=2.0), features, learning_rate=0.5, source=SeededNoise(3))
        source = SeededNoise(3)
        poisson_sample(source, 3, 1.0)
        # Each row on the grid, shrunk by 2^-24 and rounded toward zero; the third is clipped from 5 to 1.
        rows = [[524287, -262143], [0, 524287], [629145, 838860]]
        drawn = discrete_gaussian(source, math.sqrt(2.0**42 + 1 / 12), 2)
        noisy = (np.sum(rows, axis=0) + drawn) / 2**20
        assert ours.tolist() == (-0.5 * torch.from_numpy((noisy / 3).astype(np.float32))).tolist()

    def test_the_step_is_scaled_by_the_expected_batch_and_never_by_the_one_drawn(self) -> None:
        # A division by the number drawn would release it, and undo the clip where it is small.
        features = torch.full((50, 1), 0.5)
        sizes, steps = set(), []
        for seed in range(8):
            batch = poisson_sample(SeededNoise(seed), 50, 0.1)
            sizes.add(len(batch))
            step = float(trained(sgd(rate=0.1, noise=0.0625), features, learning_rate=1.0, source=SeededNoise(seed)))
            steps.append(abs(-step - len(batch) * 0.5 / (0.1 * 50)))
        assert len(sizes) > 3
        assert max(steps) < 4 * 0.0625 / (0.1 * 50)

    def test_an_empty_batch_is_noised_stepped_and_charged_and_runs_no_model(self) -> None:
        def never(parameters: Tensor, features: Tensor, targets: Tensor) -> Tensor:
            raise AssertionError("many models cannot run on zero rows")

        features, rate = torch.ones(3, 4), 2.0**-20
        assert poisson_sample(SeededNoise(5), 3, rate).size == 0
        ours = trained(sgd(rate=rate), features, gradients=never, learning_rate=2.0**-10, source=SeededNoise(5))
        source = SeededNoise(5)
        source.words(3)
        drawn = discrete_gaussian(source, math.sqrt(2.0**40 + 1 / 12), 4) / 2**20
        expected = -(2.0**-10) * torch.from_numpy((drawn / (rate * 3)).astype(np.float32))
        assert torch.equal(ours, expected)
        assert int(torch.count_nonzero(ours)) == 4
        assert sgd(rate=rate).event(dimension=4, rng="os").count == 1

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    def test_a_record_whose_gradient_is_not_finite_contributes_nothing_and_raises_nothing(self, poison: float) -> None:
        poisoned, silent = numbers(6, 4).clone(), numbers(6, 4).clone()
        poisoned[2] = torch.tensor([1e30, poison, 1e30, 1e30])
        silent[2] = 0.0
        ours = trained(sgd(rate=1.0, steps=3), poisoned)
        assert torch.equal(ours, trained(sgd(rate=1.0, steps=3), silent))
        assert bool(torch.isfinite(ours).all())

    def test_a_model_that_overflows_on_one_record_still_trains(self) -> None:
        model = made(perceptron)
        features = numbers(9, 5).clone()
        features[4] = math.inf
        ours = trained(
            sgd(rate=1.0, steps=2),
            features,
            TARGETS,
            gradients=VmapGradients(model, cross_entropy),
            start=flat(model),
        )
        assert bool(torch.isfinite(ours).all())

    def test_gradients_that_are_all_zero_are_no_special_case(self) -> None:
        assert bool(torch.isfinite(trained(sgd(rate=1.0), torch.zeros(4, 3))).all())

    def test_weight_decay_acts_on_the_parameters_alone_and_touches_no_record(self) -> None:
        start, features = torch.tensor([2.0, -4.0]), torch.zeros(3, 2)
        plain = trained(sgd(), features, start=start, learning_rate=0.5)
        decayed = trained(sgd(), features, start=start, learning_rate=0.5, weight_decay=0.25)
        torch.testing.assert_close(plain - decayed, 0.5 * 0.25 * start, rtol=0, atol=1e-6)

    def test_no_global_generator_is_read_or_moved(self) -> None:
        # A seed of theirs would make the noise known.
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            results.append(trained(sgd(steps=3), numbers(6, 4)))
            assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(*results)

    @settings(max_examples=40, deadline=None)
    @given(
        clip=st.floats(1e-3, 1e3),
        changed=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=4, max_size=4),
        seed=st.integers(0, 2**16),
    )
    def test_no_record_moves_the_model_by_more_than_the_clip_norm_over_the_expected_batch(
        self, clip: float, changed: list[float], seed: int
    ) -> None:
        # Same batches, same noise, one record against an empty one in its place.
        features = numbers(6, 4)
        neighbour = torch.cat([features[:5], torch.tensor([changed])])
        empty = torch.cat([features[:5], torch.zeros(1, 4)])
        ours = sgd(clip=clip, noise=0.0625, rate=0.8)
        with_record, without = (
            trained(ours, f, source=SeededNoise(seed), learning_rate=1.0) for f in (neighbour, empty)
        )
        rounding = 1e-6 * float(with_record.abs().max())
        assert float((with_record - without).double().norm()) <= clip / (0.8 * 6) * (1 + 1e-5) + rounding


class TestPhysicalBatches:
    @pytest.mark.parametrize("rows", [1, 2, 3, 7, 1024])
    def test_the_sum_does_not_depend_on_how_a_batch_is_cut(self, rows: int) -> None:
        features = numbers(40, 5) * 3
        expected = trained(sgd(rate=0.7, steps=4), features)
        assert torch.equal(trained(sgd(rate=0.7, steps=4), features, physical_batch=rows), expected)

    @pytest.mark.parametrize("name", MODELS)
    def test_nor_does_a_model_trained_in_pieces_of_one(self, name: str) -> None:
        build, features = MODELS[name]
        results = []
        for rows in (1024, 1):
            model = made(build)
            gradients, ours = VmapGradients(model, cross_entropy), sgd(rate=0.7, steps=3)
            results.append(
                trained(ours, features, TARGETS, gradients=gradients, start=flat(model), physical_batch=rows)
            )
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)

    def test_no_piece_is_larger_than_stated(self) -> None:
        watch = Watch()
        trained(sgd(rate=1.0), torch.zeros(10, 2), gradients=watch, physical_batch=3)
        assert watch.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


class TestSampling:
    """Batches are Poisson samples by construction: a shuffled loader, accounted as one, is wrong by up to 17 times."""

    ROWS, RATE, STEPS = 30, 0.2, 3000

    @pytest.fixture(scope="class")
    def chosen(self) -> NDArray[np.int64]:
        """(steps, rows): 1 where a record was in a step's batch."""
        watch = Watch()
        ours = sgd(rate=self.RATE, steps=self.STEPS)
        trained(ours, torch.zeros(self.ROWS, 1), gradients=watch, source=SeededNoise(11))
        # A step with an empty batch asks for no gradients; its place does not matter here.
        table = np.zeros((self.STEPS, self.ROWS), np.int64)
        for step, batch in enumerate(watch.batches):
            table[step, batch] += 1
        assert table.max() == 1
        return table

    def test_every_record_is_in_each_batch_with_the_stated_rate(self, chosen: NDArray[np.int64]) -> None:
        p_values = [stats.binomtest(int(count), self.STEPS, self.RATE).pvalue for count in chosen.sum(axis=0)]
        assert min(p_values) * self.ROWS > ACCEPT
        total, draws = int(chosen.sum()), self.STEPS * self.ROWS
        assert stats.binomtest(total, draws, self.RATE).pvalue > ACCEPT
        for ratio in (0.95, 1.05):
            assert stats.binomtest(total, draws, self.RATE * ratio).pvalue < REJECT

    def test_batch_sizes_are_binomial_and_not_fixed(self, chosen: NDArray[np.int64]) -> None:
        sizes, spread = chosen.sum(axis=1), self.ROWS * self.RATE * (1 - self.RATE)
        assert float(np.var(sizes)) == pytest.approx(spread, rel=0.12)
        law = stats.binom(self.ROWS, self.RATE)
        observed = np.bincount(np.clip(sizes, 1, 12), minlength=13)[1:]
        expected = np.diff([0.0, *(float(law.cdf(k)) for k in range(1, 12)), 1.0]) * self.STEPS
        assert stats.chisquare(observed, expected).pvalue > ACCEPT

    def test_records_are_chosen_independently_within_a_batch_and_between_batches(
        self, chosen: NDArray[np.int64]
    ) -> None:
        # A fixed batch size would make every pair shun each other by 1/29, an epoch a record shun its last batch.
        within = np.corrcoef(chosen.T) - np.eye(self.ROWS)
        between = [np.corrcoef(chosen[:-1, row], chosen[1:, row])[0, 1] for row in range(self.ROWS)]
        deviation = 1 / math.sqrt(self.STEPS)
        assert abs(float(within.sum())) / (self.ROWS * (self.ROWS - 1)) < 4 * deviation / self.ROWS < 1 / 29
        assert float(np.abs(within).max()) < 6 * deviation
        assert float(np.abs(between).max()) < 5 * deviation


released: list[int] = []


class CountingSum(GaussianSum):
    """The mechanism, counting its releases."""

    def release(self, quantised: NDArray[np.int64], source: NoiseSource) -> NDArray[np.float64]:
        released.append(quantised.size)
        return super().release(quantised, source)


class TestAccounting:
    @pytest.fixture(autouse=True)
    def _count_from_zero(self) -> Iterator[None]:
        released.clear()
        yield
        released.clear()

    @pytest.mark.parametrize(("steps", "rate"), [(1, 1.0), (5, 0.5), (40, 0.001)])
    def test_the_event_charges_exactly_what_training_released(self, steps: int, rate: float) -> None:
        mechanism = CountingSum(clip_norm=0.5, noise_multiplier=2.0)
        ours = RecordLevelSgd(mechanism=mechanism, sampling_rate=rate, steps=steps)
        source = SeededNoise(1)
        trained(ours, torch.zeros(4, 3), source=source)
        event = ours.event(dimension=3, rng=source.kind)
        assert released == [3] * event.count  # Empty batches, too.
        assert (event.noise_multiplier, event.clip_norm) == (2.0, 0.5)
        assert (event.sampling_rate, event.rng) == (rate, "seeded-simulation")
        assert event == mechanism.event(sampling_rate=rate, count=steps, dimension=3, rng="seeded-simulation")

    def test_the_noise_that_training_adds_is_the_one_charged_and_3_percent_less_is_rejected(self) -> None:
        ours = sgd(clip=0.5, noise=2.0, rate=1.0)
        moved = trained(ours, torch.zeros(2, 400_000), learning_rate=1.0).double().numpy()
        charged = ours.event(dimension=400_000, rng="os")
        deviation = charged.noise_multiplier * charged.clip_norm / 2
        assert stats.kstest(moved / deviation, "norm", method="asymp").pvalue > ACCEPT
        for ratio in (0.97, 1.03):
            assert stats.kstest(moved / (ratio * deviation), "norm", method="asymp").pvalue < REJECT


class TestTrainable:
    @pytest.mark.parametrize(
        "layer",
        [
            nn.BatchNorm1d(4),
            nn.BatchNorm2d(4),
            nn.BatchNorm3d(4),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.LazyBatchNorm1d(),
            nn.SyncBatchNorm(4),
            nn.InstanceNorm1d(4, track_running_stats=True),
            nn.InstanceNorm2d(4, track_running_stats=True),
        ],
        ids=str,
    )
    def test_a_layer_that_mixes_or_keeps_records_is_refused_by_name_with_advice(self, layer: nn.Module) -> None:
        model = nn.Sequential()
        model.add_module("body", nn.Sequential(nn.Linear(4, 4), layer))
        with pytest.raises(JobError, match=rf"'body\.1' is a {type(layer).__name__}.*GroupNorm or LayerNorm") as caught:
            check_trainable(model)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "layer",
        [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm1d(4), nn.Dropout(), nn.Linear(4, 4), nn.Embedding(3, 4)],
        ids=str,
    )
    def test_a_layer_that_keeps_records_apart_is_accepted(self, layer: nn.Module) -> None:
        check_trainable(nn.Sequential(nn.Linear(4, 4), layer))

    def test_a_bare_layer_is_checked_as_well(self) -> None:
        with pytest.raises(JobError, match="BatchNorm1d"):
            check_trainable(nn.BatchNorm1d(3))
