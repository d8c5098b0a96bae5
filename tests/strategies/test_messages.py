"""Messages survive the wire; nothing malformed passes the trust boundary, and no value gets into an error."""

import contextlib
import io
import json
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.ledger import Head
from strategies.messages import (
    Agreed,
    Answer,
    Ask,
    Deliver,
    MalformedMessage,
    Offer,
    Refusal,
    Reply,
    Request,
    Stage,
    Step,
    Stepped,
    approval_of,
    ask_for,
    check_agreed,
    check_ask,
    check_deliver,
    check_reply,
    check_stepped,
    flat_array,
    header,
    parse_answer,
    parse_request,
    unflat,
)
from strategies.parameters import Vector, vector_hash
from strategies.total import Layout

JOB = "ab" * 32
LAYOUT = Layout(3, ("loss",))
SECRET = 4815.1623  # Stands for a record's trace in a vector.

MODEL: Vector = np.array([0.5, -2.0, SECRET], np.float32)
CONTRIBUTION: Vector = np.array([1.0, SECRET, 3.0, 20.0, 0.25], np.float32)
ASK = ask_for(JOB, 7, MODEL, "cd" * 32)
REPLY = Reply("north", JOB, 7, CONTRIBUTION, Head(4, "ef" * 32))
REFUSAL = Refusal("north", JOB, 7)
STEP = Step(JOB, 7, "mask", b"\x01\x02", ASK)
STEPPED = Stepped("north", JOB, 7, "mask", b"\x03\x04", np.array([1, 2, 3], np.uint8), Head(4, "ef" * 32))
OFFER = Offer(JOB, "name = 'x'\n", vector_hash(MODEL), 3, "12" * 32, "0.1.0", (("34" * 32, "56" * 64),))
DELIVER = Deliver(JOB, 7, MODEL, vector_hash(MODEL))
AGREED = Agreed("north", JOB, 7, Head(4, "ef" * 32))

rounds = st.integers(-(10**30), 10**30)
heads = st.none() | st.builds(Head, st.integers(0, 10**30), st.text())
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
asks = st.builds(Ask, st.text(), rounds, st.just(MODEL), digests, st.none() | digests)
replies = st.builds(Reply, st.text(), st.text(), rounds, st.just(CONTRIBUTION), heads)
refusals = st.builds(Refusal, st.text(), st.text(), rounds)
stages: st.SearchStrategy[Stage] = st.sampled_from(get_args(Stage))
WORDS = np.array([3, 1, 4, 1, 5], np.uint8)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    stage, job, number = draw(stages), draw(st.text()), draw(rounds)
    asked = Ask(job, number, MODEL, draw(digests), draw(st.none() | digests)) if stage == "mask" else None
    return Step(job, number, stage, draw(st.binary()), asked)


stepped = st.builds(Stepped, st.text(), st.text(), rounds, stages, st.binary(), st.just(WORDS), heads)


def content(message: Request | Answer) -> dict[str, Any]:
    """A message's fields, its vector by identity: arrays do not compare as one truth value."""

    def comparable(value: Any) -> Any:
        match value:
            case np.ndarray():
                return value.tobytes(), value.dtype
            case Ask():
                return content(value)
        return value

    return {f.name: comparable(getattr(message, f.name)) for f in fields(message)}


