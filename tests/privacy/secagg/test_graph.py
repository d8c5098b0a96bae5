"""Every client derives the same graph, and the published parameters keep what they promise."""

import math
import random
from itertools import combinations
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privacy.errors import JobError
from privacy.secagg.graph import GraphParameters, complete_threshold, graph_parameters, harary, tolerated_dropouts

Adversary = Literal["semi-honest", "semi-malicious"]

members_of = st.lists(st.integers(1, 2**16), min_size=1, max_size=30, unique=True)
seeds = st.binary(min_size=32, max_size=32)


def connected(graph: dict[int, tuple[int, ...]], without: set[int]) -> bool:
    left = set(graph) - without
    reached, frontier = set[int](), [min(left)]
    while frontier:
        member = frontier.pop()
        if member not in reached:
            reached.add(member)
            frontier += [other for other in graph[member] if other in left]
    return reached == left


class TestHarary:
    @settings(deadline=None)
    @given(members_of, st.integers(1, 20), seeds, st.randoms(use_true_random=False))
    def test_is_regular_and_mutual_and_the_same_for_every_order_of_the_members(
        self, members: list[int], half: int, seed: bytes, shuffle: random.Random
    ) -> None:
        graph = harary(members, degree=2 * half, seed=seed)
        assert list(graph) == sorted(members)
        for member, neighbours in graph.items():
            assert len(neighbours) == min(2 * half, len(members) - 1)
            assert list(neighbours) == sorted(set(neighbours) - {member})
            assert all(member in graph[other] for other in neighbours)
        shuffle.shuffle(members)
        assert harary(members, degree=2 * half, seed=seed) == graph

    @settings(max_examples=30, deadline=None)
    @given(st.integers(6, 9), st.sampled_from([2, 4]), seeds)
    def test_no_fewer_than_its_degree_missing_members_cut_it_in_two(self, size: int, degree: int, seed: bytes) -> None:
        graph = harary(range(1, size + 1), degree=degree, seed=seed)
        assert all(connected(graph, set(gone)) for gone in combinations(graph, degree - 1))
        assert not all(connected(graph, set(gone)) for gone in combinations(graph, degree)) or size <= degree + 2

    def test_four_members_on_a_ring_checked_by_hand(self) -> None:
        # printf 'fedchorus secagg graph v1\0\1\0\0\0' | sha256sum gives 4e71.. for member 1 (and an empty seed); in
        # the same way 2 has dbdf.., 3 has 2473.. and 4 has cfcb..: the ring is 3, 1, 4, 2.
        assert harary([1, 2, 3, 4], degree=2, seed=b"") == {1: (3, 4), 2: (3, 4), 3: (1, 2), 4: (1, 2)}

    @pytest.mark.parametrize("members", [[5, 1, 3, 2, 4], [4, 1, 3, 2], [2, 1]])
    @pytest.mark.parametrize("more", [0, 1, 100])
    def test_a_degree_of_all_others_is_the_complete_graph(self, members: list[int], more: int) -> None:
        graph = harary(members, degree=len(members) - 1 + more, seed=b"s" * 32)
        assert graph == {member: tuple(sorted(set(members) - {member})) for member in members}

    def test_every_pair_is_joined_equally_often_over_the_seeds(self) -> None:
        joined = dict.fromkeys(combinations(range(1, 9), 2), 0)
        for number in range(2000):
            for member, neighbours in harary(range(1, 9), degree=2, seed=number.to_bytes(32, "little")).items():
                for other in neighbours:
                    if member < other:
                        joined[member, other] += 1
        expected = 2000 * 8 / len(joined)
        # 27 degrees of freedom: 99.9999 % of such sums are below 77. (Edges exclude each other, which lowers it.)
        assert sum((count - expected) ** 2 / expected for count in joined.values()) < 77

    @pytest.mark.parametrize(
        ("members", "degree"),
        [([1, 2, 2], 2), ([1, 2, 3, 4], 0), ([1, 2, 3, 4], -2), ([1, 2, 3, 4, 5, 6], 3), ([-1, 1], 2), ([2**32, 1], 2)],
    )
    def test_graphs_that_do_not_exist_are_refused(self, members: list[int], degree: int) -> None:
        with pytest.raises(JobError, match=r"distinct numbers|must be even"):
            harary(members, degree=degree, seed=b"s" * 32)


def tail(population: int, marked: int, sample: int, least: int) -> tuple[int, int]:
    """P[at least `least` of the sample are marked], as an exact fraction."""
    ways = range(max(least, 0), min(sample, marked) + 1)
    return sum(math.comb(marked, i) * math.comb(population - marked, sample - i) for i in ways), math.comb(
        population, sample
    )


