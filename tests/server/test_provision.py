"""A coordinator makes a federation, lets sites in, renews and revokes them; no site gets another's name or key."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.authority import Authority, Peer, Revocations, make_csr, peer_of
from privacy.enrolment import EnrolmentRequest
from privacy.errors import LedgerError, Refused, RunError
from privacy.keys import IdentityKey, TlsKey
from privacy.secagg.roster import Roster
from server.membership import (
    MOST_CERTIFICATES,
    Signed,
    add_signature,
    read_request,
    renew,
    review,
    revoke,
    sign,
)
from server.operators import Operator, new_token
from server.provision import ServerSettings, provision, read_invitation, renew_server

NOW = datetime.now(UTC).replace(microsecond=0)
SMALLEST = 'name = "cancer"\naddress = "server.example:8443"\n'
DEAN = "ab" * 32


class Coordinator:
    """A provisioned folder, and sites that exist only as their keys."""

    def __init__(self, folder: Path, text: str = SMALLEST, passphrase: bytes | None = None) -> None:
        (folder / "federation.toml").write_text(text)
        self.folder, self.sites = folder / "coordinator", dict[str, tuple[IdentityKey, TlsKey]]()
        self.made = provision(folder / "federation.toml", self.folder, now=NOW, passphrase=passphrase)
        self.invitation = self.made.invitation

    def request(self, name: str, *, identity: IdentityKey | None = None, tls: TlsKey | None = None) -> EnrolmentRequest:
        """With new keys where none are given."""
        identity = identity or IdentityKey(Ed25519PrivateKey.generate())
        tls = tls or TlsKey(ec.generate_private_key(ec.SECP256R1()))
        self.sites[name] = (identity, tls)
        return EnrolmentRequest.make(self.invitation, name, identity=identity, tls=tls)

    def sign(self, *requests: EnrolmentRequest, replace_keys: bool = False) -> Signed:
        return sign(self.folder, requests, now=NOW, replace_keys=replace_keys)

    def peer(self, name: str) -> Peer:
        kit = json.loads((self.folder / "kits" / f"{name}.kit.json").read_bytes())
        return peer_of(ssl.PEM_cert_to_DER_cert(kit["body"]["certificate"]))

    def members(self) -> dict[str, tuple[int, str]]:
        return {member.name: (member.slot, member.key) for member in Roster.load(self.folder / "roster.json").members}

    def is_revoked(self, peer: Peer) -> bool:
        return Revocations(self.folder / "revoked.json").is_revoked(peer)

    def renew(self, peer: Peer, csr: bytes, *, days: float = 5) -> Peer:
        authority = Authority.load(self.folder / "authority")
        pem = renew(self.folder, csr, peer=peer, authority=authority, days=30, now=NOW + timedelta(days=days))
        return peer_of(ssl.PEM_cert_to_DER_cert(pem.decode()))


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


class TestProvision:
    def test_makes_all_that_a_coordinator_needs(self, coordinator: Coordinator) -> None:
        names = {str(path.relative_to(coordinator.folder)) for path in coordinator.folder.rglob("*") if path.is_file()}
        assert names == {
            "federation.toml", "server.toml", "invitation.json", "identity.pem", "authority/ca.key", "authority/ca.pem",
            "tls/server.key", "tls/server.pem", "revoked.json", "operators.json", "operator/operator.json",
        }  # fmt: skip
        invitation = read_invitation(coordinator.folder)
        assert invitation == coordinator.invitation
        assert invitation.coordinator == IdentityKey.load(coordinator.folder / "identity.pem").public_hex
        assert (coordinator.folder / "federation.toml").read_text() == SMALLEST

    def test_keeps_what_is_secret_for_its_owner_alone_whatever_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            folder = Coordinator(tmp_path).folder
        finally:
            os.umask(before)
        for name in ("identity.pem", "authority/ca.key", "tls/server.key", "operator/operator.json"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in folder.iterdir():
            assert not path.is_dir() or stat.S_IMODE(path.stat().st_mode) == 0o700, path

    def test_never_writes_into_a_folder_that_holds_anything(self, coordinator: Coordinator, tmp_path: Path) -> None:
        before = (coordinator.folder / "identity.pem").read_bytes()
        with pytest.raises(RunError, match="keys are never overwritten"):
            provision(tmp_path / "federation.toml", coordinator.folder, now=NOW)
        assert (coordinator.folder / "identity.pem").read_bytes() == before

    def test_under_a_passphrase_leaves_no_key_in_the_clear(self, tmp_path: Path) -> None:
        coordinator = Coordinator(tmp_path, passphrase=b"secret")
        for name in ("identity.pem", "authority/ca.key", "tls/server.key"):
            assert b"BEGIN ENCRYPTED PRIVATE KEY" in (coordinator.folder / name).read_bytes()
        request = coordinator.request("north")
        with pytest.raises(LedgerError, match="--passphrase-file"):
            coordinator.sign(request)
        assert sign(coordinator.folder, [request], now=NOW, passphrase=b"secret").version == 1

    def test_says_everything_in_the_invitation_and_the_server_s_settings(self, tmp_path: Path) -> None:
        text = SMALLEST + (
            'listen = "[::]:9000"\nhosts = ["localhost", "server.example", "192.0.2.7", "2001:db8::1"]\n'
            f'certificate_days = 7\noperators = ["alice", "bob"]\n'
            f'[approval]\nrequired = 1\napprovers = {{ dean = "{DEAN}" }}\n'
        )
        coordinator = Coordinator(tmp_path, text)
        assert (coordinator.invitation.approvers, coordinator.invitation.required) == ({"dean": DEAN}, 1)
        settings = ServerSettings.load(coordinator.folder)
        assert (settings.listen, settings.certificate_days) == ("[::]:9000", 7)
        assert settings.hosts == ["server.example", "localhost", "192.0.2.7", "2001:db8::1"]
        certificate = x509.load_pem_x509_certificate((coordinator.folder / "tls" / "server.pem").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["server.example", "localhost"]
        assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["192.0.2.7", "2001:db8::1"]
        assert set(coordinator.made.operators) == {"alice", "bob"}
        assert coordinator.sign(coordinator.request("north")).version == 1
        assert coordinator.peer("north").not_after == NOW + timedelta(days=7)

    @pytest.mark.parametrize(
        ("listen", "expected"),
        [("", "0.0.0.0:8443"), ('listen = "127.0.0.1"', "127.0.0.1:8443"), ('listen = "[::1]"', "[::1]:8443")],
    )
    def test_listens_on_the_address_s_port_unless_told(self, tmp_path: Path, listen: str, expected: str) -> None:
        assert ServerSettings.load(Coordinator(tmp_path, SMALLEST + listen).folder).listen == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "name is missing (and 1 more)"),
            ("name = 3\n", "name: should be a valid string"),
            ('name = "a b"\naddress = "x:1"', "name: 'a b' is not a name"),
            ('name = "cancer"\naddress = "server"', 'address: expected "host:port"'),
            (SMALLEST + 'adress = "x:1"', "unknown key adress; did you mean address?"),
            (SMALLEST + "[approval]\nrequire = 1", "unknown key approval.require; did you mean approval.required?"),
            (SMALLEST + "required = 1", "unknown key required; did you mean approval.required?"),
            (SMALLEST + "colour = 1", "unknown key colour; known here: name, address"),
            (SMALLEST + "[approval]\nrequired = 1", "required is 1, but there are 0 approvers"),
            (SMALLEST + '[approval.approvers]\ndean = "AB"', "approval.approvers.dean: expected a key or hash of 64"),
            (SMALLEST + f'[approval.approvers]\na = "{DEAN}"\nb = "{DEAN}"', "two approvers have the same key"),
            (SMALLEST + "certificate_days = 0", "certificate_days: should be greater than or equal to 1, got 0"),
            (SMALLEST + "certificate_days = 9999", "certificate_days: should be less than or equal to 825"),
            (SMALLEST + "operators = []", "operators: list should have at least 1 item"),
            (SMALLEST + 'hosts = ["a b"]', "hosts.0: expected a host name or an IP address"),
            (SMALLEST + 'hosts = ["x:1"]', "hosts.0: expected a host name or an IP address"),
            (SMALLEST + 'listen = "0.0.0.0:x"', 'listen: expected "host" or "host:port"'),
            ("name = ", "not valid TOML"),
        ],
    )
    def test_explains_a_mistake_in_one_line_and_makes_nothing(self, tmp_path: Path, text: str, expected: str) -> None:
        with pytest.raises(RunError) as caught:
            Coordinator(tmp_path, text)
        assert str(caught.value).startswith(f"{tmp_path / 'federation.toml'}: ")
        assert expected in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "coordinator").exists()

    def test_a_missing_federation_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no such federation file"):
            provision(tmp_path / "none.toml", tmp_path / "out", now=NOW)

    def test_the_server_s_certificate_is_renewed_for_the_same_key(self, coordinator: Coordinator) -> None:
        path = coordinator.folder / "tls" / "server.pem"
        before = x509.load_pem_x509_certificate(path.read_bytes())
        renew_server(coordinator.folder, now=NOW + timedelta(days=40))
        after = x509.load_pem_x509_certificate(path.read_bytes())
        assert after.not_valid_after_utc == NOW + timedelta(days=70)
        assert after.public_key() == before.public_key()

    def test_server_settings_of_a_newer_program_are_refused(self, coordinator: Coordinator) -> None:
        path = coordinator.folder / "server.toml"
        path.write_text(path.read_text().replace("version = 1", "version = 2\nnews = true"))
        with pytest.raises(RunError, match=r"version 2 is newer than this program reads \(1\); install"):
            ServerSettings.load(coordinator.folder)


class TestTokens:
    def test_are_kept_as_their_hash_alone(self, coordinator: Coordinator) -> None:
        operator = Operator.load(coordinator.made.operators["ops"])
        (kept,) = json.loads((coordinator.folder / "operators.json").read_bytes()).items()
        digest = hashlib.sha256(operator.token.encode()).hexdigest()
        assert kept == ("ops", {"sha256": digest, "created": NOW.isoformat()})
        files = [path for path in coordinator.folder.rglob("*") if path.is_file() and path.name != "operator.json"]
        assert not [path for path in files if operator.token.encode() in path.read_bytes()]
        assert operator.token not in repr(operator)
        assert len(operator.token) >= 43  # 256 bits.

    def test_go_with_what_an_operator_needs_to_find_and_believe_the_server(self, coordinator: Coordinator) -> None:
        operator = Operator.load(coordinator.folder / "operator" / "operator.json")
        assert (operator.operator, operator.federation) == ("ops", "cancer")
        assert operator.address == "server.example:8443"
        assert operator.authority == coordinator.invitation.authority

    def test_a_new_one_ends_the_old_one_and_leaves_the_others(self, coordinator: Coordinator) -> None:
        invitation = coordinator.invitation
        alice = new_token(coordinator.folder, "alice", invitation, now=NOW)
        first, other = Operator.load(coordinator.made.operators["ops"]), Operator.load(alice)
        again = new_token(coordinator.folder, "ops", invitation, now=NOW)
        assert again == coordinator.made.operators["ops"]
        assert alice == coordinator.folder / "operator-alice" / "operator.json"
        assert Operator.load(again).token != first.token
        assert stat.S_IMODE(again.stat().st_mode) == 0o600
        kept = {entry["sha256"] for entry in json.loads((coordinator.folder / "operators.json").read_bytes()).values()}
        tokens = (Operator.load(again).token, other.token)
        assert kept == {hashlib.sha256(token.encode()).hexdigest() for token in tokens}

    @pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "x" * 65])
    def test_are_not_made_for_what_is_no_name(self, coordinator: Coordinator, name: str) -> None:
        with pytest.raises(RunError, match="not a name"):
            new_token(coordinator.folder, name, coordinator.invitation, now=NOW)

    @pytest.mark.parametrize("content", [b"", b"[]", b'{"format": "other"}', b'{"format": "fedchorus operator 1"}'])
    def test_are_not_read_from_another_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "operator.json").write_bytes(content)
        with pytest.raises(RunError, match="not an operator's file"):
            Operator.load(tmp_path / "operator.json")
        with pytest.raises(RunError, match="cannot be read"):
            Operator.load(tmp_path / "none.json")


class TestSign:
    def test_lets_sites_in_together_with_one_roster_and_a_kit_each(self, coordinator: Coordinator) -> None:
        signed = coordinator.sign(*map(coordinator.request, ("north", "south", "west")))
        assert (signed.version, signed.changed, set(signed.kits)) == (1, True, {"north", "south", "west"})
        keys = {name: identity.public_hex for name, (identity, _) in coordinator.sites.items()}
        assert coordinator.members() == {n: (slot, keys[n]) for slot, n in enumerate(("north", "south", "west"), 1)}
        for name, (_, tls) in coordinator.sites.items():
            peer = coordinator.peer(name)
            assert (peer.site, peer.public_bytes) == (name, tls.public_bytes)
            assert peer.not_after == NOW + timedelta(days=30)

    def test_gives_everyone_a_new_kit_when_one_more_joins(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"))
        before = coordinator.peer("north")
        signed = coordinator.sign(coordinator.request("south"))
        assert (signed.version, signed.changed, set(signed.kits)) == (2, True, {"north", "south"})
        assert coordinator.peer("north") == before

    def test_renews_a_known_site_s_certificate_and_leaves_the_roster(self, coordinator: Coordinator) -> None:
        north = coordinator.request("north")
        coordinator.sign(north, coordinator.request("south"))
        before = coordinator.peer("north")
        assert [item.kind for item in review(coordinator.folder, [north])] == ["renewal"]
        signed = coordinator.sign(north)
        assert (signed.version, signed.changed, set(signed.kits)) == (1, False, {"north"})
        assert coordinator.peer("north").serial != before.serial
        assert not coordinator.is_revoked(before)

    def test_replaces_a_key_only_when_told_and_ends_the_old_one(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"), coordinator.request("south"))
        old, old_key = coordinator.peer("north"), coordinator.sites["north"][0]
        fresh = coordinator.request("north")
        with pytest.raises(Refused, match="sign with --replace"):
            coordinator.sign(fresh)
        assert coordinator.peer("north") == old
        signed = coordinator.sign(fresh, replace_keys=True)
        assert (signed.version, signed.changed, set(signed.kits)) == (2, True, {"north", "south"})
        assert coordinator.members()["north"] == (1, fresh.identity)
        assert coordinator.is_revoked(old)
        assert not coordinator.is_revoked(coordinator.peer("north"))
        with pytest.raises(Refused, match="identity key was revoked"):
            coordinator.sign(coordinator.request("north", identity=old_key), replace_keys=True)

    @pytest.mark.parametrize("replace_keys", [False, True])
    def test_gives_nobody_the_name_or_a_key_of_another(self, coordinator: Coordinator, replace_keys: bool) -> None:
        coordinator.sign(coordinator.request("north"), coordinator.request("south"))
        identity, tls = coordinator.sites["north"]
        before = coordinator.members()
        for request, expected in (
            (coordinator.request("north2", identity=identity), "its key is north's"),
            (coordinator.request("north2", tls=tls), "its key is north's"),
            (coordinator.request("South", identity=identity), "its key is north's"),
            (coordinator.request("NORTH"), "differs only in capitals from north"),
        ):
            with pytest.raises(Refused, match=expected):
                coordinator.sign(request, replace_keys=replace_keys)
        assert coordinator.members() == before

    def test_refuses_two_requests_of_one_name_or_key_and_then_issues_neither(self, coordinator: Coordinator) -> None:
        identity, tls = IdentityKey(Ed25519PrivateKey.generate()), TlsKey(ec.generate_private_key(ec.SECP256R1()))
        north = coordinator.request("north", identity=identity, tls=tls)
        for other in (
            coordinator.request("north"),
            coordinator.request("North"),
            coordinator.request("south", identity=identity),
            coordinator.request("south", tls=tls),
        ):
            with pytest.raises(Refused, match="in the same call"):
                coordinator.sign(north, other)
        assert not list((coordinator.folder / "sites").iterdir())

    def test_reads_only_requests_to_this_coordinator(self, coordinator: Coordinator, tmp_path: Path) -> None:
        path = tmp_path / "request.json"
        path.write_bytes(coordinator.request("north").to_bytes())
        assert read_request(coordinator.folder, path).site == "north"
        other = Coordinator(tmp_path_of(tmp_path, "other"))
        with pytest.raises(Refused, match=f"{path}: .*answers another invitation"):
            read_request(other.folder, path)
        with pytest.raises(RunError, match="cannot be read"):
            read_request(coordinator.folder, tmp_path / "none.json")
        with pytest.raises(RunError, match="is this the folder that fedchorus provision made"):
            read_request(tmp_path, path)

    def test_says_that_a_record_is_damaged(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"))
        for content in (b"", b"[]", b'{"format": "other", "site": "north"}', b'{"format": "fedchorus site 1"}'):
            (coordinator.folder / "sites" / "north.json").write_bytes(content)
            with pytest.raises(RunError, match=r"north\.json: damaged; restore it"):
                coordinator.sign(coordinator.request("south"))

    def test_cut_off_before_the_kits_is_finished_by_doing_it_again(self, coordinator: Coordinator) -> None:
        north = coordinator.request("north")
        coordinator.sign(north)
        (coordinator.folder / "roster.json").unlink()
        (coordinator.folder / "kits" / "north.kit.json").unlink()
        assert set(coordinator.sign(north).kits) == {"north"}


def tmp_path_of(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


class TestRevoke:
    def test_ends_a_site_at_once_and_makes_a_roster_without_it(self, coordinator: Coordinator) -> None:
        coordinator.sign(*map(coordinator.request, ("north", "south")))
        north, south = coordinator.peer("north"), coordinator.peer("south")
        signed = revoke(coordinator.folder, "north", reason="stolen", now=NOW)
        assert (signed.version, set(signed.kits)) == (2, {"south"})
        assert set(coordinator.members()) == {"south"}
        assert coordinator.is_revoked(north)
        assert not coordinator.is_revoked(south)
        assert not (coordinator.folder / "kits" / "north.kit.json").exists()

    def test_reaches_every_certificate_that_was_ever_renewed(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"), coordinator.request("south"))
        first, csr = coordinator.peer("north"), make_csr(coordinator.sites["north"][1], "north")
        second = coordinator.renew(first, csr)
        revoke(coordinator.folder, "north", reason="stolen", now=NOW)
        Revocations(coordinator.folder / "revoked.json").readmit("north")
        assert coordinator.is_revoked(first)
        assert coordinator.is_revoked(second)
        with pytest.raises(Refused):
            coordinator.renew(second, csr)

    def test_keeps_the_slot_for_good_and_the_site_out_until_it_has_new_keys(self, coordinator: Coordinator) -> None:
        north = coordinator.request("north")
        coordinator.sign(north, coordinator.request("south"))
        revoke(coordinator.folder, "south", reason="left", now=NOW)
        revoke(coordinator.folder, "north", reason="left", now=NOW)
        with pytest.raises(Refused, match="identity key was revoked"):
            coordinator.sign(north, replace_keys=True)
        with pytest.raises(Refused, match="--replace"):
            coordinator.sign(coordinator.request("north"))
        coordinator.sign(coordinator.request("west"))
        assert coordinator.members()["west"][0] == 3
        coordinator.sign(coordinator.request("north"), replace_keys=True)
        assert coordinator.members()["north"][0] == 1
        assert not coordinator.is_revoked(coordinator.peer("north"))

    def test_of_the_last_site_leaves_a_version_that_the_next_one_follows(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"))
        assert revoke(coordinator.folder, "north", reason="left", now=NOW) == Signed({}, 1, False)
        assert coordinator.sign(coordinator.request("south")).version == 2

    def test_of_a_stranger_names_the_nearest(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"))
        with pytest.raises(RunError, match=r"'nort' is no site of .*; did you mean 'north'"):
            revoke(coordinator.folder, "nort", reason="left", now=NOW)


class TestRenew:
    def test_is_on_record_before_anybody_has_it(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"))
        peer = coordinator.peer("north")
        renewed = coordinator.renew(peer, make_csr(coordinator.sites["north"][1], "north"))
        record = json.loads((coordinator.folder / "sites" / "north.json").read_bytes())
        assert set(record["serials"]) == {peer.serial_hex, renewed.serial_hex}
        assert renewed.not_after == NOW + timedelta(days=35)

    def test_forgets_certificates_that_have_ended(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"))
        csr, peer = make_csr(coordinator.sites["north"][1], "north"), coordinator.peer("north")
        second = coordinator.renew(peer, csr, days=29)
        third = coordinator.renew(second, csr, days=31)
        record = json.loads((coordinator.folder / "sites" / "north.json").read_bytes())
        assert set(record["serials"]) == {second.serial_hex, third.serial_hex}

    def test_is_refused_for_whom_the_record_does_not_know(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"), coordinator.request("south"))
        north, csr = coordinator.peer("north"), make_csr(coordinator.sites["north"][1], "north")
        for peer in (replace(north, serial=1), replace(north, site="east"), replace(north, site="south")):
            with pytest.raises(Refused, match="no such certificate is on record"):
                coordinator.renew(peer, csr)
        with pytest.raises(Refused, match="in the name of another site"):
            coordinator.renew(north, make_csr(coordinator.sites["north"][1], "south"))
        with pytest.raises(Refused, match="its key is another site's"):
            coordinator.renew(north, make_csr(coordinator.sites["south"][1], "north"))
        Revocations(coordinator.folder / "revoked.json").add(serials=[north.serial_hex], reason="leaked", now=NOW)
        with pytest.raises(Refused, match="was revoked"):
            coordinator.renew(north, csr)

    def test_is_bounded_for_a_site_in_a_loop(self, coordinator: Coordinator) -> None:
        coordinator.sign(coordinator.request("north"))
        peer, csr = coordinator.peer("north"), make_csr(coordinator.sites["north"][1], "north")
        path = coordinator.folder / "sites" / "north.json"
        record = json.loads(path.read_bytes())
        until = (NOW + timedelta(days=30)).isoformat()
        record["serials"] |= {f"{number:x}": until for number in range(MOST_CERTIFICATES - 2)}
        path.write_text(json.dumps(record))
        coordinator.renew(peer, csr)
        with pytest.raises(Refused, match="certificates that are valid"):
            coordinator.renew(peer, csr)


class TestRosterSignatures:
    def test_are_collected_until_all_have_signed(self, coordinator: Coordinator) -> None:
        coordinator.sign(*map(coordinator.request, ("north", "south")))
        roster = Roster.load(coordinator.folder / "roster.json")
        for name, (identity, _) in coordinator.sites.items():
            roster = add_signature(coordinator.folder, name, roster.signed_by(identity, name).signatures[name])
        roster.check(None)
        assert Roster.load(coordinator.folder / "roster.json") == roster

    def test_by_another_key_or_over_another_version_are_refused(self, coordinator: Coordinator) -> None:
        coordinator.sign(*map(coordinator.request, ("north", "south")))
        roster = Roster.load(coordinator.folder / "roster.json")
        mine = roster.signed_by(coordinator.sites["north"][0], "north").signatures["north"]
        older = replace(roster, version=7).signed_by(coordinator.sites["south"][0], "south").signatures["south"]
        for signature in (mine, older, "junk"):
            with pytest.raises(Refused):
                add_signature(coordinator.folder, "south", signature)
        assert not Roster.load(coordinator.folder / "roster.json").signatures


def test_no_error_shows_a_secret(coordinator: Coordinator) -> None:
    token = Operator.load(coordinator.made.operators["ops"]).token
    (coordinator.folder / "operator" / "operator.json").write_text(f'{{"token": "{token}"}}')
    with pytest.raises(RunError) as caught:
        new_token(coordinator.folder, "ops", coordinator.invitation, now=NOW)
    assert token not in str(caught.value)


def test_an_invitation_that_was_tampered_with_stops_the_coordinator(coordinator: Coordinator) -> None:
    path = coordinator.folder / "invitation.json"
    path.write_bytes(path.read_bytes().replace(b"server.example", b"server.example2"))
    with pytest.raises(Refused, match="changed after it was"):
        read_invitation(coordinator.folder)
