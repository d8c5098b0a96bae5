"""An enrolment's documents are believed whole or not at all: any change, splice or swap of keys is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.authority import Authority, make_csr
from privacy.enrolment import (
    EnrolmentRequest,
    Invitation,
    Kit,
    fingerprint,
    is_fingerprint,
    key_fingerprint,
    split_address,
    with_signatures,
)
from privacy.errors import Refused
from privacy.keys import IdentityKey, TlsKey
from privacy.ledger import digest_of
from privacy.secagg.roster import Member, Roster

NOW = datetime.now(UTC)


def identity(seed: int) -> IdentityKey:
    return IdentityKey(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


COORDINATOR, NORTH, SOUTH, STRANGER, APPROVER = map(identity, range(1, 6))
TLS = TlsKey(ec.generate_private_key(ec.SECP256R1()))


class Exchange:
    """One whole enrolment of the site "north"."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.create(folder / "ca", "cancer", now=NOW)
        self.foreign = Authority.create(folder / "foreign", "cancer", now=NOW)
        self.invitation = Invitation(
            federation="cancer",
            address="server.example:8443",
            authority=self.authority.pem.decode(),
            coordinator=COORDINATOR.public_hex,
            approvers={"dean": APPROVER.public_hex},
            required=1,
        ).signed(COORDINATOR)
        self.request = EnrolmentRequest.make(self.invitation, "north", identity=NORTH, tls=TLS)
        members = (Member(1, "north", NORTH.public_hex), Member(2, "south", SOUTH.public_hex))
        self.roster = Roster("cancer", 1, members)
        self.kit = self.kit_with()

    def kit_with(self, *, authority: Authority | None = None, key: IdentityKey = COORDINATOR, **changes: Any) -> Kit:
        certificate = self.certificate("north", authority)
        made = {"site": "north", "certificate": certificate, "request": self.request.hash, "roster": self.roster}
        return Kit.make(key, **{**made, **changes})

    def certificate(self, site: str, authority: Authority | None = None) -> bytes:
        return (authority or self.authority).issue_client(make_csr(TLS, site), site=site, days=1, now=NOW)

    def parsers(self) -> dict[str, tuple[bytes, Callable[[bytes], Any], IdentityKey]]:
        """By kind: the document, how it is read, and who signed it."""
        return {
            "invitation": (self.invitation.to_bytes(), Invitation.parse, COORDINATOR),
            "request": (
                self.request.to_bytes(),
                lambda data: EnrolmentRequest.parse(data, self.invitation),
                NORTH,
            ),
            "kit": (self.kit.to_bytes(), lambda data: Kit.parse(data, self.request, self.invitation), COORDINATOR),
        }


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    return Exchange(tmp_path_factory.mktemp("exchange"))


FIELDS = {
    "invitation": ["federation", "address", "authority", "coordinator", "approvers", "required", "format"],
    "request": ["federation", "site", "csr", "identity", "nonce", "invitation", "format"],
    "kit": ["federation", "site", "certificate", "request", "roster", "format"],
}
KINDS = pytest.mark.parametrize("kind", list(FIELDS))
EVERY_FIELD = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in FIELDS.items() for name in names]
)


def other_value(exchange: Exchange, kind: str, name: str) -> Any:
    """Another value for a field, of the right form wherever that is possible."""
    return {
        "federation": "cancer2",
        "site": "south",
        "address": "elsewhere.example:8443",
        "authority": exchange.foreign.pem.decode(),
        "coordinator": STRANGER.public_hex,
        "approvers": {"dean": STRANGER.public_hex},
        "required": 0,
        "csr": make_csr(TlsKey(ec.generate_private_key(ec.SECP256R1())), "north").decode(),
        "identity": STRANGER.public_hex,
        "nonce": "0" * 64,
        "invitation": "0" * 64,
        "certificate": exchange.certificate("north").decode(),
        "request": "0" * 64,
        "roster": {"body": replace(exchange.roster, version=2).body, "signatures": {}},
        "format": f"fedchorus {kind} 2",
    }[name]


