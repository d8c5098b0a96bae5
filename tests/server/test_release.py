"""Client-level privacy by noise on the sum: charged before anyone is asked, of the right size, whoever answers."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accountant import epsilon_pld
from privacy.budget import SiteBudget
from privacy.correlated import CorrelatedSum, prefix_sum_rmse
from privacy.errors import BudgetExceeded, FedchorusError, JobError, LedgerError, UnsupportedEvent
from privacy.events import CorrelatedEvent, GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import SERVER, Entry, Ledger
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum
from privacy.noise import SeededNoise
from server.release import CentralRelease, GridTotal, PlainRelease, ReleasePlan
from strategies.fedavg import FedAvg
from strategies.job import Job
from strategies.parameters import Vector
from strategies.protocol import ServerState
from strategies.total import BELOW_CLIP, Layout, Total
from tests.strategies.jobs import make_job
from tests.strategies.lent import Lent

PARAMETERS, CLIENTS = 40, 60
NAMES = [f"client-{k:02}" for k in range(CLIENTS)]
START = ServerState(np.zeros(PARAMETERS, np.float32))


def private_job(rounds: int = 4, *, cohort: dict[str, Any] | None = None, **client: Any) -> Job:
    return make_job(
        training={"rounds": rounds},
        strategy={"weighting": "equal"},
        cohort=cohort or {},
        privacy={"client": {"delta": 1e-3, "noise_multiplier": 2.0, **client}},
    )


def plan_of(job: Job, clients: int = CLIENTS, **known: Any) -> ReleasePlan:
    return ReleasePlan.make(job, clients=clients, parameters=PARAMETERS, rng="seeded-simulation", **known)


def layout_of(job: Job) -> Layout:
    client = job.privacy.client
    assert client is not None
    return Layout(PARAMETERS, (BELOW_CLIP,) if client.adaptive_clip is not None else ())


class Server:
    """A server with its ledger, driven by hand."""

    def __init__(self, folder: Path, job: Job, *, seed: int = 1, before: Sequence[Sequence[str]] = ()) -> None:
        self.job, self.plan = job, plan_of(job)
        folder.mkdir(exist_ok=True)
        path = folder / "identity.pem"
        self.key = IdentityKey.load(path) if path.exists() else IdentityKey.create(path)
        self.budget = SiteBudget(Ledger(folder / "server.jsonl", SERVER, self.key))
        self.release = CentralRelease(
            self.plan,
            job=job,
            layout=layout_of(job),
            budget=self.budget,
            noise=lambda number: SeededNoise(seed, number),
            asked_before=before,
        )
        self.release.open(simulation=True)

    @property
    def entries(self) -> tuple[Entry, ...]:
        self.budget.ledger.refresh()
        return self.budget.ledger.entries

    def round(
        self, state: ServerState, updates: Sequence[Vector], asked: Sequence[str] = ()
    ) -> tuple[ServerState, Total]:
        self.release.reserve(state, asked, None)
        total = self.release.total()
        for update in updates:
            total.add(contribution(update, layout_of(self.job)))
        return self.release.release(state, total)


def contribution(update: Vector, layout: Layout, *, below: float = 0.5) -> Vector:
    return np.concatenate([update, [1.0], [below] * len(layout.metrics)]).astype(np.float32)


def unit(position: int = 0, length: float = 1.0) -> Vector:
    vector = np.zeros(PARAMETERS, np.float32)
    vector[position] = length
    return vector


def steps_of(job: Job, updates: Sequence[Vector]) -> np.ndarray[Any, np.dtype[np.int64]]:
    total = GridTotal(layout_of(job), GaussianSum(clip_norm=1.0, noise_multiplier=2.0))
    for update in updates:
        total.add(contribution(update, layout_of(job)))
    return total.steps


class TestSensitivity:
    @settings(max_examples=50, deadline=None)
    @given(
        scale=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 7.0, 1e20, float("inf"), float("nan")]),
        seed=st.integers(0, 10**6),
        weight=st.sampled_from([1.0, 1000.0, -1.0, float("nan")]),
    )
    def test_one_client_moves_the_sum_by_at_most_the_clip_norm_whatever_it_sends(
        self, scale: float, seed: int, weight: float
    ) -> None:
        rng = np.random.default_rng(seed)
        others = [rng.normal(size=PARAMETERS).astype(np.float32) for _ in range(3)]
        with np.errstate(invalid="ignore", over="ignore"):
            extreme = (rng.normal(size=PARAMETERS) * scale).astype(np.float32)
        job = private_job()
        moved = steps_of(job, [*others, extreme]) - steps_of(job, others)
        assert float(np.sqrt((moved.astype(float) ** 2).sum())) <= STEPS_PER_CLIP

    def test_beside_nine_small_clients_a_large_one_moves_the_mean_by_at_most_clip_over_cohort(self) -> None:
        # Flower weights by rows: here one of 1000 rows among nine of 10 moves the mean by 0.917 of the clip norm.
        job = private_job()
        plan = ReleasePlan.make(job, clients=10, parameters=PARAMETERS, rng="seeded-simulation")
        small, large = [unit(k) for k in range(9)], unit(20, 1e6)
        mechanism = plan.mechanism
        assert isinstance(mechanism, GaussianSum)
        means = []
        for updates in (small, [*small, large]):
            total = GridTotal(layout_of(job), mechanism)
            for rows, update in zip([10] * 9 + [1000], updates, strict=False):
                # Whatever the strategy weighted by, and whatever weight stands in the contribution.
                trained = (update / 10).astype(np.float32)
                out = np.empty(PARAMETERS, np.float32)
                local = Lent(goal=trained, arrives=trained, rows=rows)
                added = FedAvg(weighting="rows").contribution(np.zeros_like(trained), local, out)
                sent = np.concatenate([out, [added.weight]]).astype(np.float32)
                total.add(sent)
            released = mechanism.release(total.steps, SeededNoise(5, "the same noise"))
            means.append(Total.of(layout_of(job), released, plan.cohort).update / plan.cohort)
        assert plan.cohort == 10
        assert float(np.linalg.norm(means[1] - means[0])) <= mechanism.clip_norm / plan.cohort


class TestRelease:
    def test_the_noise_has_the_right_size_and_the_denominator_is_the_expected_cohort(self, tmp_path: Path) -> None:
        job = private_job(40, cohort={"rate": 0.25}, clip_norm=0.5)
        server, state = Server(tmp_path, job), START
        released = []
        for _ in range(40):
            state, total = server.round(state, [unit(3, 0.25)] * 10)
            released.append(total.update)
            state = FedAvg(weighting="equal").step(state, total)
            assert total.weight == 0.25 * CLIENTS
        noise = np.array(released) - 10 * unit(3, 0.25)
        # 1600 draws of N(0, (2 x 0.5)^2): the standard error of the variance is 0.035.
        assert float(noise.mean()) == pytest.approx(0.0, abs=0.1)
        assert float(noise.var()) == pytest.approx(1.0, abs=0.14)
        assert np.isclose(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1], 0.0, atol=0.1)

    def test_an_empty_cohort_releases_noise_like_any_other(self, tmp_path: Path) -> None:
        job = private_job(30, cohort={"rate": 0.1})
        server, state, released = Server(tmp_path, job), START, []
        for _ in range(30):
            state, total = server.round(state, [])
            assert total.weight == 0.1 * CLIENTS
            released.append(total.update)
            state = FedAvg(weighting="equal").step(state, total)
        assert float(np.array(released).std()) == pytest.approx(2.0, rel=0.08)

    def test_what_is_released_is_on_the_grid(self, tmp_path: Path) -> None:
        _, total = Server(tmp_path, private_job()).round(START, [unit(1, 0.123456789)])
        steps = total.update * STEPS_PER_CLIP
        np.testing.assert_array_equal(steps, np.rint(steps))

    def test_each_round_is_reserved_before_anyone_is_asked_and_committed_before_the_step(self, tmp_path: Path) -> None:
        server = Server(tmp_path, private_job())
        assert [e.kind for e in server.entries] == ["open", "plan"]
        server.release.reserve(START, [], None)
        assert [e.kind for e in server.entries] == ["open", "plan", "reserve"]
        server.release.release(START, server.release.total())
        assert [e.kind for e in server.entries] == ["open", "plan", "reserve", "commit"]

    def test_a_crash_within_a_round_has_spent_it(self, tmp_path: Path) -> None:
        job = private_job(1, spare_rounds=1)
        Server(tmp_path, job).release.reserve(START, [], None)
        again = Server(tmp_path, job)
        again.round(START, [])
        with pytest.raises(BudgetExceeded, match="more than the plan's 2 rounds"):
            Server(tmp_path, job).release.reserve(START, [], None)
        one = epsilon_pld([again.plan.event], 1e-3)
        assert again.release.epsilon() == pytest.approx(epsilon_pld([again.plan.event] * 2, 1e-3))
        assert again.release.epsilon() > one

    def test_without_client_level_privacy_the_sum_is_what_it_is(self) -> None:
        plain = PlainRelease(Layout(2))
        total = plain.total()
        total.add(np.array([1, 2, 3], np.float32))
        assert plain.reserve(START, [], None) is None
        assert plain.release(START, total) == (START, total)
        assert plain.head is None


class TestPlan:
    def test_the_noise_reaches_the_target_for_all_rounds_together(self) -> None:
        job = private_job(20, noise_multiplier=None, epsilon=4.0, cohort={"rate": 0.2})
        plan = plan_of(job)
        assert 3.9 < epsilon_pld([plan.event] * 20, 1e-3) <= 4.0
        assert plan_of(job, noise_multiplier=plan.noise_multiplier) == plan

    def test_only_secret_coins_amplify(self) -> None:
        secret = plan_of(private_job(20, noise_multiplier=None, epsilon=4.0, cohort={"rate": 0.2}))
        public = plan_of(private_job(20, noise_multiplier=None, epsilon=4.0, cohort={"size": 12}))
        everyone = plan_of(private_job(20, noise_multiplier=None, epsilon=4.0))
        assert secret.cohort == public.cohort == 12
        assert secret.noise_multiplier < public.noise_multiplier == everyone.noise_multiplier
        assert isinstance(public.event, GaussianEvent)
        assert public.event.sampling_rate == 1.0

    @pytest.mark.parametrize(
        ("job", "clients", "said"),
        [
            (private_job(delta=0.02), 50, "privacy.client.delta: 0.02 is not below 1/50"),
            (private_job(epsilon=0.5), 60, "the job's limit is 0.5; not one round fits"),
            (private_job(clip_norm=2.0**101), 60, "clip_norm must lie in"),
            (
                private_job(adaptive_clip={"bit_noise": 1.0}),
                60,
                "privacy.client.adaptive_clip.bit_noise: 1 is not more than half",
            ),
            (private_job(noise="banded", cohort={"separation": 4}, noise_multiplier=2.0**19), 60, "at most 2\\^12"),
        ],
    )
    def test_what_cannot_be_private_is_refused_before_anything_is_written(
        self, job: Job, clients: int, said: str
    ) -> None:
        with pytest.raises(FedchorusError, match=said):
            plan_of(job, clients)


class TestAdaptiveClip:
    def test_the_clip_norm_follows_the_updates_and_is_kept(self, tmp_path: Path) -> None:
        job = private_job(30, adaptive_clip={"learning_rate": 0.5}, clip_norm=8.0, noise_multiplier=1.0)
        server, state, clips = Server(tmp_path, job), START, []
        for _ in range(30):
            clip = server.release.reserve(state, [], None)
            clips.append(clip)
            total = server.release.total()
            for length in np.linspace(0.5, 1.5, CLIENTS):
                below = 0.5 if length <= clip else -0.5
                total.add(contribution(unit(0, length), layout_of(job), below=below))
            state, released = server.release.release(state, total)
            state = FedAvg(weighting="equal").step(state, released)
        assert clips[0] == 8.0
        assert 0.75 < np.mean(clips[-8:]) < 1.25  # The median of the norms is 1.
        reserved = [e.body["clip_norm"] for e in server.entries if e.kind == "reserve"]
        assert reserved == clips
        resumed = Server(tmp_path, job)
        assert resumed.entries == server.entries

    def test_both_releases_together_cost_what_was_planned(self) -> None:
        plan = plan_of(private_job(adaptive_clip={"bit_noise": 3.0}))
        event, mechanism = plan.event, plan.mechanism
        assert isinstance(event, GaussianEvent)
        assert isinstance(mechanism, GaussianSum)
        assert event.noise_multiplier == 2.0
        assert event.quantile_noise == 3.0
        # Two Gaussians of one sample: mu adds in squares, and that of the bit is 1/2 over its noise.
        assert mechanism.noise_multiplier**-2 + (2 * 3.0) ** -2 == pytest.approx(2.0**-2)

    def test_a_lying_bit_counts_as_one_bit(self) -> None:
        layout = layout_of(private_job(adaptive_clip={}))
        total = GridTotal(layout, GaussianSum(clip_norm=1.0, noise_multiplier=2.0))
        for below in (1e9, float("nan"), -3.0, 0.5):
            total.add(contribution(unit(), layout, below=below))
        assert abs(int(total.bits[0])) <= 4  # Two above and two below, each one half on a grid rounded toward zero.


class TestCorrelated:
    @pytest.mark.parametrize("noise", ["banded", "bsr", "blt"])
    def test_the_whole_training_is_one_reservation_with_a_commit_a_round(self, noise: str, tmp_path: Path) -> None:
        job = private_job(8, noise=noise, cohort={"separation": 4})
        server, state = Server(tmp_path, job), START
        for number in range(8):
            asked = [name for k, name in enumerate(NAMES) if k % 4 == number % 4]
            state, total = server.round(state, [unit()] * 15, asked)
            assert total.weight == CLIENTS / 4
            state = FedAvg(weighting="equal").step(state, total)
        assert [e.kind for e in server.entries] == ["open", "plan", "reserve", *["commit"] * 8]
        assert isinstance(server.plan.event, CorrelatedEvent)
        # noise_multiplier 2 of the whole: one Gaussian of mu 1/2.
        one = GaussianEvent(noise_multiplier=2.0, clip_norm=1.0, sampling_rate=1.0, count=1, rng="os")
        assert server.release.epsilon() == pytest.approx(epsilon_pld([one], 1e-3), rel=1e-6)

    def test_no_round_beyond_the_training_is_committed(self, tmp_path: Path) -> None:
        server = Server(tmp_path, private_job(8, noise="bsr", cohort={"separation": 4}))
        server.release.reserve(START, [], None)
        (reservation,) = (entry for entry in server.entries if entry.kind == "reserve")
        for number in (9, 0, -1):
            with pytest.raises(LedgerError, match="of a training whose noise is for 8"):
                server.budget.commit(reservation, output="0" * 64, round_number=number)

    def test_prefix_sums_err_as_predicted_and_less_than_with_independent_noise(self, tmp_path: Path) -> None:
        job = private_job(12, noise="banded", cohort={"separation": 4}, noise_multiplier=1.0)
        squares = []
        for seed in range(8):
            server, state, sums = Server(tmp_path / str(seed), job, seed=seed), START, np.zeros(PARAMETERS)
            for number in range(12):
                state, total = server.round(state, [], [n for k, n in enumerate(NAMES) if k % 4 == number % 4])
                sums = sums + total.update
                squares.append(sums**2)
                state = FedAvg(weighting="equal").step(state, total)
        mechanism = server.plan.mechanism
        assert isinstance(mechanism, CorrelatedSum)
        predicted = prefix_sum_rmse(mechanism.strategy.coefficients(12), mechanism.participation)
        independent = prefix_sum_rmse(np.ones(1), mechanism.participation)
        assert float(np.sqrt(np.mean(squares))) == pytest.approx(predicted, rel=0.08)
        assert predicted < 0.8 * independent

    def test_a_client_that_comes_back_too_early_ends_the_run_before_it_is_asked(self, tmp_path: Path) -> None:
        server = Server(tmp_path, private_job(8, noise="bsr", cohort={"separation": 4}))
        state, total = server.round(START, [], ["client-00"])
        state = FedAvg(weighting="equal").step(state, total)
        with pytest.raises(UnsupportedEvent):
            server.release.reserve(state, ["client-00"], None)

    def test_a_resumed_run_continues_the_same_noise_and_counts(self, tmp_path: Path) -> None:
        job, turns = private_job(8, noise="banded", cohort={"separation": 4}), itertools.count()
        asked = [[name for k, name in enumerate(NAMES) if k % 4 == n % 4] for n in range(8)]
        whole, state, straight = Server(tmp_path / "whole", job), START, []
        for number in range(8):
            state, total = whole.round(state, [unit(next(turns) % 3)], asked[number])
            state = FedAvg(weighting="equal").step(state, total)
            straight.append(total.update)
        turns, state, resumed = itertools.count(), START, []
        for number in range(8):
            server = Server(tmp_path / "parts", job, before=asked[:number])
            state, total = server.round(state, [unit(next(turns) % 3)], asked[number])
            state = FedAvg(weighting="equal").step(state, total)
            resumed.append(total.update)
        np.testing.assert_array_equal(straight, resumed)

    def test_a_round_that_was_released_is_never_released_again(self, tmp_path: Path) -> None:
        job = private_job(8, noise="banded", cohort={"separation": 4})
        Server(tmp_path, job).round(START, [], ["client-00"])
        with pytest.raises(JobError, match="round 1 was released before"):
            Server(tmp_path, job).release.reserve(START, ["client-00"], None)
