"""Faults of other libraries, each shown on the library itself where it is installed, and shown not to be ours."""

import math
import warnings
from typing import Any

import numpy as np
import pytest

from privacy.accountant import epsilon, epsilon_pld
from privacy.adaptive_clip import AdaptiveClip
from privacy.errors import JobError, UnsupportedEvent
from privacy.events import GaussianEvent, event_from_dict
from privacy.mechanism import STEPS_PER_CLIP, GaussianSum, clip_in_place
from privacy.noise import OsNoise
from strategies.total import Layout, Total
from tests.strategies.jobs import make_job


def flower_clip(update: list[float], clip_norm: float) -> Any:
    from flwr.supercore.differential_privacy import clip_inputs_inplace

    arrays = [np.array(update)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip_inputs_inplace(arrays, clip_norm)
    return arrays[0]


def our_clip(update: list[float], clip_norm: float) -> Any:
    array = np.array(update, np.float32)
    clip_in_place(array, clip_norm)
    return array


def event(**settings: Any) -> GaussianEvent:
    return GaussianEvent(clip_norm=1.0, rng="os", **settings)


class TestClipping:
    def test_one_nan_does_not_let_a_huge_update_pass_unclipped(self) -> None:
        update = [math.nan, 1e6, -1e6]
        assert np.nanmax(np.abs(flower_clip(update, 1.0))) == 1e6
        assert not our_clip(update, 1.0).any()
        steps = GaussianSum(clip_norm=1.0, noise_multiplier=1.0).quantised_sum(np.array([update], np.float32))
        assert not steps.any()

    def test_an_infinity_does_not_poison_the_sum(self) -> None:
        assert np.isnan(flower_clip([math.inf, 1.0], 1.0)).any()
        assert not our_clip([math.inf, 1.0], 1.0).any()

    def test_an_update_of_zeros_does_not_crash_the_round(self) -> None:
        from flwr.supercore.differential_privacy import clip_inputs_inplace

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((ZeroDivisionError, RuntimeWarning)):
                clip_inputs_inplace([np.zeros(3)], 1.0)
        assert not our_clip([0.0, 0.0, 0.0], 1.0).any()

    def test_rows_are_no_weight_and_the_number_that_answered_no_denominator(self) -> None:
        # Nine clients of 10 rows and one of 1000, averaged by rows: one moves the mean by 0.917 of the clip norm, while
        # the noise was sized for a tenth of it.
        rows = [10] * 9 + [1000]
        assert max(rows) / sum(rows) == pytest.approx(0.917, abs=1e-3)
        with pytest.raises(JobError, match="counts every client alike"):
            make_job(strategy={"weighting": "rows"}, privacy={"client": {"delta": 1e-3, "noise_multiplier": 1.0}})
        total = Total.of(Layout(3), np.ones(3), weight=10.0)
        assert float((total.update / total.weight)[0]) == 0.1  # Ten are expected, whoever came.


class TestAccounting:
    def test_a_sample_of_fixed_size_under_replace_one_is_not_charged_as_if_only_one_side_moved(self) -> None:
        from flwr.supercore import privacy_accounting as flower
        from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

        config = flower.PrivacyConfig(
            1e-5, 60_000, flower.NeighboringRelation.REPLACE_ONE, flower.SamplingMethod.WITHOUT_REPLACEMENT
        )
        accountant = RdpAccountant(config)
        accountant.compose(flower.GaussianPrivacyEvent(1.0, 600, 60_000), 1000)
        assert accountant.get_epsilon(1e-5) < 3.6  # A pair that attains 13.361 exists.
        settings: dict[str, Any] = {"scheme": "without_replacement", "adjacency": "replace_one"}
        ours = epsilon([event(noise_multiplier=1.0, sampling_rate=0.01, count=1000, **settings)], 1e-5)
        assert min(ours.pld, ours.rdp) > 13.358

    def test_a_neighbour_relation_never_passes_without_the_shift_that_it_means(self) -> None:
        # dp-accounting's RDP and PLD disagree on what a noise of 1 means under replace-one: 4.7285 and 9.9973.
        replaced = event(noise_multiplier=1.0, sampling_rate=1.0, scheme="none", adjacency="replace_one", count=1)
        ours = epsilon([replaced], 1e-5)
        assert ours.exact == pytest.approx(9.9973, abs=1e-4)
        assert ours.rdp == pytest.approx(10.7255, abs=1e-3)  # Of the same shift.

    def test_shuffled_batches_are_not_charged_as_poisson(self) -> None:
        from opacus.accountants.rdp import RDPAccountant

        poisson = RDPAccountant()
        poisson.history = [(1.0, 0.1, 100)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert poisson.get_epsilon(1e-5) == pytest.approx(7.899, abs=1e-3)  # What Opacus reports for a shuffle.
        shuffled = event(noise_multiplier=1.0, sampling_rate=1.0, scheme="none", count=10)
        assert epsilon_pld([shuffled], 1e-5) == pytest.approx(17.857, abs=1e-3)
        with pytest.raises(UnsupportedEvent, match=r"sampling\.scheme"):
            event_from_dict({**shuffled.as_dict(), "sampling": {"scheme": "shuffled", "rate": 0.1}})

    def test_the_central_limit_is_no_bound(self) -> None:
        from opacus.accountants.gdp import GaussianAccountant

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            limit = GaussianAccountant()
        limit.history = [(0.6, 1e-5, 100_000)]
        tiny = event(noise_multiplier=0.6, sampling_rate=1e-5, count=100_000)
        assert limit.get_epsilon(1e-8) < 0.06
        assert epsilon_pld([tiny], 1e-8) > 0.253  # A proven lower bound.

    def test_a_local_sigma_follows_from_the_clip_and_holds_at_every_epsilon(self) -> None:
        # The textbook formula is for one release, proved below an epsilon of 1, of a sensitivity that is typed in.
        def textbook(target: float, delta: float) -> float:
            return math.sqrt(2 * math.log(1.25 / delta)) / target

        assert epsilon_pld([event(noise_multiplier=textbook(10.0, 1e-5), sampling_rate=1.0, count=1)], 1e-5) > 10.0
        assert {"sensitivity", "epsilon"}.isdisjoint(GaussianEvent.__dataclass_fields__)

    def test_the_bit_of_an_adaptive_clip_moves_by_a_half(self) -> None:
        # Opacus counts 0 or 1 with noise 1 and charges it as if it were ±1/2: at noise 1 the whole is 0.756, not 1.
        clip = AdaptiveClip(initial=1.0, bit_noise=1.0)
        update = clip.update_noise_multiplier(1.0)
        theirs = (update**-2 + (1.0 / 1.0) ** 2) ** -0.5
        ours = (update**-2 + (0.5 / 1.0) ** 2) ** -0.5
        assert theirs == pytest.approx(0.756, abs=1e-3)
        assert ours == pytest.approx(1.0)


def test_noise_is_not_drawn_from_a_generator_that_anyone_can_seed() -> None:
    mechanism, source = GaussianSum(clip_norm=1.0, noise_multiplier=1.0), OsNoise()
    draws = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002 (what a library that uses the global generator would follow)
        draws.append(mechanism.release(np.zeros(8, np.int64), source))
    assert not np.array_equal(draws[0], draws[1])
    assert np.abs(draws[0] * STEPS_PER_CLIP - np.rint(draws[0] * STEPS_PER_CLIP)).max() == 0
