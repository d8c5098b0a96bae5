"""One table becomes disjoint sites: exactly the mix that was asked for, or a Dirichlet draw that anyone can repeat."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from client.data import Records
from privacy.errors import JobError
from simulations.partition import partition
from strategies.job import Partition


def table(*class_sizes: int) -> Records:
    """Rows that carry their own number as the only feature, so many of each class, shuffled."""
    target = np.repeat(np.arange(len(class_sizes)), class_sizes)
    np.random.default_rng(0).shuffle(target)
    return Records(np.arange(len(target), dtype=np.float32)[:, None], target.astype(np.int64))


def how(**fields: Any) -> Partition:
    return Partition.model_validate(fields)


def rows_of(sites: dict[str, Records]) -> list[int]:
    return [int(row) for records in sites.values() for row in records.features[:, 0]]


def assert_rows_kept_their_class(sites: dict[str, Records], records: Records) -> None:
    for site in sites.values():
        np.testing.assert_array_equal(site.target, records.target[site.features[:, 0].astype(int)])


class TestMix:
    @settings(max_examples=50, deadline=None)
    @given(
        wanted=st.dictionaries(
            st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1
        ),
        seed=st.integers(0, 2**63 - 1),
    )
    def test_every_site_gets_the_rows_and_positives_it_asked_for_or_no_site_gets_any(
        self, wanted: dict[str, tuple[int, float]], seed: int
    ) -> None:
        records = table(150, 100)
        mix = how(mix={name: {"rows": rows, "positive": share} for name, (rows, share) in wanted.items()})
        positives = {name: round(rows * share) for name, (rows, share) in wanted.items()}
        negatives = {name: rows - positives[name] for name, (rows, _) in wanted.items()}
        if sum(positives.values()) > 100 or sum(negatives.values()) > 150:
            with pytest.raises(
                JobError, match=r"^simulation\.partition\.mix\.[a-z]+: \d+ rows of class [01] are wanted"
            ):
                partition(records, mix, seed=seed)
            return
        sites = partition(records, mix, seed=seed)
        assert list(sites) == list(wanted)
        assert {name: int(site.target.sum()) for name, site in sites.items()} == positives
        assert {name: len(site) for name, site in sites.items()} == {name: rows for name, (rows, _) in wanted.items()}
        assert len(set(rows_of(sites))) == len(rows_of(sites))
        assert_rows_kept_their_class(sites, records)
        again = partition(records, mix, seed=seed)
        assert rows_of(again) == rows_of(sites)

    def test_another_seed_deals_other_rows(self) -> None:
        mix = how(mix={"a": {"rows": 40, "positive": 0.5}})
        first, second = (partition(table(100, 100), mix, seed=seed) for seed in (1, 2))
        assert rows_of(first) != rows_of(second)

    def test_a_mix_can_take_every_row(self) -> None:
        sites = partition(
            table(30, 20), how(mix={"a": {"rows": 25, "positive": 0.4}, "b": {"rows": 25, "positive": 0.4}}), seed=1
        )
        assert sorted(rows_of(sites)) == list(range(50))

    @pytest.mark.parametrize(
        ("records", "mix", "said"),
        [
            (table(10, 5), {"a": {"rows": 12, "positive": 0.5}}, "mix.a: 6 rows of class 1 are wanted, 5 are left"),
            (table(5, 10), {"a": {"rows": 12, "positive": 0.5}}, "mix.a: 6 rows of class 0 are wanted, 5 are left"),
            (
                table(10, 10),
                {"a": {"rows": 10, "positive": 0.8}, "b": {"rows": 10, "positive": 0.4}},
                "mix.b: 4 rows of class 1 are wanted, 2 are left; lower its rows or change its share of positives",
            ),
            (table(5, 5, 5), {"a": {"rows": 4, "positive": 0.5}}, "mix needs a target of two classes; use clients and"),
        ],
    )
    def test_a_mix_the_table_cannot_give_is_refused_by_site(
        self, records: Records, mix: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(JobError) as caught:
            partition(records, how(mix=mix), seed=1)
        assert str(caught.value).startswith("simulation.partition.mix")
        assert said in str(caught.value)


class TestDirichlet:
    @settings(max_examples=40, deadline=None)
    @given(
        clients=st.integers(1, 12),
        alpha=st.floats(0.05, 100),
        least=st.integers(4, 20),
        classes=st.integers(1, 4),
        seed=st.integers(0, 2**63 - 1),
    )
    def test_every_row_goes_to_one_client_and_every_client_gets_enough(
        self, clients: int, alpha: float, least: int, classes: int, seed: int
    ) -> None:
        assume(clients * least <= 60 * classes and (alpha > 0.5 or clients <= 3))
        records = table(*[60] * classes)
        try:
            sites = partition(records, how(clients=clients, alpha=alpha, least_rows=least), seed=seed)
        except JobError:
            assert clients * least > 30 * classes or alpha < 1
            return
        assert len(sites) == clients
        assert sorted(rows_of(sites)) == list(range(60 * classes))
        assert min(len(site) for site in sites.values()) >= least
        assert_rows_kept_their_class(sites, records)
        again = partition(records, how(clients=clients, alpha=alpha, least_rows=least), seed=seed)
        assert [rows_of({name: site}) for name, site in again.items()] == [
            rows_of({name: site}) for name, site in sites.items()
        ]

    def test_another_seed_deals_otherwise(self) -> None:
        first, second = (partition(table(100, 100), how(clients=3), seed=seed) for seed in (1, 2))
        assert rows_of(first) != rows_of(second)

    def test_a_large_alpha_is_even_and_a_small_one_is_not(self) -> None:
        records = table(500, 500)

        def shares(alpha: float) -> list[float]:
            sites = partition(records, how(clients=5, alpha=alpha, least_rows=4), seed=3)
            return [float(site.target.mean()) for site in sites.values()]

        assert all(abs(share - 0.5) < 0.05 for share in shares(1000.0))
        assert max(abs(share - 0.5) for share in shares(0.1)) > 0.3

    @pytest.mark.parametrize(("clients", "names"), [(2, ["client-0", "client-1"]), (11, ["client-00", "client-10"])])
    def test_names_sort_in_the_order_of_their_numbers(self, clients: int, names: list[str]) -> None:
        sites = partition(table(200, 200), how(clients=clients, alpha=10), seed=1)
        assert list(sites) == sorted(sites)
        assert [min(sites), max(sites)] == names

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"clients": 7, "least_rows": 8}, "50 rows cannot give 7 clients 8 rows each; at most 6 clients fit"),
            ({"clients": 51, "least_rows": 4}, "50 rows cannot give 51 clients 4 rows each; at most 12 clients fit"),
            ({"clients": 6, "alpha": 1e-3}, "no draw of 1000 gave every one of 6 clients 8 rows at alpha = 0.001"),
        ],
    )
    def test_a_draw_the_table_cannot_give_is_refused_with_what_would_fit(
        self, fields: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(JobError) as caught:
            partition(table(30, 20), how(**fields), seed=1)
        assert str(caught.value).startswith("simulation.partition: ")
        assert said in str(caught.value)


@pytest.mark.parametrize("columns", [1, 2], ids=["numbers", "times"])
def test_a_number_is_spread_by_its_tenth_of_all(columns: int) -> None:
    value = np.random.default_rng(0).permutation(400).astype(np.float32)
    target = value if columns == 1 else np.stack([value, np.ones(400, np.float32)], axis=1)
    records = Records(value[:, None], target)
    sites = partition(records, Partition(clients=4, alpha=0.1), seed=3)
    assert sorted(v for site in sites.values() for v in site.features.ravel().tolist()) == sorted(value.tolist())
    means = [float(site.features.mean()) for site in sites.values()]
    assert max(means) - min(means) > 50  # Uneven sites differ in what is to be predicted.
    with pytest.raises(JobError, match="needs a target of two classes"):
        partition(records, Partition.model_validate({"mix": {"a": {"rows": 4, "positive": 0.5}}}), seed=3)