class TestEachDocument:
    @KINDS
    def test_is_read_back_as_it_was_made(self, exchange: Exchange, kind: str) -> None:
        data, parse, _ = exchange.parsers()[kind]
        document = parse(data)
        assert document == getattr(exchange, kind)
        assert document.to_bytes() == data
        assert set(json.loads(data)["body"]) == set(FIELDS[kind])

    @EVERY_FIELD
    def test_is_refused_when_any_field_was_changed(self, exchange: Exchange, kind: str, name: str) -> None:
        data, parse, _ = exchange.parsers()[kind]
        record = json.loads(data)
        record["body"][name] = other_value(exchange, kind, name)
        with pytest.raises(Refused):
            parse(json.dumps(record).encode())

    @EVERY_FIELD
    @pytest.mark.parametrize("bad", [None, 1.5, -1, True, [], {}, "", "é\n", "\ud800", "x" * 100, {"a": {"b": []}}])
    def test_is_refused_with_a_field_of_another_type_also_if_its_signer_made_it(
        self, exchange: Exchange, kind: str, name: str, bad: Any
    ) -> None:
        if (kind, name, bad) == ("invitation", "approvers", {}):
            bad = {"": APPROVER.public_hex}
        data, parse, signer = exchange.parsers()[kind]
        record = json.loads(data)
        record["body"][name] = bad
        with pytest.raises(Refused) as caught:
            parse(resigned(record, signer))
        assert len(str(caught.value).splitlines()) == 1

    @EVERY_FIELD
    def test_is_refused_with_a_field_too_few_or_too_many(self, exchange: Exchange, kind: str, name: str) -> None:
        data, parse, signer = exchange.parsers()[kind]
        record = json.loads(data)
        extra = {**record, "body": {**record["body"], name + "_": 1}}
        del record["body"][name]
        for changed in (record, extra):
            with pytest.raises(Refused, match=r"expected exactly the fields|expected the format"):
                parse(resigned(changed, signer))

    @KINDS
    def test_is_refused_with_a_field_twice(self, exchange: Exchange, kind: str) -> None:
        data, parse, _ = exchange.parsers()[kind]
        with pytest.raises(Refused, match="no field is given twice"):
            parse(data.replace(b'"federation":', b'"federation": "other", "federation":'))

    @KINDS
    @pytest.mark.parametrize(
        "junk", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 50_000, b'{"body": 1, "signature": 1}']
    )
    def test_is_not_read_from_junk(self, exchange: Exchange, kind: str, junk: bytes) -> None:
        _, parse, _ = exchange.parsers()[kind]
        with pytest.raises(Refused, match=kind):
            parse(junk)

    @KINDS
    def test_of_another_kind_is_refused(self, exchange: Exchange, kind: str) -> None:
        for other, (data, _, _) in exchange.parsers().items():
            if other != kind:
                with pytest.raises(Refused, match="expected the format"):
                    exchange.parsers()[kind][1](data)

    @KINDS
    def test_signed_by_another_key_is_refused(self, exchange: Exchange, kind: str) -> None:
        data, parse, _ = exchange.parsers()[kind]
        with pytest.raises(Refused, match="not signed by"):
            parse(resigned(json.loads(data), STRANGER))

    @KINDS
    @pytest.mark.parametrize("signature", ["", "00" * 64, "zz" * 64, None, 7])
    def test_without_a_good_signature_is_refused(self, exchange: Exchange, kind: str, signature: Any) -> None:
        data, parse, _ = exchange.parsers()[kind]
        with pytest.raises(Refused, match="sign"):
            parse(json.dumps({**json.loads(data), "signature": signature}).encode())

    @pytest.mark.parametrize("kind", ["invitation", "request"])
    def test_is_bounded(self, exchange: Exchange, kind: str) -> None:
        data, parse, _ = exchange.parsers()[kind]
        with pytest.raises(Refused, match="more than 65536 bytes"):
            parse(data + b" " * 2**16)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_of_any_bytes_is_read_or_refused(self, exchange: Exchange, data: st.DataObject) -> None:
        good, parse, _ = exchange.parsers()[data.draw(st.sampled_from(list(FIELDS)))]
        where = data.draw(st.integers(0, len(good) - 1))
        damaged = good[:where] + data.draw(st.binary(max_size=8)) + good[where + data.draw(st.integers(0, 8)) :]
        with contextlib.suppress(Refused):
            parse(damaged)


def resigned(record: dict[str, Any], key: IdentityKey) -> bytes:
    """The record under a signature of `key` over just what it says, as its format has it."""
    try:
        message = f"{record['body'].get('format')} signature\0".encode() + bytes.fromhex(digest_of(record["body"]))
    except UnicodeEncodeError:
        message = b""
    return json.dumps({**record, "signature": key.sign(message).hex()}).encode()


