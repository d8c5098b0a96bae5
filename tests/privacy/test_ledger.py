"""A ledger shows every change to it: no byte is slack, no crash loses what was acknowledged, no key shows itself."""

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import LedgerCorrupt, LedgerError
from privacy.keys import IdentityKey, is_signed_by
from privacy.ledger import GENESIS, Head, Ledger, LedgerView, canonical, digest_of, parse, read_ledger

SITE = "city-hospital"
# RFC 8032, sec. 7.1, tests 1 and 2: secret key, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
        "655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aee"
        "b00d291612bb0c00",
    ),
]


def key_number(number: int) -> IdentityKey:
    return IdentityKey(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


KEY, OTHER_KEY = key_number(1), key_number(2)


class Clock:
    """Ticks one second at each look."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


LIMIT = {"unit": "record", "epsilon": 2.0, "delta": 1e-05}
ENTRIES: list[tuple[str, dict[str, Any]]] = [  # One of each kind.
    ("open", {"public_key": KEY.public_hex, "rows": 105, "simulation": True, "dataset": "records"}),
    ("budget", {"purpose": None, **LIMIT}),
    (
        "plan",
        {
            "job": "ab" * 32,
            "purpose": "training",
            "rounds": 2,
            "events": [{"noise_multiplier": 6.5}],
            "filter": None,
            "limits": [LIMIT],
        },
    ),
    ("reserve", {"job": "ab" * 32, "round": 1, "witness": None, "model": "Zürich", "events": []}),
    ("commit", {"job": "ab" * 32, "round": 1, "reserve": 3, "output": "01" * 32}),
    ("settle", {"job": "ab" * 32}),
]


def written(path: Path, *, site: str = SITE, key: IdentityKey = KEY, count: int = len(ENTRIES)) -> Path:
    ledger = Ledger(path, site, key, clock=Clock())
    for kind, body in ENTRIES[:count]:
        ledger.append(kind, body)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a ledger of six entries."""
    return written(tmp_path_factory.mktemp("ledger") / "ledger.jsonl").read_bytes()


def lines_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def first_fault(data: bytes, *, site: str = SITE, key: IdentityKey = KEY) -> tuple[int, str]:
    """The entry that is found at fault, and why."""
    with pytest.raises(LedgerCorrupt) as caught:
        parse(data, site, key.public_hex)
    assert caught.value.site == site
    assert str(caught.value) == f"ledger of {site}, entry {caught.value.entry}: {caught.value.why}"
    assert "\n" not in str(caught.value)
    return caught.value.entry, caught.value.why


def signed_line(key: IdentityKey, **fields: Any) -> bytes:
    """A whole line made by hand as the module's docstring says, for whatever `fields` are."""
    unsigned = {
        "v": 1,
        "seq": 0,
        "site": SITE,
        "time": "2026-01-02T03:04:06.000+00:00",
        "kind": "open",
        "body": {},
        "prev": "0" * 64,
    } | fields
    digest = hashlib.sha256(b"fedchorus ledger v1\0" + by_hand(unsigned)).digest()
    signature = key.sign(b"fedchorus ledger v1 signature\0" + digest)
    return by_hand({**unsigned, "hash": digest.hex(), "sig": signature.hex()}) + b"\n"


def by_hand(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


class TestFormat:
    def test_what_was_appended_is_what_is_read(self, tmp_path: Path) -> None:
        path = written(tmp_path / "ledger.jsonl")
        entries = read_ledger(path, SITE, KEY.public_hex)
        assert [(entry.kind, entry.body) for entry in entries] == ENTRIES
        assert [entry.seq for entry in entries] == list(range(6))
        assert {entry.site for entry in entries} == {SITE}
        assert entries[0].time == "2026-01-02T03:04:06.000+00:00"
        assert [entry.prev for entry in entries] == [GENESIS, *(entry.hash for entry in entries[:-1])]
        assert entries[-1].head == Head(5, entries[-1].hash)

    def test_append_returns_the_entry_that_a_reader_finds(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path / "ledger.jsonl", SITE, KEY)
        appended = [ledger.append(kind, body) for kind, body in ENTRIES]
        assert appended == read_ledger(ledger.path, SITE, KEY.public_hex) == list(ledger.entries)
        assert ledger.head == appended[-1].head

    def test_an_outsider_verifies_it_with_nothing_but_the_description(self, data: bytes) -> None:
        prev = "0" * 64
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(KEY.public_hex))
        for seq, line in enumerate(lines_of(data)):
            record = json.loads(line)
            assert by_hand(record) + b"\n" == line
            digest, signature = bytes.fromhex(record.pop("hash")), bytes.fromhex(record.pop("sig"))
            assert hashlib.sha256(b"fedchorus ledger v1\0" + by_hand(record)).digest() == digest
            public.verify(signature, b"fedchorus ledger v1 signature\0" + digest)
            assert (record["v"], record["seq"], record["site"], record["prev"]) == (1, seq, SITE, prev)
            prev = digest.hex()

    def test_the_bytes_never_change(self, data: bytes) -> None:
        # Ed25519 and the clock here are deterministic. Pinned: a change makes every ledger in the field unreadable.
        assert lines_of(data)[0] == GOLDEN_FIRST_LINE
        assert hashlib.sha256(data).hexdigest() == GOLDEN_DIGEST

    def test_a_line_made_by_hand_is_read(self) -> None:
        entry = parse(signed_line(KEY, body={"rows": 1}), SITE, KEY.public_hex)[0]
        assert (entry.kind, entry.body) == ("open", {"rows": 1})

    @settings(max_examples=50, deadline=None)
    @given(
        body=st.dictionaries(
            st.text(max_size=9),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
                max_leaves=6,
            ),
        )
    )
    def test_any_body_of_json_survives(self, body: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            ledger = Ledger(Path(folder) / "ledger.jsonl", SITE, KEY)
            ledger.append("open", body)
            assert read_ledger(ledger.path, SITE, KEY.public_hex)[0].body == body

    def test_times_are_written_in_utc_whatever_the_clock_shows(self, tmp_path: Path) -> None:
        ledger = Ledger(
            tmp_path / "l", SITE, KEY, clock=lambda: datetime.fromisoformat("2026-07-01T12:00:00.123456+02:00")
        )
        assert ledger.append("open", {}).time == "2026-07-01T10:00:00.123+00:00"

    def test_a_missing_or_empty_file_has_no_entries(self, tmp_path: Path) -> None:
        assert not Ledger(tmp_path / "absent", SITE, KEY).entries
        assert Ledger(tmp_path / "absent", SITE, KEY).head is None
        assert not (tmp_path / "absent").exists()
        assert parse(b"", SITE, KEY.public_hex) == []


class TestAppendRefuses:
    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_a_body_with_a_number_that_json_has_not(self, tmp_path: Path, number: float) -> None:
        path = written(tmp_path / "ledger.jsonl", count=2)
        before, ledger = path.read_bytes(), Ledger(path, SITE, KEY)
        with pytest.raises(ValueError, match="JSON compliant"):
            ledger.append("plan", {"epsilon": number})
        assert path.read_bytes() == before
        assert ledger.append("plan", {}).seq == 2

    def test_an_unknown_kind(self, tmp_path: Path) -> None:
        with pytest.raises(LedgerError, match=r"'refund'.*open, budget, plan, reserve, commit, settle$"):
            Ledger(tmp_path / "l", SITE, KEY).append("refund", {})

    def test_what_admit_refuses_and_writes_nothing(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path / "l", SITE, KEY)
        ledger.append("open", {})
        seen = []

        def refuse(entries: tuple[Any, ...]) -> None:
            seen.append(len(entries))
            raise LedgerError("no")

        with pytest.raises(LedgerError, match="no"):
            ledger.append("plan", {}, admit=refuse)
        assert seen == [1]
        assert len(read_ledger(ledger.path, SITE, KEY.public_hex)) == 1


class TestEveryByteCounts:
    @pytest.mark.parametrize("mask", [0x01, 0x02, 0x10, 0x20, 0x80, 0xFF])
    def test_a_flip_anywhere_names_the_entry_whose_line_holds_it(self, data: bytes, mask: int) -> None:
        # Exactly so: a flipped newline joins two lines, or tears the last one, and the first of the two is named.
        unread, prev = data, GENESIS
        for number, entry in enumerate(parse(data, SITE, KEY.public_hex)):
            for position in range(unread.index(b"\n") + 1):
                flipped = bytearray(unread)
                flipped[position] ^= mask
                with pytest.raises(LedgerCorrupt) as caught:
                    parse(bytes(flipped), SITE, KEY.public_hex, first=number, prev=prev)
                assert caught.value.entry == number
            unread, prev = unread[unread.index(b"\n") + 1 :], entry.hash
        assert unread == b""

    @settings(max_examples=150, deadline=None)
    @given(position=st.integers(0), byte=st.integers(0, 255))
    def test_an_inserted_byte_is_noticed_at_its_line_or_the_next(self, data: bytes, position: int, byte: int) -> None:
        position %= len(data) + 1
        entry, _ = first_fault(data[:position] + bytes([byte]) + data[position:])
        assert entry - data[:position].count(b"\n") in (0, 1)

    @settings(max_examples=100, deadline=None)
    @given(position=st.integers(0), length=st.integers(1, 50))
    def test_removed_bytes_are_noticed_at_the_line_where_they_begin(
        self, data: bytes, position: int, length: int
    ) -> None:
        position %= len(data)
        removed = data[position : position + length]
        left = data[:position] + data[position + length :]
        if left in whole_prefixes(data):  # Whole newest entries: only heads kept elsewhere can show that.
            assert parse(left, SITE, KEY.public_hex)
            return
        entry, _ = first_fault(left)
        assert entry == data[:position].count(b"\n"), removed

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=200) | st.lists(st.text(max_size=40)).map(lambda parts: "\n".join(parts).encode()))
    def test_arbitrary_bytes_are_refused_and_nothing_else_is_raised(self, junk: bytes) -> None:
        if junk:
            assert first_fault(junk)[0] >= 0

    @settings(max_examples=300, deadline=None)
    @given(
        field=st.sampled_from(["body", "hash", "kind", "prev", "seq", "sig", "site", "time", "v"]),
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
            max_leaves=3,
        ),
    )
    def test_another_value_in_any_field_is_refused_and_nothing_else_is_raised(
        self, data: bytes, field: str, value: object
    ) -> None:
        record = json.loads(lines_of(data)[0])
        if record[field] != value:
            assert first_fault(json.dumps({**record, field: value}).encode() + b"\n")[0] == 0
            assert first_fault(by_hand({**record, field: value}) + b"\n")[0] == 0


