"""A job's secure sum is planned alike by everyone, encodes exactly, and knows a sum that no honest sites have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.accountant import epsilon_pld
from privacy.errors import JobError, Refused
from privacy.noise import SeededNoise
from server.cohort import draw_cohort
from strategies.secure import SecureSum, groups_of, is_sound, rotation_of
from strategies.total import Layout
from tests.privacy.secagg.federation import roster_of
from tests.strategies.jobs import make_job

LAYOUT = Layout(20, ("loss",))
WHOLE = Layout(20)
SOURCE = SeededNoise(0, "test")
ROTATION = rotation_of(1, "cd" * 32)
CLIENT = {"client": {"placement": "distributed", "delta": 1e-3, "epsilon": 3.0, "clip_norm": 0.5}}


def distributed(**secure: object) -> SecureSum:
    job = make_job(strategy={"weighting": "equal"}, privacy=CLIENT, secure_aggregation=secure)
    return SecureSum.make(job, sites=12, layout=WHOLE)


class TestPlan:
    @pytest.mark.parametrize(
        ("sites", "secure", "threshold", "fewest"),
        [
            (3, {"colluders": 0}, 2, 3),
            (4, {}, 3, 4),
            (5, {}, 3, 4),
            (10, {}, 7, 8),
            (20, {}, 13, 14),
            (20, {"dropouts": 2}, 13, 18),
            (20, {"dropouts": 8}, 11, 12),
            (40, {"groups": 4}, 7, 8),
        ],
    )
    def test_threshold_and_fewest_follow_from_sites_colluders_and_dropouts(
        self, sites: int, secure: dict[str, object], threshold: int, fewest: int
    ) -> None:
        robust = {"reduce": "median" if "groups" in secure else "sum"}
        shape = SecureSum.make(make_job(secure_aggregation=secure, robust=robust), sites=sites, layout=LAYOUT).shape
        assert (shape.threshold, shape.minimum) == (threshold, fewest)
        assert 2 * shape.threshold > shape.degree

    @pytest.mark.parametrize(
        ("sites", "changes", "said"),
        [
            (3, {}, "at least 4 sites are needed, or fewer colluders"),
            (2, {"secure_aggregation": {"colluders": 0}}, "at least 3 sites"),
            (20, {"secure_aggregation": {"dropouts": 12}}, "threshold"),
            (20, {"secure_aggregation": {"groups": 7}, "robust": {"reduce": "median"}}, "a secure sum of 2 sites"),
            (9, {"cohort": {"size": 3}}, "a secure sum of 3 sites"),
            (9, {"cohort": {"minimum": 20}}, "at least 20 sites cannot come from 9"),
            (10, {"secure_aggregation": {"graph": "regular", "colluders": 7}}, "complete graph"),
        ],
    )
    def test_what_cannot_be_protected_is_refused_with_what_could(
        self, sites: int, changes: dict[str, object], said: str
    ) -> None:
        with pytest.raises(JobError, match="secure_aggregation: ") as caught:
            SecureSum.make(make_job(**{"secure_aggregation": {}, **changes}), sites=sites, layout=LAYOUT)
        assert said in str(caught.value)

    def test_a_site_and_the_server_come_to_the_same_terms(self) -> None:
        job, roster = make_job(secure_aggregation={}), roster_of(tuple(range(1, 6)))
        one, other = (SecureSum.make(job, sites=5, layout=LAYOUT).terms(job, roster) for _ in range(2))
        assert one == other
        assert one.cohorts == ((1, 2, 3, 4, 5),)

    def test_a_sampled_cohort_is_the_one_that_everybody_draws_for_the_round(self) -> None:
        job, roster = make_job(secure_aggregation={}, cohort={"size": 5}), roster_of(tuple(range(1, 9)))
        terms = SecureSum.make(job, sites=8, layout=LAYOUT).terms(job, roster)
        assert callable(terms.cohorts)
        for number in (1, 2):
            names = sorted(member.name for member in roster.members)
            asked = draw_cohort(names, job.cohort, seed=job.seed, round_number=number, secret=lambda n: SOURCE)
            assert terms.cohorts(number) == (tuple(sorted(roster.member(site).slot for site in asked)),)

    def test_a_cohort_of_more_than_there_are_is_everyone(self) -> None:
        job, roster = make_job(secure_aggregation={}, cohort={"size": 50}), roster_of(tuple(range(1, 9)))
        assert SecureSum.make(job, sites=8, layout=LAYOUT).terms(job, roster).cohorts == ((1, 2, 3, 4, 5, 6, 7, 8),)

    def test_sites_with_more_rows_than_the_reach_allows_are_told_before_they_train(self) -> None:
        job = make_job(secure_aggregation={})
        SecureSum.make(job, sites=8, layout=LAYOUT, most_rows=512)
        with pytest.raises(
            JobError, match=r"secure_aggregation\.reach: .* a site has 5000 of them: 8 times as many, 40000"
        ):
            SecureSum.make(job, sites=8, layout=LAYOUT, most_rows=5000)

    def test_local_noise_needs_to_be_known_or_given_a_reach(self) -> None:
        local = {"client": {"placement": "local", "delta": 1e-3, "epsilon": 3.0}}
        with pytest.raises(JobError, match=r"secure_aggregation\.reach: give it"):
            SecureSum.make(
                make_job(strategy={"weighting": "equal"}, privacy=local, secure_aggregation={}), sites=5, layout=WHOLE
            )
        known = {"client": {"placement": "local", "delta": 1e-3, "noise_multiplier": 2.0, "clip_norm": 0.5}}
        job = make_job(strategy={"weighting": "equal"}, privacy=known, secure_aggregation={})
        assert SecureSum.make(job, sites=5, layout=WHOLE).fixed.reach == 0.5 * 25


class TestEncoding:
    def test_a_sum_decodes_to_the_sum_of_the_contributions(self) -> None:
        plan = SecureSum.make(make_job(secure_aggregation={}), sites=6, layout=LAYOUT)
        rows = np.random.default_rng(0).normal(size=(6, LAYOUT.size)).astype(np.float32)
        total = plan.ring.zeros()
        for row in rows:
            plan.ring.add(total, plan.encode(row, rotation=ROTATION, source=SOURCE))
        got = plan.decode(total, rotation=ROTATION)
        np.testing.assert_allclose(got, rows.astype(np.float64).sum(axis=0), atol=6 * plan.fixed.step)

    def test_a_weight_beyond_the_reach_is_refused_and_not_clipped(self) -> None:
        plan = SecureSum.make(make_job(secure_aggregation={"reach": 2.0}), sites=6, layout=LAYOUT)
        with pytest.raises(Refused, match="overflow"):
            plan.encode(np.full(LAYOUT.size, 2.1, np.float32), rotation=ROTATION, source=SOURCE)

    @pytest.mark.parametrize("bits", [16, 20, 32])
    def test_distributed_noise_is_sized_for_the_fewest_honest_survivors(self, bits: int) -> None:
        plan = distributed(bits=bits, colluders=2, dropouts=1)
        assert plan.distributed is not None
        assert plan.distributed.noise.clients == plan.shape.minimum - 2 == 9
        event = plan.distributed.event(count=2, rng="os")
        assert 2.9 < epsilon_pld([event], 1e-3) <= 3.0

    def test_the_sum_of_distributed_contributions_carries_the_noise_of_all(self) -> None:
        plan = distributed()
        assert plan.distributed is not None
        update = np.concatenate([np.full(20, 0.01), [1.0]]).astype(np.float32)
        errors = []
        for trial in range(200):
            total = plan.ring.zeros()
            for site in range(12):
                words = plan.encode(update, rotation=ROTATION, source=SeededNoise(trial, f"site-{site}"))
                plan.ring.add(total, words)
            got = plan.decode(total, rotation=ROTATION)
            assert got[20] == 12
            errors.append(got[:20] - 12 * 0.01)
        noise = plan.distributed.noise
        ratio = np.var(errors) / (12 * noise.local_scale**2)
        assert 0.9 < ratio < 1.1
        # What the fewest honest survivors would leave, and what the accountant counts on, is less.
        assert np.var(errors) > noise.clients * noise.local_scale**2

    def test_sites_that_plan_alike_say_so_in_the_same_words(self) -> None:
        assert distributed().encoding == distributed().encoding
        assert distributed().encoding != distributed(bits=16).encoding
        other = make_job(secure_aggregation={"reach": 7.0})
        plain = make_job(secure_aggregation={})
        plans = [SecureSum.make(job, sites=5, layout=LAYOUT).encoding for job in (plain, other)]
        assert plans[0] != plans[1]


class TestRotation:
    def test_changes_with_round_and_model(self) -> None:
        rotations = {rotation_of(number, model) for number in (1, 2) for model in ("cd" * 32, "dc" * 32)}
        assert len(rotations) == 4
        assert {len(rotation) for rotation in rotations} == {32}


class TestGroups:
    @given(sites=st.integers(12, 60), groups=st.integers(3, 4))
    def test_every_site_is_in_one_of_groups_of_nearly_equal_size(self, sites: int, groups: int) -> None:
        job = make_job(secure_aggregation={"groups": groups}, robust={"reduce": "median"})
        names = [f"site-{number}" for number in range(sites)]
        split = groups_of(job, names)
        assert sorted(name for group in split for name in group) == sorted(names)
        assert max(map(len, split)) - min(map(len, split)) <= 1
        assert groups_of(job, names[::-1]) == split

    def test_another_seed_groups_otherwise(self) -> None:
        names = [f"site-{number}" for number in range(20)]
        jobs = [make_job(seed=seed, secure_aggregation={"groups": 4}, robust={"reduce": "median"}) for seed in (1, 2)]
        assert groups_of(jobs[0], names) != groups_of(jobs[1], names)


def sums_of(means: list[float], weight: float = 10.0) -> list[np.ndarray]:
    """Groups' sums whose update is everywhere `mean`, and whose loss is their number."""
    return [np.concatenate([np.full(20, mean * weight), [weight, 1.0]]) for mean in means]


class TestSoundness:
    @pytest.mark.parametrize(("weight", "equal", "sound"), [(0, None, False), (-3, None, False), (1e-6, None, True)])
    def test_a_sum_without_weight_is_none_of_honest_sites(self, weight: float, equal: int | None, sound: bool) -> None:
        assert is_sound(LAYOUT, sums_of([1.0], weight=weight)[0], equal_weights=equal) is sound

    @pytest.mark.parametrize("weight", [3.0, 5.0, -4.0, 4.0])
    def test_where_all_weigh_alike_the_weight_is_their_number(self, weight: float) -> None:
        assert is_sound(LAYOUT, sums_of([1.0], weight=weight)[0], equal_weights=4) is (weight == 4)