class TestInvitation:
    def test_that_somebody_else_made_has_another_fingerprint(self, exchange: Exchange) -> None:
        forged = replace(exchange.invitation, coordinator=STRANGER.public_hex).signed(STRANGER)
        assert Invitation.parse(forged.to_bytes()) == forged
        assert forged.fingerprint != exchange.invitation.fingerprint

    def test_is_signed_by_the_coordinator_that_it_names_alone(self, exchange: Exchange) -> None:
        with pytest.raises(Refused, match="names another coordinator"):
            exchange.invitation.signed(STRANGER)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"required": 2}, r"required must be a whole number in \[0, 1\]"),
            ({"required": True}, "required must be a whole number"),
            ({"approvers": {"a": "ab" * 32, "b": "ab" * 32}}, "two approvers have the same key"),
            ({"approvers": {"a": "AB" * 32}}, "approver a must be 64 hexadecimal digits"),
            ({"authority": "-----BEGIN CERTIFICATE-----"}, "authority's certificate"),
            ({"address": "server"}, "host:port"),
        ],
    )
    def test_that_makes_no_sense_cannot_be_made(self, exchange: Exchange, changes: Any, expected: str) -> None:
        with pytest.raises(Refused, match=expected):
            replace(exchange.invitation, **changes)


class TestRequest:
    def test_for_another_invitation_of_the_same_coordinator_is_refused(self, exchange: Exchange) -> None:
        other = replace(exchange.invitation, address="new.example:8443").signed(COORDINATOR)
        with pytest.raises(Refused, match="answers another invitation"):
            EnrolmentRequest.parse(exchange.request.to_bytes(), other)

    def test_with_a_swapped_identity_key_is_refused_unless_that_key_signed_it(self, exchange: Exchange) -> None:
        record = json.loads(exchange.request.to_bytes())
        record["body"]["identity"] = STRANGER.public_hex
        with pytest.raises(Refused, match="not signed by the identity key that it names"):
            EnrolmentRequest.parse(resigned(record, NORTH), exchange.invitation)
        taken = EnrolmentRequest.parse(resigned(record, STRANGER), exchange.invitation)
        assert taken.fingerprint != exchange.request.fingerprint  # So the phone call shows it.

    def test_with_a_certificate_request_in_another_name_is_refused(self, exchange: Exchange) -> None:
        record = json.loads(exchange.request.to_bytes())
        record["body"]["csr"] = make_csr(TLS, "south").decode()
        with pytest.raises(Refused, match="in the name of another site"):
            EnrolmentRequest.parse(resigned(record, NORTH), exchange.invitation)

    def test_is_another_one_each_time(self, exchange: Exchange) -> None:
        again = EnrolmentRequest.make(exchange.invitation, "north", identity=NORTH, tls=TLS)
        assert again.nonce != exchange.request.nonce
        assert again.fingerprint != exchange.request.fingerprint

    def test_holds_no_private_half(self, exchange: Exchange) -> None:
        assert b"PRIVATE" not in exchange.request.to_bytes()


class TestKit:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (lambda e: {"site": "south", "certificate": e.certificate("south")}, "it is for south of cancer, this is"),
            (lambda e: {"request": "0" * 64}, "answers another request"),
            (lambda e: {"certificate": e.certificate("south")}, "its certificate is another site's"),
            (lambda e: {"authority": e.foreign}, "not issued by this federation's authority"),
            (lambda e: {"certificate": b"junk"}, "certificate"),
            (lambda e: {"certificate": e.authority.pem}, "client certificate"),
            (lambda e: {"key": STRANGER}, "not signed by the coordinator"),
            (
                lambda e: {"roster": Roster("cancer", 1, (Member(1, "north", STRANGER.public_hex),))},
                "another identity key for north",
            ),
            (
                lambda e: {"roster": Roster("other", 1, (Member(1, "north", NORTH.public_hex),))},
                "it is for north of other",
            ),
        ],
    )
    def test_that_is_not_the_answer_to_this_site_is_refused(
        self, exchange: Exchange, changes: Callable[[Exchange], dict[str, Any]], expected: str
    ) -> None:
        kit = exchange.kit_with(**changes(exchange))
        with pytest.raises(Refused, match=expected):
            Kit.parse(kit.to_bytes(), exchange.request, exchange.invitation)

    def test_without_the_site_in_its_roster_cannot_be_made(self, exchange: Exchange) -> None:
        with pytest.raises(Refused, match="no member is called 'north'"):
            exchange.kit_with(roster=Roster("cancer", 1, (Member(2, "south", SOUTH.public_hex),)))

    def test_with_a_roster_of_another_federation_is_refused(self, exchange: Exchange) -> None:
        record = json.loads(exchange.kit.to_bytes())
        record["body"]["roster"]["body"]["federation"] = "other"
        with pytest.raises(Refused, match="its roster is of another federation"):
            Kit.parse(resigned(record, COORDINATOR), exchange.request, exchange.invitation)

    def test_brings_the_signatures_that_there_are(self, exchange: Exchange) -> None:
        kit = exchange.kit_with(roster=exchange.roster.signed_by(SOUTH, "south"))
        parsed = Kit.parse(kit.to_bytes(), exchange.request, exchange.invitation)
        assert list(parsed.participants.signatures) == ["south"]