class TestHeader:
    @given(ask=asks)
    def test_a_request_survives_the_wire(self, ask: Ask) -> None:
        assert content(parse_request(header(ask), MODEL)) == content(ask)

    @given(answer=replies | refusals)
    def test_an_answer_survives_the_wire(self, answer: Reply | Refusal) -> None:
        parsed = parse_answer(header(answer), CONTRIBUTION)
        assert type(parsed) is type(answer)
        assert content(parsed) == content(answer)

    @given(step=steps())
    def test_a_step_of_a_secure_sum_survives_the_wire(self, step: Step) -> None:
        assert content(parse_request(header(step), flat_array(step))) == content(step)

    @given(answer=stepped)
    def test_an_answer_to_a_step_survives_the_wire(self, answer: Stepped) -> None:
        assert content(parse_answer(header(answer), flat_array(answer))) == content(answer)

    @given(toml=st.text(), version=st.text(), approvals=st.lists(st.tuples(digests, st.just("56" * 64))))
    def test_an_offer_survives_the_wire(self, toml: str, version: str, approvals: list[tuple[str, str]]) -> None:
        offer = Offer(JOB, toml, "ab" * 32, 3, "12" * 32, version, tuple(approvals))
        assert parse_request(header(offer), flat_array(offer)) == offer

    def test_a_delivery_and_an_agreement_survive_the_wire(self) -> None:
        assert content(parse_request(header(DELIVER), flat_array(DELIVER))) == content(DELIVER)
        assert parse_answer(header(AGREED), flat_array(AGREED)) == AGREED

    def test_never_changes(self) -> None:
        # Pinned from the first release: sites of different versions must understand each other or say that they do not.
        assert json.loads(header(ASK)) == {
            "v": 1,
            "kind": "ask",
            "job": JOB,
            "round": 7,
            "model_hash": vector_hash(MODEL),
            "witness": "cd" * 32,
            "clip_norm": None,
        }
        assert json.loads(header(REPLY)) == {
            "v": 1,
            "kind": "reply",
            "job": JOB,
            "round": 7,
            "site": "north",
            "head": [4, "ef" * 32],
        }
        assert json.loads(header(STEP)) == {
            "v": 1,
            "kind": "step",
            "job": JOB,
            "round": 7,
            "stage": "mask",
            "body": "AQI=",
            "ask": {"model_hash": vector_hash(MODEL), "witness": "cd" * 32, "clip_norm": None},
        }
        assert json.loads(header(STEPPED)) == {
            "v": 1,
            "kind": "stepped",
            "job": JOB,
            "round": 7,
            "site": "north",
            "stage": "mask",
            "body": "AwQ=",
            "head": [4, "ef" * 32],
        }

        offered = {"toml": "name = 'x'\n", "model_hash": vector_hash(MODEL), "parameters": 3, "shapes": "12" * 32}
        offered |= {"version": "0.1.0", "approvals": [["34" * 32, "56" * 64]]}
        assert json.loads(header(OFFER)) == {"v": 1, "kind": "offer", "job": JOB, "round": 0, **offered}
        delivered = {"v": 1, "kind": "deliver", "job": JOB, "round": 7, "model_hash": vector_hash(MODEL)}
        assert json.loads(header(DELIVER)) == delivered
        agreed = {"v": 1, "kind": "agreed", "job": JOB, "round": 7, "site": "north", "head": [4, "ef" * 32]}
        assert json.loads(header(AGREED)) == agreed

    def test_a_refusal_has_one_shape_and_room_for_no_reason(self) -> None:
        assert [field.name for field in fields(Refusal)] == ["site", "job", "round_number"]
        assert json.loads(header(REFUSAL)) == {"v": 1, "kind": "refusal", "job": JOB, "round": 7, "site": "north"}

    @given(reply=replies)
    def test_no_header_carries_a_vector(self, reply: Reply) -> None:
        assert set(json.loads(header(reply))) == {"v", "kind", "job", "round", "site", "head"}


GOOD = {
    "ask": json.loads(header(ASK)),
    "reply": json.loads(header(REPLY)),
    "refusal": json.loads(header(REFUSAL)),
    "step": json.loads(header(STEP)),
    "stepped": json.loads(header(STEPPED)),
    "offer": json.loads(header(OFFER)),
    "deliver": json.loads(header(DELIVER)),
    "agreed": json.loads(header(AGREED)),
}
PARSERS: dict[str, Callable[[str], Any]] = {
    "ask": lambda text: parse_request(text, MODEL),
    "reply": lambda text: parse_answer(text, CONTRIBUTION),
    "refusal": lambda text: parse_answer(text, CONTRIBUTION),
    "step": lambda text: parse_request(text, MODEL),
    "stepped": lambda text: parse_answer(text, STEPPED.words),
    "offer": lambda text: parse_request(text, MODEL),
    "deliver": lambda text: parse_request(text, MODEL),
    "agreed": lambda text: parse_answer(text, CONTRIBUTION),
}
ABSENT = object()


