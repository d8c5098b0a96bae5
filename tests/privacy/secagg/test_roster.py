"""A roster is trusted when all in it signed exactly it and its hash is the pinned one; anything else is refused."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import JobError, Refused
from privacy.keys import IdentityKey
from privacy.secagg.roster import MAX_BYTES, Member, Roster

NAMES = ("berlin", "lyon", "zurich")
KEYS = {
    name: IdentityKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n, name in enumerate(NAMES, start=1)
}
STRANGER = IdentityKey(Ed25519PrivateKey.from_private_bytes(b"s" * 32))
UNSIGNED = Roster("cancer", 3, tuple(Member(7 * n, name, KEYS[name].public_hex) for n, name in enumerate(NAMES, 1)))


def signed(roster: Roster = UNSIGNED, *, by: tuple[str, ...] = NAMES) -> Roster:
    for name in by:
        roster = roster.signed_by(KEYS[name], name)
    return roster


ROSTER = signed()


class TestCheck:
    def test_accepts_what_all_signed_and_the_client_pinned(self) -> None:
        ROSTER.check(UNSIGNED.hash)
        ROSTER.check(None)

    @pytest.mark.parametrize("missing", NAMES)
    def test_names_who_has_not_signed(self, missing: str) -> None:
        with pytest.raises(Refused, match=f"{missing} has not signed"):
            signed(by=tuple(name for name in NAMES if name != missing)).check(UNSIGNED.hash)

    @pytest.mark.parametrize(
        "change",
        [
            lambda roster: replace(roster, federation="cancer2"),
            lambda roster: replace(roster, version=4),
            lambda roster: replace(roster, members=(replace(roster.members[0], slot=1), *roster.members[1:])),
            lambda roster: replace(roster, members=(*roster.members, Member(1, "mallory", STRANGER.public_hex))),
            lambda roster: replace(roster, members=(*roster.members[:2], replace(roster.members[2], key="1" * 64))),
        ],
    )
    def test_nothing_can_be_changed_after_signing(self, change: Callable[[Roster], Roster]) -> None:
        changed = change(ROSTER)
        with pytest.raises(Refused, match="pinned here"):
            changed.check(ROSTER.hash)
        with pytest.raises(Refused, match=r"signature is not over this|mallory has not signed"):
            changed.check(None)
        with pytest.raises(Refused, match=r"signature is not over this|mallory has not signed"):
            changed.check(changed.hash)

    def test_a_server_s_own_roster_with_good_signatures_is_not_the_pinned_one(self) -> None:
        own = replace(
            UNSIGNED,
            members=tuple(
                replace(m, key=KEYS[n].public_hex) for m, n in zip(UNSIGNED.members, NAMES[::-1], strict=True)
            ),
        )
        own = replace(own, signatures={})
        for member, name in zip(own.members, NAMES[::-1], strict=True):
            own = own.signed_by(KEYS[name], member.name)
        own.check(None)
        with pytest.raises(Refused, match=f"hash is {own.hash}, the one pinned here is {ROSTER.hash}"):
            own.check(ROSTER.hash)

    @pytest.mark.parametrize("pinned", ["", "0" * 64, ROSTER.hash.upper(), ROSTER.hash[:63]])
    def test_only_the_whole_hash_is_the_pin(self, pinned: str) -> None:
        with pytest.raises(Refused, match="pinned here"):
            ROSTER.check(pinned)

    @given(st.sampled_from(NAMES), st.integers(0, 511))
    def test_every_bit_of_every_signature_counts(self, name: str, bit: int) -> None:
        flipped = int(ROSTER.signatures[name], 16) ^ 1 << bit
        forged = replace(ROSTER, signatures={**ROSTER.signatures, name: f"{flipped:0128x}"})
        with pytest.raises(Refused, match=f"{name}'s signature"):
            forged.check(ROSTER.hash)

    def test_a_signature_is_no_other_member_s(self) -> None:
        swapped = {**ROSTER.signatures, "lyon": ROSTER.signatures["berlin"]}
        with pytest.raises(Refused, match="lyon's signature"):
            replace(ROSTER, signatures=swapped).check(ROSTER.hash)

    @pytest.mark.parametrize("key", ["02" + "00" * 31, "ff" * 32])  # y = 2 has no x; 2^256 - 1 is no field element.
    def test_a_key_that_is_no_point_of_the_curve_verifies_nothing(self, key: str) -> None:
        roster = replace(UNSIGNED, members=(*UNSIGNED.members[:2], Member(21, "zurich", key)), signatures={})
        roster = signed(roster, by=("berlin", "lyon"))
        with pytest.raises(Refused, match="zurich's signature") as caught:
            replace(roster, signatures={**roster.signatures, "zurich": "01" + "00" * 63}).check(None)
        assert key not in str(caught.value)


class TestSigning:
    def test_returns_another_roster_and_leaves_the_hash(self) -> None:
        one = UNSIGNED.signed_by(KEYS["lyon"], "lyon")
        assert (set(one.signatures), set(UNSIGNED.signatures), one.hash) == ({"lyon"}, set(), UNSIGNED.hash)

    def test_refuses_to_sign_for_a_member_with_another_key(self) -> None:
        with pytest.raises(Refused, match="lyon's key in it is not the identity key") as caught:
            UNSIGNED.signed_by(STRANGER, "lyon")
        assert STRANGER.public_hex not in str(caught.value)
        assert KEYS["lyon"].public_hex not in str(caught.value)

    def test_refuses_to_sign_for_a_stranger(self) -> None:
        with pytest.raises(Refused, match="no member is called 'mallory'"):
            UNSIGNED.signed_by(STRANGER, "mallory")

    def test_hash_and_signature_are_over_the_documented_bytes(self) -> None:
        body = (
            '{"federation":"cancer","format":"fedchorus roster 1","members":['
            + ",".join(f'{{"key":"{KEYS[n].public_hex}","name":"{n}","slot":{7 * i}}}' for i, n in enumerate(NAMES, 1))
            + '],"version":3}'
        )
        digest = hashlib.sha256(body.encode())
        assert ROSTER.hash == digest.hexdigest()
        Ed25519PrivateKey.from_private_bytes(b"\1" * 32).public_key().verify(
            bytes.fromhex(ROSTER.signatures["berlin"]), b"fedchorus roster v1 signature\0" + digest.digest()
        )

    def test_the_order_in_which_members_are_listed_changes_nothing(self) -> None:
        assert Roster("cancer", 3, UNSIGNED.members[::-1]) == UNSIGNED


class TestLookUp:
    def test_finds_members_by_name_and_by_slot(self) -> None:
        assert [ROSTER.member(name).slot for name in NAMES] == [7, 14, 21]
        assert [ROSTER.slot(slot).name for slot in (7, 14, 21)] == list(NAMES)

    def test_refuses_strangers(self) -> None:
        with pytest.raises(Refused, match="no member is called 'mallory'"):
            ROSTER.member("mallory")
        with pytest.raises(Refused, match="no member has slot 8"):
            ROSTER.slot(8)


class TestForm:
    @pytest.mark.parametrize("slot", [0, -1, 2**16, 1.0, "1", True, None])
    def test_a_slot_is_a_number_of_sixteen_bits_above_zero(self, slot: Any) -> None:
        with pytest.raises(Refused, match="slot must be"):
            Member(slot, "lyon", "0" * 64)

    @pytest.mark.parametrize("name", ["", ".a", "a b", "a/b", "a\n", "é", "a" * 65, 5, None])
    def test_a_name_is_safe_in_a_path_a_table_and_a_log(self, name: Any) -> None:
        with pytest.raises(Refused, match="no name"):
            Member(1, name, "0" * 64)
        with pytest.raises(Refused, match="no name"):
            Roster(name, 1, UNSIGNED.members)

    @pytest.mark.parametrize("key", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", b"0" * 64, None])
    def test_a_key_is_sixty_four_lower_case_digits(self, key: Any) -> None:
        with pytest.raises(Refused, match="key must be 64"):
            Member(1, "lyon", key)

    @pytest.mark.parametrize("version", [0, -1, 2**31, 1.0, "1", True])
    def test_a_version_is_a_number_above_zero(self, version: Any) -> None:
        with pytest.raises(Refused, match="version must be"):
            Roster("cancer", version, UNSIGNED.members)

    @pytest.mark.parametrize(
        ("second", "what"),
        [
            (Member(7, "lyon", "2" * 64), "slot"),
            (Member(8, "berlin", "2" * 64), "name"),
            (Member(8, "lyon", "1" * 64), "key"),
            (Member(7, "berlin", "1" * 64), "slot"),
        ],
    )
    def test_nobody_sits_twice(self, second: Member, what: str) -> None:
        with pytest.raises(Refused, match=f"berlin and {second.name} have the same {what}"):
            Roster("cancer", 1, (Member(7, "berlin", "1" * 64), second))

    def test_the_same_member_object_twice_is_refused_too(self) -> None:
        with pytest.raises(Refused, match="the same slot"):
            Roster("cancer", 1, (UNSIGNED.members[0],) * 2)

    def test_nobody_signed_is_not_everybody_signed(self) -> None:
        with pytest.raises(Refused, match="no members"):
            Roster("cancer", 1, ())

    @pytest.mark.parametrize(
        "signatures", [{"mallory": "0" * 128}, {"lyon": "0" * 127}, {"lyon": "A" * 128}, {"lyon": None}, {"lyon": ""}]
    )
    def test_a_signature_is_a_member_s_and_whole(self, signatures: Any) -> None:
        with pytest.raises(Refused, match="not by a member, or not 128"):
            replace(UNSIGNED, signatures=signatures)


class TestFile:
    @settings(max_examples=25, deadline=None)
    @given(seats=st.dictionaries(st.integers(1, 2**16 - 1), st.sampled_from(NAMES), min_size=1, max_size=8))
    def test_loads_what_was_saved(self, seats: dict[int, str], tmp_path_factory: pytest.TempPathFactory) -> None:
        members = tuple(Member(slot, f"{name}-{slot}", f"{slot:064x}") for slot, name in seats.items())
        roster = Roster("cancer", 1, members, {members[0].name: "0" * 128})
        path = tmp_path_factory.mktemp("roster") / "new" / "roster.json"
        roster.save(path)
        assert Roster.load(path) == roster
        assert Roster.load(path).hash == roster.hash

    def test_what_was_loaded_still_checks(self, tmp_path: Path) -> None:
        ROSTER.save(tmp_path / "roster.json")
        Roster.load(tmp_path / "roster.json").check(ROSTER.hash)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('{"body"', '{"extra": 1, "body"'),
            ('"signatures"', '"signature"'),
            ('"version": 3', '"version": 3, "expires": 1'),
            ('"version": 3', '"version": 3, "version": 3'),
            ('"version": 3', '"version": "3"'),
            ('"version": 3', '"version": 3.0'),
            ('"version": 3', '"version": NaN'),
            ('"version": 3', '"version": true'),
            ('"version": 3', '"versions": 3'),
            ("fedchorus roster 1", "fedchorus roster 2"),
            ('"slot": 7', '"slot": "7"'),
            ('"slot": 7', '"slot": 14'),
            ('"slot": 7', '"slot": 7, "slot": 8'),
            ('"slot": 7', '"slot": 7, "role": "admin"'),
            ('"name": "lyon"', '"name": ["lyon"]'),
            ('"name": "lyon"', '"name": "berlin"'),
            ('"lyon": "', '"mallory": "'),
            ('"members": [{', '"members": [[], {'),
            ('"members": [{', '"members": [null, {'),
            ('{"body"', '[{"body"'),
            ('{"body"', '{"body": {}, "body"'),
        ],
    )
    def test_a_file_of_another_form_is_refused(self, old: str, new: str, tmp_path: Path) -> None:
        text = json.dumps({"body": ROSTER.body, "signatures": ROSTER.signatures})
        assert text.count(old) == 1
        path = tmp_path / "roster.json"
        path.write_text(text)
        assert Roster.load(path) == ROSTER
        path.write_text(text.replace(old, new))
        with pytest.raises(Refused):
            Roster.load(path)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"null",
            b"[]",
            b"{}",
            b"\xff\xfe",
            b"[" * 100_000,
            b"9" * 5000,
            json.dumps({"body": {**UNSIGNED.body, "members": {}}, "signatures": {}}).encode(),
            json.dumps({"body": UNSIGNED.body, "signatures": []}).encode(),
        ],
    )
    def test_no_roster_at_all_is_refused(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "roster.json").write_bytes(data)
        with pytest.raises(Refused) as caught:
            Roster.load(tmp_path / "roster.json")
        assert "\n" not in str(caught.value)

    def test_a_file_too_large_is_refused_before_it_is_parsed(self, tmp_path: Path) -> None:
        ROSTER.save(tmp_path / "roster.json")
        with open(tmp_path / "roster.json", "ab") as file:
            file.truncate(MAX_BYTES)
            file.truncate(MAX_BYTES + 1)
        with pytest.raises(Refused, match="at most"):
            Roster.load(tmp_path / "roster.json")

    def test_says_that_a_file_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(JobError, match="cannot be read"):
            Roster.load(tmp_path / "roster.json")