class TestFingerprint:
    def test_is_the_first_160_bits_in_ten_groups(self) -> None:
        digest = hashlib.sha256(b"abc").hexdigest()  # FIPS 180-4, example.
        assert fingerprint(digest) == "ba78 16bf 8f01 cfea 4141 40de 5dae 2223 b003 61a3"

    def test_of_a_key_is_that_of_its_bytes(self) -> None:
        digest = hashlib.sha256(bytes.fromhex(NORTH.public_hex)).hexdigest()
        assert key_fingerprint(NORTH.public_hex) == fingerprint(digest)

    @given(digest=st.binary(min_size=32, max_size=32), separator=st.sampled_from(["", " ", "-", ":", "\t", "  "]))
    def test_is_recognised_however_it_is_typed(self, digest: bytes, separator: str) -> None:
        shown = fingerprint(digest.hex())
        assert is_fingerprint(shown.replace(" ", separator), shown)
        assert is_fingerprint(f" {shown.upper()}\n", shown)

    @given(digest=st.binary(min_size=32, max_size=32), where=st.integers(0, 39))
    def test_is_not_another_one_or_a_part_of_it(self, digest: bytes, where: int) -> None:
        shown = fingerprint(digest.hex())
        digits = shown.replace(" ", "")
        wrong = digits[:where] + ("0" if digits[where] != "0" else "1") + digits[where + 1 :]
        for other in (wrong, digits[:where], digits + "0", "", "é" * 40):
            assert not is_fingerprint(other, shown)


class TestSignaturesOfOthers:
    ROSTER = Roster("cancer", 1, (Member(1, "north", NORTH.public_hex), Member(2, "south", SOUTH.public_hex)))

    def test_make_the_roster_whole(self) -> None:
        mine = self.ROSTER.signed_by(NORTH, "north")
        theirs = self.ROSTER.signed_by(SOUTH, "south")
        with_signatures(mine, theirs.signatures).check(self.ROSTER.hash)

    @pytest.mark.parametrize(
        ("signatures", "expected"),
        [
            ({"south": "00" * 64}, "south did not sign this one"),
            ({"south": ROSTER.signed_by(NORTH, "north").signatures["north"]}, "south did not sign this one"),
            ({"south": replace(ROSTER, version=2).signed_by(SOUTH, "south").signatures["south"]}, "south did not sign"),
            ({"east": "00" * 64}, "not by a member"),
            ({"south": "xyz"}, "not 128 hexadecimal digits"),
        ],
    )
    def test_that_they_did_not_make_are_refused(self, signatures: dict[str, str], expected: str) -> None:
        with pytest.raises(Refused, match=expected):
            with_signatures(self.ROSTER.signed_by(NORTH, "north"), signatures)


class TestAddress:
    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            ("server.example:8443", ("server.example", 8443)),
            ("localhost:1", ("localhost", 1)),
            ("192.0.2.7:65535", ("192.0.2.7", 65535)),
            ("[2001:db8::1]:8443", ("2001:db8::1", 8443)),
            ("super_link:9092", ("super_link", 9092)),
        ],
    )
    def test_comes_apart(self, address: str, expected: tuple[str, int]) -> None:
        assert split_address(address) == expected

    @pytest.mark.parametrize(
        "address",
        ["", "server", "server:", ":8443", "server:0", "server:65536", "server:١", "server:8443 ", "2001:db8::1:8443",
         "[server]:1", "[192.0.2.7]:1", "https://server:1", "a b:1", "a..b:1", "-a:1", "256.0.0.1:1", "x" * 300 + ":1",
         "server:8443\n", None, 8443],
    )  # fmt: skip
    def test_of_another_form_is_refused(self, address: Any) -> None:
        with pytest.raises(Refused, match='expected "host:port"') as caught:
            split_address(address)
        assert len(str(caught.value)) < 200
        assert "\n" not in str(caught.value)