def whole_prefixes(data: bytes) -> list[bytes]:
    lines = lines_of(data)
    return [b"".join(lines[:count]) for count in range(1, len(lines))]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda line: line.replace(b'"rows":105', b'"rows": 105'),
        lambda line: line.replace(b'"rows":105', b'"rows":105.0'),
        lambda line: line.replace(b'"rows":105', b'"rows":1.05e2'),
        lambda line: line.replace(b'"rows":105', b'"rows":1,"rows":105'),
        lambda line: line.replace(b'"seq":0', b'"seq":-0'),
        lambda line: line.replace(b'"kind"', b'"\\u006bind"'),
        lambda line: line.replace(b"\n", b" \n"),
        lambda line: line.replace(b"\n", b"\r\n"),
        lambda line: b" " + line,
        lambda line: b"\xef\xbb\xbf" + line,
        lambda line: json.dumps(json.loads(line)).encode() + b"\n",
        lambda line: line.rstrip(b"\n").decode().encode("utf-16") + b"\n",
        lambda line: line.replace(b'"v":1', b'"v":1,"note":"x"'),
        lambda line: with_field(line, "hash", str.upper),
        lambda line: with_field(line, "sig", str.upper),
        lambda line: with_field(line, "sig", lambda text: text[:64] + " " + text[64:]),
        lambda line: with_field(line, "sig", lambda text: text[:-2]),
        lambda line: with_field(line, "sig", lambda text: text + "00"),
        lambda line: with_field(line, "sig", lambda text: ""),
        lambda line: with_field(line, "sig", lambda text: None),
        lambda line: with_field(line, "sig", lambda text: [text]),
        lambda line: with_field(line, "sig", lambda text: "zz" * 64),
    ],
)
def test_the_same_content_in_other_bytes_is_refused(data: bytes, rewrite: Callable[[bytes], bytes]) -> None:
    first, *rest = lines_of(data)
    assert rewrite(first) != first
    assert first_fault(rewrite(first) + b"".join(rest))[0] == 0