class TestMalformedHeaders:
    @pytest.mark.parametrize("kind", PARSERS)
    @pytest.mark.parametrize(
        "text",
        ["", "{", "null", "3", "[]", '"v"', "{}", "\ud800", "NaN", "[" * 100_000, '{"v":' * 100_000, "1" * 5000],
        ids=lambda text: text[:12],
    )
    def test_text_that_is_no_header_is_refused(self, kind: str, text: str) -> None:
        with pytest.raises(MalformedMessage, match="the header is not"):
            PARSERS[kind](text)

    @pytest.mark.parametrize(
        ("kind", "key", "value", "said"),
        [
            ("ask", "v", ABSENT, "version 1"),
            ("ask", "v", 2, "version 1"),
            ("ask", "v", "1", "version 1"),
            ("ask", "v", None, "version 1"),
            ("ask", "v", True, "version 1"),
            ("ask", "kind", ABSENT, "expected ask"),
            ("ask", "kind", "reply", "expected ask"),
            ("ask", "kind", [], "expected ask"),
            ("ask", "job", ABSENT, "keys"),
            ("ask", "job", 3, "job or round"),
            ("ask", "job", None, "job or round"),
            ("ask", "round", "7", "job or round"),
            ("ask", "round", 7.0, "job or round"),
            ("ask", "round", True, "job or round"),
            ("ask", "round", None, "job or round"),
            ("ask", "model_hash", ABSENT, "keys"),
            ("ask", "model_hash", None, "model_hash or witness"),
            ("ask", "witness", ABSENT, "keys"),
            ("ask", "witness", 3, "model_hash or witness"),
            ("ask", "code", "import os", "keys"),
            ("offer", "toml", 3, "toml or version"),
            ("offer", "version", None, "toml or version"),
            ("offer", "job", "not a digest", "SHA-256"),
            ("offer", "model_hash", "AB" * 32, "SHA-256"),
            ("offer", "shapes", None, "SHA-256"),
            ("offer", "parameters", 0, "whole number"),
            ("offer", "parameters", True, "whole number"),
            ("offer", "round", 1, "whole number"),
            ("offer", "approvals", None, "approvals"),
            ("offer", "approvals", ["34" * 32], "approvals"),
            ("offer", "approvals", [["34" * 32, "56"]], "approvals"),
            ("offer", "approvals", [["34" * 32, "56" * 64, 1]], "approvals"),
            ("offer", "code", "import os", "keys"),
            ("deliver", "model_hash", None, "model_hash"),
            ("deliver", "model_hash", ABSENT, "keys"),
            ("agreed", "site", None, "site"),
            ("agreed", "head", [4], "head"),
            ("agreed", "why", "no such patient", "keys"),
            ("step", "stage", "train", "stage"),
            ("step", "stage", None, "comes with the stage mask"),
            ("step", "stage", "share", "comes with the stage mask"),
            ("step", "ask", None, "comes with the stage mask"),
            ("step", "ask", {}, "other keys"),
            ("step", "ask", [1], "other keys"),
            ("step", "ask", {"model_hash": None, "witness": None, "clip_norm": None}, "model_hash or witness"),
            ("step", "body", "not base64", "base64"),
            ("step", "body", None, "base64"),
            ("step", "body", "A", "base64"),
            ("step", "body", 3, "base64"),
            ("step", "code", "import os", "keys"),
            ("stepped", "stage", ["mask"], "stage"),
            ("stepped", "body", {}, "base64"),
            ("stepped", "head", [4], "head"),
            ("stepped", "loss", 0.5, "keys"),
            ("reply", "kind", "ask", "expected reply or refusal"),
            ("reply", "kind", "refusal", "keys"),
            ("reply", "site", ABSENT, "keys"),
            ("reply", "site", 3, "site"),
            ("reply", "site", None, "site"),
            ("reply", "head", ABSENT, "keys"),
            ("reply", "head", [], "head"),
            ("reply", "head", [4], "head"),
            ("reply", "head", [4, "ef", 1], "head"),
            ("reply", "head", [-1, "ef"], "head"),
            ("reply", "head", [True, "ef"], "head"),
            ("reply", "head", [4.0, "ef"], "head"),
            ("reply", "head", ["4", "ef"], "head"),
            ("reply", "head", [4, 5], "head"),
            ("reply", "head", {"seq": 4, "hash": "ef"}, "head"),
            ("reply", "head", "4", "head"),
            ("reply", "loss", 0.5, "keys"),
            ("refusal", "kind", "reply", "keys"),
            ("refusal", "site", ["north"], "site"),
            ("refusal", "reason", "no such patient", "keys"),
            ("refusal", "head", None, "keys"),
        ],
    )
    def test_a_key_absent_added_or_of_another_type_is_refused(
        self, kind: str, key: str, value: object, said: str
    ) -> None:
        header_fields = {k: v for k, v in {**GOOD[kind], key: value}.items() if v is not ABSENT}
        with pytest.raises(MalformedMessage, match=said):
            PARSERS[kind](json.dumps(header_fields))

    @settings(max_examples=100, deadline=None)
    @given(
        kind=st.sampled_from(sorted(PARSERS)),
        changes=st.dictionaries(
            st.sampled_from(
                ["v", "kind", "job", "round", "site", "head", "model_hash", "witness", "stage", "body", "ask"]
            )
            | st.text(),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                max_leaves=5,
            ),
            max_size=3,
        ),
    )
    def test_any_json_is_a_message_or_is_refused(self, kind: str, changes: dict[str, Any]) -> None:
        text = json.dumps({**GOOD[kind], **changes})
        try:
            message = PARSERS[kind](text)
        except MalformedMessage:
            assert changes
        else:
            assert json.loads(header(message)) == json.loads(text)

    @given(text=st.text())
    def test_any_text_is_refused_or_a_message(self, text: str) -> None:
        for parse in PARSERS.values():
            with pytest.raises(MalformedMessage):
                parse(text)