def is_safe(
    clients: int, colluding: int, lost: int, adversary: Adversary, bits: tuple[int, int], parameters: GraphParameters
) -> bool:
    """The three published conditions, in whole numbers."""
    degree, threshold = parameters.degree, parameters.threshold
    missing, security, failure = colluding + lost, 2 ** (bits[0] + 1), 2 ** bits[1]
    whole: bool = clients * (clients - degree - 1) * math.comb(missing, degree) * security < 2 * math.comb(
        clients, degree
    )
    needed = threshold if adversary == "semi-honest" else 2 * threshold - degree
    captured, of = tail(clients, colluding, degree, needed)
    starved, of_too = tail(clients, lost, degree, degree - threshold + 1)
    return whole and captured * clients * security < of and starved * clients * failure < of_too


# google-parfait/federated-compute, fcp/secagg/server/graph_parameter_finder_test.cc (commit bdbd822): the published
# vectors for 10 to 10^5 clients (the larger degrees to 10^4): corrupted, dropouts, adversary, then (clients, degree,
# threshold). Two of them are left out: see `test_a_threshold_of_two_is_kept_...`.
PUBLISHED: list[tuple[float, float, Adversary, list[tuple[int, int, int]]]] = [
    (0.45, 0.45, "semi-honest", [(100, 92, 46), (1000, 822, 417), (10000, 3494, 1771)]),
    (0.33, 0.33, "semi-honest", [(10, 8, 4), (100, 68, 34), (1000, 286, 150), (10000, 422, 221), (100000, 480, 251)]),
    (0.3, 0.3, "semi-malicious", [(100, 92, 62), (1000, 872, 584), (10000, 4822, 3230)]),
    (0.05, 0.33, "semi-honest", [(100, 28, 6), (1000, 72, 24), (10000, 86, 29), (100000, 96, 32)]),
    (0.05, 0.33, "semi-malicious", [(10, 8, 5), (100, 72, 39), (1000, 398, 223), (10000, 746, 420)]),
    (0.33, 0.05, "semi-honest", [(10, 4, 4), (100, 34, 29), (1000, 78, 60), (10000, 92, 70), (100000, 102, 77)]),
    (0.33, 0.05, "semi-malicious", [(10, 4, 4), (100, 42, 37), (1000, 132, 109), (10000, 178, 146)]),
    (0.05, 0.05, "semi-honest", [(10, 2, 2), (100, 12, 6), (1000, 30, 17), (10000, 34, 20), (100000, 36, 21)]),
    (0.05, 0.05, "semi-malicious", [(10, 2, 2), (100, 16, 11), (1000, 52, 37), (10000, 62, 44), (100000, 68, 48)]),
    (0.33, 0.0, "semi-honest", [(10, 4, 4), (100, 26, 25), (1000, 38, 36), (10000, 42, 40), (100000, 46, 44)]),
    (0.33, 0.0, "semi-malicious", [(10, 4, 4), (100, 26, 26), (1000, 38, 37), (10000, 42, 41), (100000, 46, 45)]),
    (0.0, 0.33, "semi-honest", [(100, 26, 2), (1000, 38, 2), (10000, 42, 2), (100000, 46, 2)]),
    (0.0, 0.33, "semi-malicious", [(10, 8, 5), (100, 68, 35), (1000, 228, 115), (10000, 326, 164)]),
    (0.0, 0.0, "semi-honest", [(10, 2, 2), (100, 2, 2), (1000, 2, 2), (10000, 2, 2), (100000, 2, 2)]),
    (0.0, 0.0, "semi-malicious", [(10, 2, 2), (100, 2, 2), (1000, 2, 2), (10000, 2, 2), (100000, 2, 2)]),
]