def with_field(line: bytes, field: str, change: Callable[[str], object]) -> bytes:
    record = json.loads(line)
    return by_hand({**record, field: change(record[field])}) + b"\n"


class TestEntriesInTheirPlaces:
    @pytest.mark.parametrize("number", range(5))
    def test_a_deleted_entry_is_missed_where_it_was(self, data: bytes, number: int) -> None:
        lines = lines_of(data)
        del lines[number]
        assert first_fault(b"".join(lines)) == (
            number,
            f"it carries number {number + 1}: an entry was deleted, repeated or moved",
        )

    @given(order=st.permutations(range(6)))
    def test_entries_in_another_order_are_noticed_at_the_first_out_of_place(
        self, data: bytes, order: list[int]
    ) -> None:
        lines = lines_of(data)
        shuffled = b"".join(lines[number] for number in order)
        if order == list(range(6)):
            assert len(parse(shuffled, SITE, KEY.public_hex)) == 6
        else:
            entry, why = first_fault(shuffled)
            assert entry == next(place for place, number in enumerate(order) if place != number)
            assert f"number {order[entry]}" in why

    @pytest.mark.parametrize("number", range(6))
    @pytest.mark.parametrize("place", range(7))
    def test_a_repeated_entry_is_noticed_where_it_repeats(self, data: bytes, number: int, place: int) -> None:
        lines = lines_of(data)
        lines.insert(place, lines[number])
        # A copy put right before the original is the same file as one put right after it.
        assert first_fault(b"".join(lines))[0] == (place + 1 if place == number else place)

    @pytest.mark.parametrize("number", range(6))
    def test_an_entry_of_another_history_of_the_same_site_is_refused(
        self, data: bytes, tmp_path: Path, number: int
    ) -> None:
        # The site itself, with its own key, in a ledger that differs in entry 0: a restored backup that went on.
        fork = Ledger(tmp_path / "fork.jsonl", SITE, KEY)
        for kind, body in ENTRIES:
            fork.append(kind, {**body, "fork": True})
        lines, other = lines_of(data), lines_of(fork.path.read_bytes())
        lines[number] = other[number]
        if number == 0:  # It begins a chain of its own: what follows does not follow it.
            assert first_fault(b"".join(lines))[0] == 1
        else:
            assert first_fault(b"".join(lines)) == (
                number,
                "it does not follow the entry before it: an entry was deleted, replaced or moved",
            )

    def test_another_site_s_entry_is_refused_even_under_the_same_key(self, data: bytes, tmp_path: Path) -> None:
        other = written(tmp_path / "other.jsonl", site="county-hospital").read_bytes()
        assert first_fault(other) == (0, "it belongs to the ledger of county-hospital")
        lines = lines_of(data)
        lines[3] = signed_line(KEY, seq=3, prev=json.loads(lines[2])["hash"], site="county-hospital", kind="commit")
        assert first_fault(b"".join(lines)) == (3, "it belongs to the ledger of county-hospital")

    def test_a_ledger_signed_by_another_key_is_refused_from_its_first_entry(self, tmp_path: Path) -> None:
        forged = written(tmp_path / "forged.jsonl", key=OTHER_KEY).read_bytes()
        assert parse(forged, SITE, OTHER_KEY.public_hex)
        entry, why = first_fault(forged)
        assert entry == 0
        assert why == f"its signature is not by {SITE}'s key {KEY.public_hex[:16]}..."

    @pytest.mark.parametrize("number", range(6))
    def test_one_entry_signed_by_another_key_is_refused(self, data: bytes, number: int) -> None:
        lines = lines_of(data)
        record = json.loads(lines[number])
        lines[number] = signed_line(OTHER_KEY, **{k: v for k, v in record.items() if k not in ("hash", "sig")})
        assert json.loads(lines[number])["hash"] == record["hash"]
        entry, why = first_fault(b"".join(lines))
        assert entry == number
        assert "signature" in why

    def test_a_changed_body_with_its_hash_made_to_fit_fails_by_its_signature(self, data: bytes) -> None:
        lines = lines_of(data)
        record = json.loads(lines[2])
        record["body"]["rounds"] = 1000
        signature = record.pop("sig")
        del record["hash"]
        digest = hashlib.sha256(b"fedchorus ledger v1\0" + by_hand(record)).hexdigest()
        lines[2] = by_hand({**record, "hash": digest, "sig": signature}) + b"\n"
        entry, why = first_fault(b"".join(lines))
        assert (entry, "signature" in why) == (2, True)

    def test_a_signature_made_for_something_else_is_no_signature_of_an_entry(self, data: bytes) -> None:
        # Domain separation: a signature over the bare hash is worth nothing.
        record = json.loads(lines_of(data)[0])
        bare = {**record, "sig": KEY.sign(bytes.fromhex(record["hash"])).hex()}
        assert "signature" in first_fault(by_hand(bare) + b"\n")[1]

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"v": 2}, "format version 2; this program reads version 1"),
            ({"v": "1"}, "format version '1'; this program reads version 1"),
            ({"v": None}, "format version None; this program reads version 1"),
            ({"kind": "refund"}, "unknown kind of entry 'refund'"),
            ({"kind": ["open"]}, "unknown kind of entry ['open']"),
            ({"body": [1]}, "unknown kind of entry 'open'"),
            ({"body": None}, "unknown kind of entry 'open'"),
            ({"seq": 1}, "it carries number 1: an entry was deleted, repeated or moved"),
            ({"seq": "0"}, "it carries number 0: an entry was deleted, repeated or moved"),
            ({"seq": None}, "it carries number None: an entry was deleted, repeated or moved"),
            ({"prev": "1" * 64}, "it does not follow the entry before it: an entry was deleted, replaced or moved"),
            ({"prev": None}, "it does not follow the entry before it: an entry was deleted, replaced or moved"),
            ({"site": None}, "it belongs to the ledger of None"),
            ({"extra": 1}, "its fields are not those of a ledger entry"),
            ({"body": {"epsilon": math.nan}}, "its bytes are not in canonical form: changed after it was written"),
            ({"body": {"epsilon": math.inf}}, "its bytes are not in canonical form: changed after it was written"),
        ],
    )
    def test_the_site_s_own_signature_does_not_make_nonsense_an_entry(self, fields: dict[str, Any], why: str) -> None:
        assert first_fault(signed_line(KEY, **fields)) == (0, why)

    @pytest.mark.parametrize("opening", [b"[", b'{"body":', b'{"":[', b'[{"v":'])
    def test_nesting_without_end_is_a_fault_of_the_entry_and_not_of_the_reader(self, opening: bytes) -> None:
        assert first_fault(opening * 100_000 + b"\n") == (0, "not a line of JSON")

    def test_a_number_too_long_to_read_is_a_fault_of_the_entry(self) -> None:
        assert first_fault(b'{"v":' + b"9" * 5000 + b"}\n") == (0, "not a line of JSON")

    @pytest.mark.parametrize("count", range(6))
    def test_cutting_whole_newest_entries_leaves_a_valid_chain_that_only_a_kept_head_tells_apart(
        self, data: bytes, count: int
    ) -> None:
        entries = parse(data, SITE, KEY.public_hex)
        cut = parse(b"".join(lines_of(data)[:count]), SITE, KEY.public_hex)
        assert cut == entries[:count]
        assert entries[-1].head not in [entry.head for entry in cut]

    def test_a_later_part_is_verified_from_where_the_reader_stopped(self, data: bytes) -> None:
        entries, rest = parse(data, SITE, KEY.public_hex), b"".join(lines_of(data)[2:])
        assert parse(rest, SITE, KEY.public_hex, first=2, prev=entries[1].hash) == entries[2:]
        for first, prev in [(3, entries[1].hash), (2, entries[0].hash), (2, GENESIS)]:
            with pytest.raises(LedgerCorrupt):
                parse(rest, SITE, KEY.public_hex, first=first, prev=prev)