def float32(*values: float) -> Vector:
    return np.array(values, np.float32)


def signalling_nan() -> Vector:
    """A NaN that some processors raise for, which a site can send and numpy cannot make from a float."""
    return np.frombuffer(struct.pack("<II", 0x7F800001, 0), np.float32)


BAD_VECTORS: list[tuple[Callable[[Vector], Any], str]] = [
    (lambda good: good.astype(np.float64), "must be float32"),
    (lambda good: good.astype(np.float16), "must be float32"),
    (lambda good: good.astype(">f4"), "must be float32"),
    (lambda good: good.astype(np.int32), "must be float32"),
    (lambda good: good.astype(object), "must be float32"),
    (lambda good: good[:-1], "must be float32"),
    (lambda good: np.append(good, np.float32(SECRET)), "must be float32"),
    (lambda good: good[:, None], "must be float32"),
    (lambda good: good[None], "must be float32"),
    (lambda good: good[:0], "must be float32"),
    (lambda good: good.tolist(), "got list"),
    (lambda good: good.tobytes(), "got bytes"),
    (lambda good: None, "got NoneType"),
    (lambda good: np.float32(SECRET), "must be float32"),
    (lambda good: np.concatenate([good[:-1], float32(np.nan)]), "not finite"),
    (lambda good: np.concatenate([good[:-1], float32(np.inf)]), "not finite"),
    (lambda good: np.concatenate([good[:-1], float32(-np.inf)]), "not finite"),
    (lambda good: np.concatenate([float32(np.inf), good[1:-1], float32(-np.inf)]), "not finite"),
    (lambda good: np.concatenate([signalling_nan(), good[2:]]), "not finite"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD_VECTORS)
class TestMalformedVectors:
    def test_a_site_refuses_the_model_and_never_repeats_it(self, spoil: Callable[[Vector], Any], said: str) -> None:
        with pytest.raises(MalformedMessage, match=said) as caught:
            check_ask(replace(ASK, model=spoil(MODEL)), job=JOB, parameters=3)
        assert "the model" in str(caught.value)
        assert str(SECRET)[:3] not in str(caught.value)

    def test_a_server_refuses_the_contribution_and_never_repeats_it(
        self, spoil: Callable[[Vector], Any], said: str
    ) -> None:
        with pytest.raises(MalformedMessage, match=said) as caught:
            check_reply(replace(REPLY, contribution=spoil(CONTRIBUTION)), ask=ASK, site="north", layout=LAYOUT)
        assert "the contribution" in str(caught.value)
        assert str(SECRET)[:3] not in str(caught.value)


class TestCheckAsk:
    @given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
    def test_accepts_every_finite_model_under_its_own_hash(self, values: list[float]) -> None:
        check_ask(ask_for(JOB, 1, float32(*values), None), job=JOB, parameters=len(values))

    def test_accepts_the_largest_floats_together(self) -> None:
        check_ask(ask_for(JOB, 1, np.full(1000, np.finfo(np.float32).max), None), job=JOB, parameters=1000)

    @pytest.mark.parametrize(
        ("ask", "said"),
        [
            (replace(ASK, job="ab" * 31 + "ac"), "another job than this site has approved"),
            (replace(ASK, job=""), "another job than this site has approved"),
            (replace(ASK, round_number=0), "round numbers start at 1, got 0"),
            (replace(ASK, round_number=-7), "round numbers start at 1, got -7"),
            (replace(ASK, model_hash=vector_hash(float32(0))), "not the one that its hash names"),
            (replace(ASK, model_hash=ASK.model_hash.upper()), "not the one that its hash names"),
            (replace(ASK, model=np.nextafter(MODEL, np.float32(0))), "not the one that its hash names"),
        ],
    )
    def test_refuses_what_the_site_did_not_approve(self, ask: Ask, said: str) -> None:
        with pytest.raises(MalformedMessage, match=said) as caught:
            check_ask(ask, job=JOB, parameters=3)
        assert str(SECRET)[:3] not in str(caught.value)


class TestCheckReply:
    @pytest.mark.parametrize("weight", [1e-45, 1.0, 3e38])
    def test_accepts_every_positive_weight(self, weight: float) -> None:
        contribution = float32(1, 2, 3, weight, 0)
        check_reply(replace(REPLY, contribution=contribution), ask=ASK, site="north", layout=LAYOUT)

    @pytest.mark.parametrize(
        ("reply", "said"),
        [
            (replace(REPLY, site="south"), "another site's name"),
            (replace(REPLY, site=""), "another site's name"),
            (replace(REPLY, job="0" * 64), "another job or round"),
            (replace(REPLY, round_number=6), "another job or round"),
            (replace(REPLY, round_number=8), "another job or round"),
            (replace(REPLY, contribution=float32(1, SECRET, 3, 0, 0)), "the weight is not positive"),
            (replace(REPLY, contribution=float32(1, SECRET, 3, -0.0, 0)), "the weight is not positive"),
            (replace(REPLY, contribution=float32(1, 2, 3, -SECRET, 0)), "the weight is not positive"),
        ],
    )
    def test_refuses_what_no_honest_client_could_have_sent(self, reply: Reply, said: str) -> None:
        with pytest.raises(MalformedMessage, match=said) as caught:
            check_reply(reply, ask=ASK, site="north", layout=LAYOUT)
        assert str(SECRET)[:3] not in str(caught.value)


@pytest.mark.parametrize("witness", ["", "x" * 64, "AB" * 32, "ab" * 33, "ab" * 31 + "\n\n", 7])
def test_a_site_never_signs_a_witness_that_is_no_digest(witness: object) -> None:
    text = json.dumps({**json.loads(header(ASK)), "witness": witness})
    with pytest.raises(MalformedMessage, match="SHA-256"):
        parse_request(text, MODEL)


class TestCheckStepped:
    def test_an_answer_to_what_was_asked_passes(self) -> None:
        check_stepped(STEPPED, step=STEP, site="north")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"site": "south"}, "another site's name"),
            ({"job": "cd" * 32}, "another job, round or stage"),
            ({"round_number": 6}, "another job, round or stage"),
            ({"stage": "share"}, "another job, round or stage"),
        ],
    )
    def test_an_answer_to_something_else_is_refused(self, change: dict[str, Any], said: str) -> None:
        with pytest.raises(MalformedMessage, match=said):
            check_stepped(replace(STEPPED, **change), step=STEP, site="north")

    @pytest.mark.parametrize("array", [MODEL, CONTRIBUTION.astype(np.float64), WORDS.astype(np.int8)])
    def test_masked_words_that_are_no_bytes_are_refused(self, array: Any) -> None:
        with pytest.raises(MalformedMessage, match="not bytes"):
            parse_answer(header(STEPPED), array)

    @pytest.mark.parametrize("array", [WORDS, MODEL.astype(np.float64)])
    def test_a_model_of_another_type_is_refused(self, array: Any) -> None:
        for request in (ASK, STEP):
            with pytest.raises(MalformedMessage, match="not float32"):
                parse_request(header(request), array)