class TestGraphParameters:
    @pytest.mark.parametrize(("corrupted", "dropouts", "adversary", "rows"), PUBLISHED)
    def test_are_those_that_google_publishes(
        self, corrupted: float, dropouts: float, adversary: Adversary, rows: list[tuple[int, int, int]]
    ) -> None:
        for clients, degree, threshold in rows:
            found = graph_parameters(clients, corrupted=corrupted, dropouts=dropouts, adversary=adversary)
            assert found == GraphParameters(degree, threshold)

    @pytest.mark.parametrize(
        ("clients", "corrupted", "dropouts", "semi_honest", "semi_malicious"),
        [  # Computed with exact binomials for the protocol's design, before this program.
            (50, 0.05, 0.1, (8, 3), (14, 9)),
            (50, 0.2, 0.1, (16, 11), (22, 17)),
            (100, 0.05, 0.1, (16, 6), (26, 16)),
            (100, 0.1, 0.1, (22, 11), (32, 22)),
            (100, 0.2, 0.1, (32, 21), (42, 32)),
            (100, 0.2, 0.3, (48, 21), (82, 52)),
            (200, 0.05, 0.1, (24, 11), (42, 27)),
            (200, 0.1, 0.1, (34, 19), (56, 39)),
            (200, 0.2, 0.1, (46, 30), (76, 57)),
            (200, 0.2, 0.3, (80, 38), (162, 102)),
            (500, 0.05, 0.1, (32, 17), (66, 44)),
            (500, 0.1, 0.1, (42, 24), (82, 57)),
            (500, 0.2, 0.1, (60, 39), (116, 86)),
            (1000, 0.05, 0.1, (36, 19), (78, 52)),
            (1000, 0.1, 0.1, (48, 27), (96, 67)),
            (1000, 0.2, 0.1, (68, 44), (140, 104)),
            (1000, 0.33, 0.1, (102, 72), (218, 171)),
        ],
    )
    def test_are_those_of_the_design(
        self,
        clients: int,
        corrupted: float,
        dropouts: float,
        semi_honest: tuple[int, int],
        semi_malicious: tuple[int, int],
    ) -> None:
        for adversary, expected in (("semi-honest", semi_honest), ("semi-malicious", semi_malicious)):
            found = graph_parameters(clients, corrupted=corrupted, dropouts=dropouts, adversary=adversary)  # type: ignore[arg-type]
            assert found == GraphParameters(*expected)

    @settings(max_examples=100, deadline=None)
    @example(25, 0.125, 0.09375, "semi-honest", (1, 1))  # C(23, 2) / C(25, 4) is 1/50, its very bound.
    @given(
        st.integers(5, 100),
        st.floats(0, 0.4),
        st.floats(0, 0.4),
        st.sampled_from(["semi-honest", "semi-malicious"]),
        st.tuples(st.integers(1, 40), st.integers(1, 20)),  # Few bits: then many cases are close to a bound.
    )
    def test_are_the_least_that_meet_the_conditions_in_whole_numbers(
        self, clients: int, corrupted: float, dropouts: float, adversary: Adversary, bits: tuple[int, int]
    ) -> None:
        colluding, lost = (math.floor((share + 1e-14) * clients) for share in (corrupted, dropouts))
        degrees = range(2, clients - 1, 2)
        try:
            found = graph_parameters(
                clients,
                corrupted=corrupted,
                dropouts=dropouts,
                adversary=adversary,
                security_bits=bits[0],
                failure_bits=bits[1],
            )
        except JobError:
            smaller = [GraphParameters(k, t) for k in degrees for t in range(2, k + 1)]
        else:
            assert is_safe(clients, colluding, lost, adversary, bits, found)
            smaller = [GraphParameters(k, t) for k in degrees if k < found.degree for t in range(2, k + 1)]
            smaller += [GraphParameters(found.degree, t) for t in range(2, found.threshold)]
        tried = smaller[:: len(smaller) // 100 + 1] + smaller[-100:]
        assert not any(is_safe(clients, colluding, lost, adversary, bits, one) for one in tried)

    @pytest.mark.parametrize("corrupted", [0.0, 0.05])
    def test_a_threshold_of_two_is_kept_where_a_published_vector_falls_short_of_it(self, corrupted: float) -> None:
        # Published: degree 4, threshold 2. Of 10 clients 3 leave, so with 4 neighbours a client keeps one alone with
        # probability C(7, 1) C(3, 3) / C(10, 4) = 1/30: far above 2^-20. With 6 it keeps 3 at least.
        assert tail(10, 3, 4, 3) == (7, 210)
        found = graph_parameters(10, corrupted=corrupted, dropouts=0.33, adversary="semi-honest")
        assert found == GraphParameters(6, 2)

    def test_a_share_of_the_clients_is_rounded_as_it_was_meant(self) -> None:
        assert math.floor(0.29 * 100) == 28  # In binary: 28.999999999999996.
        meant, less = (
            graph_parameters(100, corrupted=share, dropouts=0.05, adversary="semi-honest") for share in (0.295, 0.285)
        )
        assert graph_parameters(100, corrupted=0.29, dropouts=0.05, adversary="semi-honest") == meant != less

    def test_more_bits_ask_for_more_neighbours(self) -> None:
        def found(security_bits: int, failure_bits: int) -> GraphParameters:
            return graph_parameters(
                1000,
                corrupted=0.1,
                dropouts=0.1,
                adversary="semi-malicious",
                security_bits=security_bits,
                failure_bits=failure_bits,
            )

        assert found(60, 20).degree > found(40, 20).degree
        assert found(40, 40).degree > found(40, 20).degree

    @pytest.mark.parametrize(
        ("clients", "corrupted", "dropouts", "adversary"),
        [
            (100, 0.33, 0.33, "semi-malicious"),  # The design's row that needs the complete graph.
            (1000, 0.5, 0.5, "semi-honest"),  # This and the next: Google's vectors that no bound can meet.
            (1000, 0.5, 0.5, "semi-malicious"),
            (3, 0.0, 0.0, "semi-honest"),
            (4, 0.5, 0.0, "semi-honest"),
        ],
    )
    def test_say_where_only_the_complete_graph_does(
        self, clients: int, corrupted: float, dropouts: float, adversary: Adversary
    ) -> None:
        with pytest.raises(JobError, match="use the complete graph, or expect fewer colluders"):
            graph_parameters(clients, corrupted=corrupted, dropouts=dropouts, adversary=adversary)

    @pytest.mark.parametrize(
        "bad",
        [
            {"clients": 2},
            {"clients": 0},
            {"clients": 10**6 + 1},
            {"corrupted": -0.1},
            {"corrupted": 1.0},
            {"corrupted": math.nan},
            {"dropouts": 1.0},
            {"dropouts": -1.0},
            {"dropouts": math.nan},
            {"adversary": "malicious"},
            {"security_bits": 0},
            {"failure_bits": 0},
            {"security_bits": 1000},
        ],
    )
    def test_settings_that_mean_nothing_are_refused(self, bad: dict[str, object]) -> None:
        settings: dict[str, object] = {"clients": 100, "corrupted": 0.1, "dropouts": 0.1, "adversary": "semi-honest"}
        with pytest.raises(JobError, match=r"must (lie|be)|needs 3 to"):
            graph_parameters(**{**settings, **bad})  # type: ignore[arg-type]


class TestCompleteThreshold:
    @pytest.mark.parametrize(
        ("clients", "colluders", "dropouts", "threshold", "left"),
        [  # The design's values: 2 t > (n - 1) + colluders and t <= n - 1 - dropouts.
            (3, 0, None, 2, 0),
            (4, 0, 1, 2, 1),
            (4, 1, None, 3, 0),
            (5, 1, None, 3, 1),
            (10, 2, 3, 6, 3),
            (20, 4, 7, 12, 7),
            (20, 8, 5, 14, 5),
            (20, 8, None, 14, 5),
            (50, 16, None, 33, 16),
            (100, 33, None, 67, 32),
        ],
    )
    def test_are_those_of_the_design(
        self, clients: int, colluders: int, dropouts: int | None, threshold: int, left: int
    ) -> None:
        assert complete_threshold(clients, colluders=colluders, dropouts=dropouts) == threshold
        assert tolerated_dropouts(clients, threshold) == left

    @given(st.integers(1, 300), st.integers(0, 120), st.one_of(st.none(), st.integers(0, 120)))
    def test_meet_both_conditions_or_say_what_would(self, clients: int, colluders: int, dropouts: int | None) -> None:
        holders, lost = clients - 1, dropouts or 0
        possible = [t for t in range(2, holders - lost + 1) if 2 * t > holders + colluders]
        try:
            threshold = complete_threshold(clients, colluders=colluders, dropouts=dropouts)
        except JobError as error:
            assert not possible or clients < colluders + 3
            sites = int(str(error).split("at least ")[-1].split()[0])
            assert complete_threshold(sites, colluders=colluders, dropouts=dropouts)
            with pytest.raises(JobError):
                complete_threshold(sites - 1, colluders=colluders, dropouts=dropouts)
            if "; allow " in str(error):
                allowed = int(str(error).split("; allow ")[1].split()[0])
                assert complete_threshold(clients, colluders=colluders, dropouts=allowed)
                with pytest.raises(JobError):
                    complete_threshold(clients, colluders=colluders, dropouts=allowed + 1)
            return
        assert threshold in possible
        rule = 2 * holders // 3 + 1
        assert threshold == (rule if rule in possible else possible[-1] if rule > possible[-1] else possible[0])
        assert tolerated_dropouts(clients, threshold) >= lost
        assert threshold + 1 >= colluders + 3  # Whoever is left, three are honest.

    @pytest.mark.parametrize(
        ("clients", "colluders", "dropouts", "message"),
        [
            (3, 1, None, "3 sites with 1 colluders: .* at least 4 sites are needed"),
            (2, 0, None, "at least 3 sites are needed"),
            (3, 0, 1, "at least 2 and at most 1; allow 0 dropouts, or have at least 4 sites"),
            (10, 2, 4, "at least 6 and at most 5; allow 3 dropouts, or have at least 12 sites"),
            (10, -1, None, "must be 0 or more"),
            (10, 0, -1, "must be 0 or more"),
        ],
    )
    def test_say_what_to_change(self, clients: int, colluders: int, dropouts: int | None, message: str) -> None:
        with pytest.raises(JobError, match=message):
            complete_threshold(clients, colluders=colluders, dropouts=dropouts)

    @pytest.mark.parametrize("threshold", [-1, 1, 10, 11])
    def test_a_threshold_that_no_graph_has_tolerates_nothing(self, threshold: int) -> None:
        with pytest.raises(JobError, match=r"must lie in \[2, 9\]"):
            tolerated_dropouts(10, threshold)