class TestTornLine:
    """A crash in the middle of a write leaves a part of a line, which was never acknowledged."""

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
    def test_is_left_alone_by_views_and_dropped_by_the_next_append(
        self, data: bytes, tmp_path: Path, share: float
    ) -> None:
        path, lines = tmp_path / "ledger.jsonl", lines_of(data)
        torn = lines[3][: max(1, round(share * (len(lines[3]) - 1)))]
        path.write_bytes(b"".join(lines[:3]) + torn)

        view = LedgerView(path, SITE, KEY.public_hex)
        view.refresh()
        assert len(view.entries) == 3
        with pytest.raises(LedgerCorrupt, match="entry 3: the last line is cut off"):
            read_ledger(path, SITE, KEY.public_hex)
        ledger = Ledger(path, SITE, KEY)
        assert len(ledger.entries) == 3
        assert path.read_bytes() == b"".join(lines[:3]) + torn

        appended = ledger.append("commit", {"round": 99})
        assert appended.seq == 3
        assert read_ledger(path, SITE, KEY.public_hex)[-1] == appended
        view.refresh()
        assert view.entries == ledger.entries

    def test_a_torn_first_line_leaves_a_ledger_that_begins_afresh(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "ledger.jsonl"
        path.write_bytes(data[:100])
        ledger = Ledger(path, SITE, KEY)
        assert not ledger.entries
        assert ledger.append("open", {}).seq == 0
        assert len(read_ledger(path, SITE, KEY.public_hex)) == 1

    def test_a_refused_append_leaves_it_where_it_is(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "ledger.jsonl"
        path.write_bytes(data[:-10])
        ledger = Ledger(path, SITE, KEY)

        def refuse(entries: tuple[Any, ...]) -> None:
            raise LedgerError("no")

        with pytest.raises(LedgerError, match="no"):
            ledger.append("commit", {}, admit=refuse)
        assert path.read_bytes() == data[:-10]


class TestViews:
    def test_see_what_another_end_appended_after_a_refresh_and_not_before(self, tmp_path: Path) -> None:
        path = written(tmp_path / "ledger.jsonl", count=2)
        ledger, view = Ledger(path, SITE, KEY), LedgerView(path, SITE, KEY.public_hex)
        assert not view.entries
        assert view.head is None
        view.refresh()
        assert view.entries == ledger.entries
        entry = ledger.append("reserve", {})
        assert len(view.entries) == 2
        view.refresh()
        view.refresh()
        assert list(view.entries[2:]) == [entry]
        assert view.head == entry.head

    def test_say_so_when_the_file_became_shorter(self, tmp_path: Path) -> None:
        path = written(tmp_path / "ledger.jsonl")
        ledger, view = Ledger(path, SITE, KEY), LedgerView(path, SITE, KEY.public_hex)
        view.refresh()
        cut = b"".join(lines_of(path.read_bytes())[:-1])
        path.write_bytes(cut)
        for act in (view.refresh, ledger.refresh, lambda: ledger.append("commit", {})):
            with pytest.raises(LedgerError, match="became shorter while it was open"):
                act()
        assert path.read_bytes() == cut

    def test_notice_a_new_line_that_does_not_continue_the_chain(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "ledger.jsonl"
        path.write_bytes(data)
        view = LedgerView(path, SITE, KEY.public_hex)
        view.refresh()
        path.write_bytes(data + lines_of(data)[5])
        with pytest.raises(LedgerCorrupt) as caught:
            view.refresh()
        assert caught.value.entry == 6
        assert len(view.entries) == 6

    @pytest.mark.parametrize("number", range(6))
    def test_a_site_never_opens_nor_continues_a_ledger_that_was_tampered_with(
        self, data: bytes, tmp_path: Path, number: int
    ) -> None:
        lines = lines_of(data)
        lines[number] = lines[number].replace(b'"time":"2026', b'"time":"2025')
        path = tmp_path / "ledger.jsonl"
        path.write_bytes(b"".join(lines))
        with pytest.raises(LedgerCorrupt) as caught:
            Ledger(path, SITE, KEY)
        assert caught.value.entry == number
        assert path.read_bytes() == b"".join(lines)

    def test_a_site_does_not_open_a_ledger_with_a_new_key(self, tmp_path: Path) -> None:
        with pytest.raises(LedgerCorrupt, match="entry 0: its signature"):
            Ledger(written(tmp_path / "ledger.jsonl"), SITE, OTHER_KEY)


APPEND_WITHOUT_END = """
import sys
from pathlib import Path
from privacy.keys import IdentityKey
from privacy.ledger import Ledger

path, key, name, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
ledger = Ledger(path, "city-hospital", IdentityKey.load(key))
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    entry = ledger.append("reserve", {"by": name, "number": number, "filler": "x" * 3000})
    print(entry.seq, flush=True)
"""


@contextlib.contextmanager
def appending(path: Path, key: Path, name: str, count: int) -> Iterator[subprocess.Popen[str]]:
    """Another process, ready to append; once let go, it prints each entry's number when `append` has returned."""
    command = [sys.executable, "-c", APPEND_WITHOUT_END, str(path), str(key), name, str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


class TestCrashesAndCompany:
    def test_kill_minus_nine_loses_nothing_that_was_acknowledged(self, tmp_path: Path) -> None:
        path, key_file = tmp_path / "ledger.jsonl", tmp_path / "identity.pem"
        key, acknowledged = IdentityKey.create(key_file), list[int]()
        for life, wanted in enumerate([1, 7, 20, 33]):
            with appending(path, key_file, f"life {life}", 10**6) as process:
                assert process.stdout is not None
                let_go(process)
                acknowledged += [int(process.stdout.readline()) for _ in range(wanted)]
                process.send_signal(signal.SIGKILL)
                acknowledged += [int(line) for line in process.stdout.read().splitlines()]
            view = LedgerView(path, SITE, key.public_hex)
            view.refresh()
            assert len(view.entries) - len(set(acknowledged)) in range(life + 2)  # One a life may be unacknowledged.
            assert set(acknowledged) <= {entry.seq for entry in view.entries}
        assert len(set(acknowledged)) == len(acknowledged)
        last = Ledger(path, SITE, key).append("commit", {})
        assert read_ledger(path, SITE, key.public_hex)[-1] == last

    def test_processes_appending_at_once_lose_nothing_of_each_other(self, tmp_path: Path) -> None:
        path, key_file, count = tmp_path / "ledger.jsonl", tmp_path / "identity.pem", 150
        key = IdentityKey.create(key_file)
        with appending(path, key_file, "a", count) as a, appending(path, key_file, "b", count) as b:
            let_go(a)
            let_go(b)
            printed = {"a": a.communicate(timeout=60)[0], "b": b.communicate(timeout=60)[0]}
        entries = read_ledger(path, SITE, key.public_hex)
        assert len(entries) == 2 * count
        for name, numbers in printed.items():
            own = [entry for entry in entries if entry.body["by"] == name]
            assert [entry.body["number"] for entry in own] == list(range(count))
            assert [entry.seq for entry in own] == [int(number) for number in numbers.split()]
        changes = sum(one.body["by"] != next.body["by"] for one, next in itertools.pairwise(entries))
        assert changes > 1  # They did take turns.

    def test_threads_sharing_one_ledger_lose_nothing_of_each_other(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path / "ledger.jsonl", SITE, KEY)
        appended, failures = list[int](), list[BaseException]()
        stop = threading.Event()

        def append(name: int) -> None:
            try:
                appended.extend(ledger.append("reserve", {"by": name, "number": n}).seq for n in range(25))
            except LedgerError as error:
                failures.append(error)

        def watch() -> None:
            try:
                while not stop.is_set():
                    ledger.refresh()
            except LedgerError as error:
                failures.append(error)

        writers = [threading.Thread(target=append, args=(name,)) for name in range(3)]
        readers = [threading.Thread(target=watch) for _ in range(2)]
        for thread in [*writers, *readers]:
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
        assert failures == []
        assert sorted(appended) == list(range(75))
        assert ledger.entries == tuple(read_ledger(ledger.path, SITE, KEY.public_hex))

    def test_an_entry_is_on_disk_before_append_returns(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Patched because durability leaves no other trace short of pulling a plug.
        synced: list[bytes] = []
        path, fsync = tmp_path / "ledger.jsonl", os.fsync

        def recorded(descriptor: int) -> None:
            fsync(descriptor)
            synced.append(b"folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else path.read_bytes())

        monkeypatch.setattr(os, "fsync", recorded)
        ledger = Ledger(path, SITE, KEY)
        ledger.append("open", {})
        assert synced == [path.read_bytes(), b"folder"]  # The new name, too, must survive.
        ledger.append("plan", {})
        assert synced[2:] == [path.read_bytes()]


class TestCanonicalForm:
    def test_is_sorted_compact_ascii_with_the_shortest_floats(self) -> None:
        record = {"b": [1, 2.5, 1e-05, 1e22, None, True], "a": {"é": "\u2028\n"}}
        assert canonical(record) == b'{"a":{"\\u00e9":"\\u2028\\n"},"b":[1,2.5,1e-05,1e+22,null,true]}'

    def test_a_digest_is_of_the_canonical_form(self) -> None:
        assert digest_of({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_there_is_none_for_numbers_that_json_has_not(self, number: float) -> None:
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical({"x": number})


def pem(private: Any, encryption: KeySerializationEncryption | None = None) -> bytes:
    content: bytes = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return content


class TestIdentityKey:
    @pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC_8032)
    def test_signs_as_published(self, secret: str, public: str, message: str, signature: str) -> None:
        key = IdentityKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)))
        assert key.public_hex == public
        assert key.sign(bytes.fromhex(message)).hex() == signature
        assert is_signed_by(public, bytes.fromhex(signature), bytes.fromhex(message))
        assert not is_signed_by(public, bytes.fromhex(signature), bytes.fromhex(message) + b"!")
        assert not is_signed_by(KEY.public_hex, bytes.fromhex(signature), bytes.fromhex(message))

    @pytest.mark.parametrize("public", ["", "00", "zz" * 32, "00" * 31, "00" * 33, "é"])
    def test_malformed_public_keys_have_signed_nothing(self, public: str) -> None:
        assert not is_signed_by(public, bytes(64), b"")

    @pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65)])
    def test_malformed_signatures_sign_nothing(self, signature: bytes) -> None:
        assert not is_signed_by(KEY.public_hex, signature, b"")

    def test_is_the_same_after_a_restart(self, tmp_path: Path) -> None:
        created = IdentityKey.create(tmp_path / "site" / "identity.pem")
        assert IdentityKey.load(tmp_path / "site" / "identity.pem").public_hex == created.public_hex

    def test_no_two_are_alike(self, tmp_path: Path) -> None:
        assert len({IdentityKey.create(tmp_path / str(number)).public_hex for number in range(5)}) == 5

    def test_its_file_is_readable_by_its_owner_alone_whatever_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            IdentityKey.create(tmp_path / "identity.pem")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "identity.pem").stat().st_mode) == 0o600

    def test_never_overwrites_a_key(self, tmp_path: Path) -> None:
        path = tmp_path / "identity.pem"
        IdentityKey.create(path)
        before = path.read_bytes()
        with pytest.raises(FileExistsError):
            IdentityKey.create(path)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_cannot_be_duplicated(self, duplicate: Callable[[IdentityKey], object]) -> None:
        with pytest.raises(TypeError, match="stays in its file"):
            duplicate(KEY)

    def test_shows_its_public_half_alone(self) -> None:
        assert repr(KEY) == str(KEY) == f"IdentityKey(public={KEY.public_hex})"
        assert ("01" * 32) not in repr(KEY)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "not an Ed25519 private key"),
            (b"SECRET-BYTES", "not an Ed25519 private key"),
            (b"\xff\xfe\x00SECRET-BYTES", "not an Ed25519 private key"),
            (
                b"-----BEGIN PRIVATE KEY-----\nU0VDUkVULUJZVEVT\n-----END PRIVATE KEY-----\n",
                "not an Ed25519 private key",
            ),
            (pem(Ed25519PrivateKey.from_private_bytes(bytes(32)))[:60], "not an Ed25519 private key"),
            (
                Ed25519PrivateKey.from_private_bytes(bytes(32))
                .public_key()
                .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
                "not an Ed25519 private key",
            ),
            (pem(Ed25519PrivateKey.generate(), BestAvailableEncryption(b"hunter2")), "not an Ed25519 private key"),
            (pem(x25519.X25519PrivateKey.generate()), "expected an Ed25519 key, found another kind"),
            (pem(rsa.generate_private_key(65537, 2048)), "expected an Ed25519 key, found another kind"),
        ],
    )
    def test_a_wrong_file_is_refused_in_one_line_without_its_bytes(
        self, tmp_path: Path, content: bytes, expected: str
    ) -> None:
        path = tmp_path / "identity.pem"
        path.write_bytes(content)
        with pytest.raises(LedgerError, match=expected) as caught:
            IdentityKey.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        # Neither the message nor what a traceback would chain to it repeats the file.
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        words = [word for word in content.split() if len(word) >= 10]
        assert not [word for word in words if word.decode("latin-1") in str(caught.value)]

    def test_a_missing_file_says_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(LedgerError, match="restore it from the site's backup"):
            IdentityKey.load(tmp_path / "identity.pem")

    def test_a_folder_in_its_place_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(LedgerError, match=str(tmp_path)):
            IdentityKey.load(tmp_path)


GOLDEN_FIRST_LINE = (
    b'{"body":{"dataset":"records","public_key":"8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b'
    b'40f6f5c","rows":105,"simulation":true},"hash":"fde094d3484bae4c312be32e3753b6379880fd02b264e86974928'
    b'7cb39e1d747","kind":"open","prev":"0000000000000000000000000000000000000000000000000000000000000000"'
    b',"seq":0,"sig":"971cc77480064a24178f5fcfa479c6a4b5e0e1349cb272bece81156f91e2e4b5a6834dd8c127d2977bb6'
    b'2f2e986040f829161135eccc923793969bb099342c05","site":"city-hospital","time":"2026-01-02T03:04:06.000'
    b'+00:00","v":1}\n'
)
GOLDEN_DIGEST = "4b9f7445b50577c857a0c31518154616ccd6324e06e9c79bd8ce620fef27b2fa"