def npy(array: Any, **changes: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=changes.get("version", (1, 0)))
    return file.getvalue()


class TestUnflat:
    @pytest.mark.parametrize("array", [MODEL, WORDS, np.zeros(0, np.float32), np.zeros(0, np.uint8)])
    def test_reads_what_numpy_writes(self, array: Any) -> None:
        read = unflat(npy(array))
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
        read[:] = 0

    def archive() -> bytes:  # type: ignore[misc]  # Makes a value of the table below.
        file = io.BytesIO()
        np.savez(file, MODEL)
        return file.getvalue()

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x93NUMPY",
            b"PK\x03\x04 no archive",
            archive(),
            npy(MODEL)[:-1],
            npy(MODEL) + b"\0",
            npy(MODEL).replace(b"(3,)", b"(9,)"),
            npy(MODEL).replace(b"(3,), }" + b" " * 14, b"(1000000000000000,), }"),
            npy(MODEL, version=(2, 0)),
            npy(MODEL.astype(np.float64)),
            npy(MODEL.astype(">f4")),
            npy(MODEL.reshape(1, 3)),
            b"\x93NUMPY\x01\x00\x06\x00{'a':1",
        ],
    )
    def test_anything_else_is_malformed_and_never_another_error(self, data: bytes) -> None:
        with pytest.raises(MalformedMessage, match="the array is"):
            unflat(data)

    @given(data=st.binary(max_size=200), cut=st.integers(0, 200))
    def test_noise_is_malformed_or_an_array(self, data: bytes, cut: int) -> None:
        for text in (data, npy(MODEL)[:cut] + data):
            with contextlib.suppress(MalformedMessage):
                assert unflat(text).dtype in (np.dtype(np.float32), np.dtype(np.uint8))


