"""The cohort of a round is a fair draw that anyone can repeat."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privacy.noise import OsNoise, SeededNoise
from server.cohort import draw_cohort, expected_size
from strategies.job import Cohort


def draw(sites: list[str], cohort: Cohort, *, seed: int = 0, number: int = 1) -> list[str]:
    return draw_cohort(sites, cohort, seed=seed, round_number=number, secret=lambda n: SeededNoise(seed, "secret", n))


SITES = [f"site-{k}" for k in range(10)]


@given(count=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 2**63 - 1), number=st.integers(1, 10**6))
def test_draws_distinct_sites_in_their_order_the_same_for_the_same_seed_and_round(
    count: int, size: int, seed: int, number: int
) -> None:
    sites = [f"site-{k}" for k in range(count)]
    cohort = draw(sites, Cohort(size=size), seed=seed, number=number)
    assert len(cohort) == min(size, count)
    assert [site for site in sites if site in set(cohort)] == cohort
    assert draw(sites, Cohort(size=size), seed=seed, number=number) == cohort


@pytest.mark.parametrize("size", [None, 10, 11])
def test_no_size_or_one_too_large_means_everyone(size: int | None) -> None:
    assert draw(SITES, Cohort(size=size), seed=1, number=1) == SITES


def test_rounds_and_seeds_draw_differently() -> None:
    draws = {tuple(draw(SITES, Cohort(size=5), seed=s, number=n)) for s in (1, 2) for n in (1, 2, 3, 4)}
    assert len(draws) > 6


def test_every_site_is_drawn_as_often_as_any_other() -> None:
    drawn = [site for n in range(1, 3001) for site in draw(SITES, Cohort(size=3), seed=7, number=n)]
    counts = [drawn.count(site) for site in SITES]
    assert sum(counts) == 9000
    # Seeded, so the verdict never changes. Draws of one round exclude each other, which makes the counts less spread.
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_seeded_draw_never_changes() -> None:
    # Pinned from the first release: a change here changes every simulated result.
    assert draw(SITES, Cohort(size=3), seed=7, number=2) == ["site-1", "site-2", "site-8"]


class TestSecretCoins:
    def test_every_site_is_drawn_by_its_own_coin(self) -> None:
        drawn = [draw(SITES, Cohort(rate=0.3), number=n) for n in range(1, 2001)]
        assert all([site for site in SITES if site in cohort] == cohort for cohort in drawn)
        sizes = [len(cohort) for cohort in drawn]
        # Binomial(10, 0.3): mean 3, variance 2.1, and an empty cohort 2.8 % of the time.
        assert sum(sizes) / 2000 == pytest.approx(3.0, abs=0.13)
        assert sum((size - 3) ** 2 for size in sizes) / 2000 == pytest.approx(2.1, abs=0.25)
        assert 30 < sizes.count(0) < 85
        assert stats.chisquare([sum(site in cohort for cohort in drawn) for site in SITES]).pvalue > 1e-3

    def test_the_public_seed_says_nothing_about_them(self) -> None:
        draws = [
            draw_cohort(SITES, Cohort(rate=0.5), seed=1, round_number=1, secret=lambda n: OsNoise()) for _ in range(20)
        ]
        assert len({tuple(cohort) for cohort in draws}) > 1


class TestTurns:
    @given(count=st.integers(1, 30), separation=st.integers(1, 30), seed=st.integers(0, 2**63 - 1))
    def test_every_site_has_its_turn_every_so_many_rounds(self, count: int, separation: int, seed: int) -> None:
        sites = [f"site-{k}" for k in range(count)]
        rounds = [draw(sites, Cohort(separation=separation), seed=seed, number=n) for n in range(1, 3 * separation + 1)]
        for site in sites:
            turns = [n for n, cohort in enumerate(rounds) if site in cohort]
            assert len(turns) == 3
            assert {later - earlier for earlier, later in itertools.pairwise(turns)} == {separation}
        sizes = {len(cohort) for cohort in rounds}
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("cohort", "size"),
    [
        (Cohort(), 10.0),
        (Cohort(size=4), 4.0),
        (Cohort(size=40), 10.0),
        (Cohort(rate=0.3), 3.0),
        (Cohort(separation=4), 2.5),
    ],
)
def test_the_expected_size_is_known_to_everyone(cohort: Cohort, size: float) -> None:
    assert expected_size(10, cohort) == pytest.approx(size)
