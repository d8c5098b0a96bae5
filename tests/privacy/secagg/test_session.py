"""A site computes the one session that its terms allow, and refuses any other; its name covers every field."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from privacy.errors import JobError, Refused
from privacy.secagg.ring import Ring
from privacy.secagg.session import ANONYMITY, SECURITY_BITS, Session, Shape, Terms, digest

ONE, TWO = "01" * 32, "02" * 32
TEXT = st.text(st.characters(codec="utf-8"))
TERMS = Terms(
    federation="hospitals",
    roster=ONE,
    job=TWO,
    colluders=1,
    dropouts=1,
    rounds=100,
    cohorts=((1, 2, 4, 7, 9, 11), (3, 5, 6, 8, 10, 12)),
    ring=Ring(32, 10, 2),
    encoding="a grid",
)


def session_of(terms: Terms = TERMS, **changes: Any) -> Session:
    proposed: dict[str, Any] = {"members": (1, 2, 4, 7, 9, 11), "round_number": 3, "model": TWO}
    return terms.session(**{**proposed, "server": ONE, "nonce": TWO, **changes})


OTHER: dict[str, Any] = {
    "v": 2,
    "federation": "banks",
    "roster": TWO,
    "job": ONE,
    "purpose": "validation",
    "members": (1, 2, 4, 7, 9),
    "degree": 4,
    "threshold": 2,
    "minimum": 3,
    "bits": 16,
    "body": 11,
    "tail": 3,
    "encoding": "another grid",
}
FREE: dict[str, Any] = {"round": 4, "model": ONE, "server": TWO, "nonce": ONE}  # What the server chooses.


class TestShape:
    @settings(deadline=None)
    @given(st.integers(3, 60), st.integers(0, 20), st.none() | st.integers(0, 20), st.integers(1, 60))
    def test_keeps_secrets_and_serves_its_dropouts(
        self, clients: int, colluders: int, dropouts: int | None, least: int
    ) -> None:
        try:
            shape = Shape.of(clients, colluders=colluders, dropouts=dropouts, least=least)
        except JobError:
            holders = clients - 1
            possible = (holders + colluders) // 2 + 1 <= holders - (dropouts or 0)
            assert clients < colluders + ANONYMITY or not possible or least > clients
            return
        assert 2 * shape.threshold > shape.degree + colluders, "both secrets of a client could be collected"
        assert shape.minimum - colluders >= ANONYMITY, "a sum could be of two honest clients"
        assert shape.minimum >= least
        assert shape.minimum + shape.dropouts == clients
        assert shape.dropouts <= shape.degree - shape.threshold, "a round within its dropouts could abort"
        if dropouts is not None:
            assert shape.dropouts <= dropouts
            assert shape.dropouts == dropouts or shape.minimum in (least, colluders + ANONYMITY)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(100, 400), st.floats(0, 0.1), st.none() | st.integers(0, 20))
    def test_a_sparse_graph_keeps_the_same_promises(self, clients: int, share: float, dropouts: int | None) -> None:
        colluders = int(share * clients)
        try:
            shape = Shape.of(clients, colluders=colluders, dropouts=dropouts, regular=True)
        except JobError:
            assume(False)
        assert 2 * shape.threshold > shape.degree
        assert shape.threshold <= shape.degree < clients
        assert shape.minimum == max(colluders + ANONYMITY, clients - (clients // 10 if dropouts is None else dropouts))

    def test_a_sparse_graph_has_sixty_bits_and_the_published_formulas(self) -> None:
        """52 and 37 are what they give for 40 bits (graph_parameter_finder.cc, semi-malicious, shares of .05)."""
        shape = Shape.of(1000, colluders=50, dropouts=50, regular=True)
        assert SECURITY_BITS == 60
        assert shape.degree > 52
        assert shape.threshold > 37
        assert shape.minimum == 950

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"clients": 3, "colluders": 0}, (2, 2, 3, 0)),
            ({"clients": 4, "colluders": 0}, (3, 3, 4, 0)),
            ({"clients": 5, "colluders": 0, "dropouts": 1}, (4, 3, 4, 1)),
            ({"clients": 10, "colluders": 0}, (9, 7, 8, 2)),
            ({"clients": 10, "colluders": 2, "dropouts": 1}, (9, 7, 9, 1)),
            ({"clients": 10, "colluders": 0, "least": 9}, (9, 7, 9, 1)),
        ],
    )
    def test_values_that_are_checked_by_hand(self, settings: dict[str, Any], expected: tuple[int, ...]) -> None:
        """t = floor(2 (n - 1) / 3) + 1, but at most n - 1 - dropouts; the minimum is n less those who may fail."""
        shape = Shape.of(**settings)
        assert (shape.degree, shape.threshold, shape.minimum, shape.dropouts) == expected

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"clients": 2, "colluders": 0}, "at least 3 sites are needed"),
            ({"clients": 5, "colluders": 3}, "would be one of 2: at least 6 sites are needed"),
            ({"clients": 5, "colluders": 9}, "would be one of 0"),
            ({"clients": 5, "colluders": 0, "dropouts": 2}, "allow 1 dropouts"),
            ({"clients": 5, "colluders": 0, "least": 6}, "at least 6 sites cannot come from 5"),
            ({"clients": 10, "colluders": 7, "regular": True}, "leave too few for a sparse graph"),
            ({"clients": 20, "colluders": 7, "dropouts": 4, "regular": True}, "no graph keeps 16 clients safe"),
        ],
    )
    def test_says_what_would_be_possible(self, settings: dict[str, Any], words: str) -> None:
        with pytest.raises(JobError, match=words):
            Shape.of(**settings)


class TestTerms:
    def test_allow_their_own_session_whatever_the_server_may_choose(self) -> None:
        for change in ({}, *({name: value} for name, value in FREE.items())):
            replace(session_of(), **change).check(TERMS)

    @pytest.mark.parametrize("field", [name for name in OTHER if name != "members"])
    def test_refuse_a_session_that_differs_in_any_field(self, field: str) -> None:
        with pytest.raises(Refused, match=f"the session's {field} is not what this site's terms say"):
            replace(session_of(), **{field: OTHER[field]}).check(TERMS)

    @pytest.mark.parametrize("members", [(1, 2, 4, 7, 9), (1, 2, 3, 4, 5, 6), (1, 2, 4, 7, 9, 11, 13), ()])
    def test_refuse_a_cohort_that_the_job_does_not_allow(self, members: tuple[int, ...]) -> None:
        with pytest.raises(Refused, match="not a cohort that this job allows"):
            session_of(members=members)

    @pytest.mark.parametrize("members", [(1, 2, 4, 7, 11, 9), (1, 2, 4, 7, 9, 11, 11)])
    def test_refuse_members_that_are_repeated_or_out_of_order(self, members: tuple[int, ...]) -> None:
        with pytest.raises(Refused, match="once each, in order"):
            session_of(members=members)

    def test_of_a_drawn_cohort_take_the_one_of_the_round(self) -> None:
        drawn = {3: ((1, 2, 3, 4, 5, 20),), 4: ((2, 3, 4, 5, 6, 7),)}
        terms = replace(TERMS, cohorts=drawn.__getitem__)
        session_of(terms, members=(1, 2, 3, 4, 5, 20)).check(terms)
        with pytest.raises(Refused, match="not a cohort that this job allows"):
            session_of(terms, members=(1, 2, 3, 4, 5, 20), round_number=4)

    def test_refuse_rounds_that_the_job_does_not_have(self) -> None:
        terms = replace(TERMS, rounds=3)
        session_of(terms).check(terms)
        with pytest.raises(Refused, match="round 4 is not one of the job's 3"):
            session_of(TERMS, round_number=4).check(terms)

    @pytest.mark.parametrize("field", ["model", "server", "nonce"])
    @pytest.mark.parametrize("text", ["", "01" * 31, "01" * 33, "0G" * 32, "AB" * 32, "é" * 64])
    def test_refuse_a_hash_key_or_nonce_that_is_not_32_bytes(self, field: str, text: str) -> None:
        change: dict[str, Any] = {field: text}
        with pytest.raises(Refused, match="malformed"):
            replace(session_of(), **change).check(TERMS)

    @pytest.mark.parametrize("number", [0, -1])
    def test_refuse_a_round_before_the_first(self, number: int) -> None:
        with pytest.raises(Refused, match=f"round {number} is not one of the job's"):
            replace(session_of(), round=number).check(TERMS)


class TestSession:
    def test_reads_as_written(self) -> None:
        assert Session.parse(bytes(session_of())) == session_of()
        assert session_of().ring == TERMS.ring

    def test_has_a_name_that_covers_every_field(self) -> None:
        changes = OTHER | FREE
        assert set(changes) == {field.name for field in fields(Session)}
        names = {replace(session_of(), **{field: value}).id for field, value in changes.items()}
        assert len(names | {session_of().id}) == len(changes) + 1

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\0\0\0\0",
            b"\xff",
            b"null",
            b"[]",
            b"{}",
            b"[" * 10_000,
            b"1" * 5_000,
            bytes(session_of())[:-1],
            bytes(session_of()) + b" ",
            bytes(session_of()).replace(b'"round":3', b'"round":3,"round":3'),
            bytes(session_of()).replace(b'"round":3', b'"round":3.0'),
            bytes(session_of()).replace(b'"round":3', b'"round":true'),
            bytes(session_of()).replace(b'"round":3', b'"round":"3"'),
            bytes(session_of()).replace(b'"round":3', b'"round":NaN'),
            bytes(session_of()).replace(b'"round":3', b'"sound":3'),
            bytes(session_of()).replace(b'"round":3,', b""),
            bytes(session_of()).replace(b'"members":[1,', b'"members":[true,'),
            bytes(session_of()).replace(b'"members":[1,2,4,7,9,11]', b'"members":"123"'),
            bytes(session_of()).replace(b'"members":[1,2,4,7,9,11]', b'"members":null'),
            bytes(session_of()).replace(b'"v":1', b'"v":2'),
            json.dumps(json.loads(bytes(session_of())), indent=1).encode(),
        ],
    )
    def test_is_refused_unless_written_as_we_write_it(self, text: bytes) -> None:
        with pytest.raises(Refused, match="the proposal is not a session"):
            Session.parse(text)

    @given(TEXT, TEXT, st.lists(st.binary(max_size=5), max_size=3), st.lists(st.binary(max_size=5), max_size=3))
    def test_digests_of_different_lists_differ(self, one: str, two: str, left: list[bytes], right: list[bytes]) -> None:
        assert (digest(one, *left) == digest(two, *right)) == ((one, left) == (two, right))