class TestDeliveries:
    def test_a_model_of_another_job_shape_or_hash_is_refused(self) -> None:
        check_deliver(DELIVER, job=JOB, parameters=3)
        for wrong, said in [
            (replace(DELIVER, job="cd" * 32), "another job"),
            (replace(DELIVER, model=MODEL[:2]), "float32"),
            (replace(DELIVER, model_hash="cd" * 32), "hash"),
            (replace(DELIVER, model=np.full(3, np.nan, np.float32)), "finite"),
        ]:
            with pytest.raises(MalformedMessage, match=said):
                check_deliver(wrong, job=JOB, parameters=3)

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (REPLY, "another kind"),
            (replace(AGREED, site="south"), "another site"),
            (replace(AGREED, job="cd" * 32), "another job or round"),
            (replace(AGREED, round_number=6), "another job or round"),
        ],
    )
    def test_an_agreement_to_something_else_is_refused(self, answer: Answer, said: str) -> None:
        assert check_agreed(AGREED, request=DELIVER, site="north") == AGREED
        with pytest.raises(MalformedMessage, match=said):
            check_agreed(answer, request=DELIVER, site="north")

    def test_an_approval_is_of_one_job_and_one_model(self) -> None:
        approvals = {approval_of(job, model) for job in (JOB, "cd" * 32) for model in ("12" * 32, "34" * 32)}
        assert len(approvals) == 4
