"""A site joins with keys of its own, agrees to a roster with its eyes open, and keeps that decision."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

import client.enrol_commands
import server.enrol_commands
from client.enrol import (
    accept,
    add_signatures,
    enrol,
    install_certificate,
    read_invitation,
    renewal_csr,
    review,
)
from client.settings import Settings, SiteFolder, pin_roster
from privacy.authority import Authority, make_csr, peer_of_pem
from privacy.enrolment import EnrolmentRequest, Kit, key_fingerprint
from privacy.errors import FedchorusError, LedgerError, Refused, RunError
from privacy.keys import IdentityKey, TlsKey
from privacy.secagg.roster import Member, Roster
from server.membership import add_signature, renew, revoke, sign
from server.provision import provision

NOW = datetime.now(UTC).replace(microsecond=0)
NAMES = ("north", "south", "west")
POLICY = "version = 1\n"


class Federation:
    """A coordinator and its sites, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.coordinator = folder, folder / "coordinator"
        (folder / "federation.toml").write_text('name = "cancer"\naddress = "server.example:8443"\n')
        self.invitation = provision(folder / "federation.toml", self.coordinator, now=NOW).invitation

    def enrol(self, name: str, *, out: str | None = None, passphrase: bytes | None = None) -> EnrolmentRequest:
        return enrol(self.invitation, name, self.folder / (out or name), policy=POLICY, passphrase=passphrase)

    def sign(self, *requests: EnrolmentRequest, replace_keys: bool = False) -> None:
        sign(self.coordinator, requests, now=NOW, replace_keys=replace_keys)

    def kit(self, name: str) -> Path:
        return self.coordinator / "kits" / f"{name}.kit.json"

    def accept(self, name: str, *, allow: bool = False) -> Roster:
        site = self.folder / name
        return accept(site, review(site, self.kit(name)), now=NOW, allow_changed_keys=allow)

    def join(self, *names: str) -> None:
        self.sign(*map(self.enrol, names))
        for name in names:
            self.accept(name)

    def forge(self, name: str, roster: Roster, certificate: bytes | None = None) -> Path:
        """A kit with the coordinator's own signature: what a dishonest or careless one could send."""
        kit = json.loads(self.kit(name).read_bytes())["body"]
        path = self.folder / "forged.kit.json"
        made = Kit.make(
            IdentityKey.load(self.coordinator / "identity.pem"),
            site=name,
            certificate=certificate or kit["certificate"].encode(),
            request=kit["request"],
            roster=roster,
        )
        path.write_bytes(made.to_bytes())
        return path

    def certify(self, name: str, key: TlsKey, *, days: float = 60, now: datetime = NOW) -> bytes:
        authority = Authority.load(self.coordinator / "authority")
        return authority.issue_client(make_csr(key, name), site=name, days=days, now=now)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


@pytest.fixture
def north(federation: Federation) -> SiteFolder:
    federation.join("north", "south")
    return SiteFolder(federation.folder / "north")


def test_three_sites_enrol_and_in_the_end_each_trusts_the_same_signed_roster(federation: Federation) -> None:
    federation.join(*NAMES)
    for name in NAMES:  # What the sites then send the server: their signatures.
        own = Roster.load(federation.folder / name / "roster.json").signatures[name]
        collected = add_signature(federation.coordinator, name, own)
    for name in NAMES:
        folder = federation.folder / name
        add_signatures(folder, collected.signatures)
        settings, files = Settings.load(folder), SiteFolder(folder)
        Roster.load(files.roster).check(settings.roster)
        authority = read_invitation(files.invitation).authority
        assert files.authority.read_text() == authority
        peer = peer_of_pem(
            files.certificate.read_bytes(), authority=Authority.load(federation.coordinator / "authority").certificate
        )
        assert (peer.site, peer.public_bytes) == (name, TlsKey.load(files.tls_key).public_bytes)
    assert len({Settings.load(federation.folder / name).roster for name in NAMES}) == 1


class TestEnrol:
    def test_makes_one_folder_with_everything_but_the_kit(self, federation: Federation) -> None:
        federation.enrol("north")
        folder = federation.folder / "north"
        assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
            "site.toml", "policy.toml", "invitation.json", "request.json", "keys/identity.pem", "keys/tls.key",
        }  # fmt: skip
        settings = Settings.load(folder)
        assert (settings.name, settings.federation, settings.roster) == ("north", "cancer", "")
        assert settings.server == "server.example:8443"
        assert settings.coordinator == federation.invitation.coordinator
        assert (folder / "policy.toml").read_text() == POLICY

    def test_keeps_the_keys_for_their_owner_alone_whatever_the_umask(self, federation: Federation) -> None:
        before = os.umask(0)
        try:
            federation.enrol("north")
        finally:
            os.umask(before)
        files = SiteFolder(federation.folder / "north")
        for key in (files.identity, files.tls_key):
            assert stat.S_IMODE(key.stat().st_mode) == 0o600
        for folder in (files.path, files.identity.parent, files.state):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_never_overwrites_anything(self, federation: Federation) -> None:
        federation.enrol("north")
        before = (federation.folder / "north" / "keys" / "identity.pem").read_bytes()
        with pytest.raises(RunError, match="keys are never overwritten"):
            federation.enrol("north")
        assert (federation.folder / "north" / "keys" / "identity.pem").read_bytes() == before

    @pytest.mark.parametrize("name", ["", "a b", "../up", "x" * 65, "_server"])
    def test_refuses_what_is_no_name_and_makes_nothing(self, federation: Federation, name: str) -> None:
        with pytest.raises(RunError, match="not a name"):
            federation.enrol(name, out="site")
        assert not (federation.folder / "site").exists()

    def test_sends_nothing_private(self, federation: Federation) -> None:
        request = federation.enrol("north")
        files = SiteFolder(federation.folder / "north")
        public = b"".join(path.read_bytes() for path in files.path.iterdir() if path.is_file())
        assert b"PRIVATE" not in public
        assert request.to_bytes() == files.request.read_bytes()
        assert request.identity == IdentityKey.load(files.identity).public_hex

    def test_under_a_passphrase_needs_it_to_accept(self, federation: Federation) -> None:
        federation.sign(federation.enrol("north", passphrase=b"secret"))
        folder = federation.folder / "north"
        for key in (folder / "keys").iterdir():
            assert b"BEGIN ENCRYPTED PRIVATE KEY" in key.read_bytes()
        reviewed = review(folder, federation.kit("north"))
        with pytest.raises(LedgerError, match="--passphrase-file"):
            accept(folder, reviewed, now=NOW)
        accept(folder, reviewed, now=NOW, passphrase=b"secret")
        assert b"CERTIFICATE REQUEST" in renewal_csr(folder, b"secret")


class TestAccept:
    def test_again_changes_nothing(self, federation: Federation, north: SiteFolder) -> None:
        before = {path: path.read_bytes() for path in north.path.rglob("*") if path.is_file()}
        federation.accept("north")
        assert {path: path.read_bytes() for path in north.path.rglob("*") if path.is_file()} == before

    def test_keeps_the_signatures_of_others(self, federation: Federation, north: SiteFolder) -> None:
        south = Roster.load(federation.folder / "south" / "roster.json").signatures
        whole = add_signatures(north.path, south)
        assert federation.accept("north").signatures == whole.signatures
        whole.check(Settings.load(north.path).roster)

    def test_says_who_joins_and_who_leaves(self, federation: Federation, north: SiteFolder) -> None:
        federation.sign(federation.enrol("west"))
        revoke(federation.coordinator, "south", reason="left", now=NOW)
        reviewed = review(north.path, federation.kit("north"))
        assert (reviewed.news, reviewed.warnings) == (("west joins", "south leaves"), ())
        assert federation.accept("north").version == 3
        assert Settings.load(north.path).roster == reviewed.roster.hash

    def test_of_a_changed_key_needs_a_person_s_word_and_says_whose(
        self, federation: Federation, north: SiteFolder
    ) -> None:
        old = Roster.load(north.roster).member("south").key
        federation.sign(federation.enrol("south", out="south2"), replace_keys=True)
        pinned = Settings.load(north.path).roster
        with pytest.raises(Refused, match=f"south's key changed from {key_fingerprint(old)} to .*--allow-changed-keys"):
            federation.accept("north")
        assert Settings.load(north.path).roster == pinned == Roster.load(north.roster).hash
        assert federation.accept("north", allow=True).member("south").key != old
        assert Settings.load(north.path).roster != pinned

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda roster: replace(roster, members=roster.members[:1]), "another one than the version 1"),
            (
                lambda roster: replace(
                    roster, version=2, members=(roster.members[0], Member(2, "mallory", roster.members[1].key))
                ),
                "south's key is now mallory's",
            ),
        ],
    )
    def test_of_the_same_version_or_key_under_another_hand_needs_a_person_s_word(
        self, federation: Federation, north: SiteFolder, change: Callable[[Roster], Roster], expected: str
    ) -> None:
        kit = federation.forge("north", replace(change(Roster.load(north.roster)), signatures={}))
        with pytest.raises(Refused, match=expected):
            accept(north.path, review(north.path, kit), now=NOW)
        taken = accept(north.path, review(north.path, kit), now=NOW, allow_changed_keys=True)
        assert Settings.load(north.path).roster == taken.hash

    def test_of_an_older_roster_needs_a_person_s_word(self, federation: Federation, north: SiteFolder) -> None:
        old = federation.kit("north").read_bytes()
        federation.sign(federation.enrol("west"))
        federation.accept("north")
        federation.kit("north").write_bytes(old)
        with pytest.raises(Refused, match="roster version 1 is older than 2"):
            federation.accept("north")
        assert federation.accept("north", allow=True).version == 1

    def test_without_the_roster_that_was_pinned_needs_a_person_s_word(
        self, federation: Federation, north: SiteFolder
    ) -> None:
        federation.sign(federation.enrol("west"))
        north.roster.unlink()
        with pytest.raises(Refused, match="nobody can tell whose key changed"):
            federation.accept("north")

    def test_with_a_roster_put_in_place_of_the_pinned_one_needs_a_person_s_word(
        self, federation: Federation, north: SiteFolder
    ) -> None:
        federation.sign(federation.enrol("south", out="south2"), replace_keys=True)
        Roster.load(federation.coordinator / "roster.json").save(north.roster)
        federation.sign(federation.enrol("west"))
        with pytest.raises(Refused, match="nobody can tell whose key changed"):
            federation.accept("north")

    def test_cut_off_before_the_roster_was_written_is_repeated_without_more_ado(
        self, federation: Federation, north: SiteFolder
    ) -> None:
        before = north.roster.read_bytes()
        federation.sign(federation.enrol("west"))
        federation.accept("north")
        north.roster.write_bytes(before)
        with pytest.raises(Refused, match="accept the coordinator's kit again"):
            add_signatures(north.path, {})
        assert federation.accept("north").hash == Settings.load(north.path).roster

    def test_refuses_a_kit_with_somebody_s_false_signature(self, federation: Federation, north: SiteFolder) -> None:
        roster = Roster.load(north.roster)
        kit = federation.forge("north", replace(roster, signatures={"south": "00" * 64}))
        with pytest.raises(Refused, match="south did not sign this one"):
            accept(north.path, review(north.path, kit), now=NOW)

    def test_refuses_another_site_s_kit_and_another_coordinator_s(
        self, federation: Federation, north: SiteFolder, tmp_path: Path
    ) -> None:
        with pytest.raises(Refused, match="it is for south of cancer, this is north"):
            review(north.path, federation.kit("south"))
        (tmp_path / "other").mkdir()
        other = Federation(tmp_path / "other")
        other.sign(other.enrol("north"))
        with pytest.raises(Refused, match="not signed by the coordinator of the invitation"):
            review(north.path, other.kit("north"))
        with pytest.raises(RunError, match="cannot be read"):
            review(north.path, tmp_path / "none.json")

    def test_refuses_a_certificate_for_another_key_than_the_site_s(self, federation: Federation) -> None:
        federation.sign(federation.enrol("north"))
        stranger = TlsKey(ec.generate_private_key(ec.SECP256R1()))
        roster = Roster.load(federation.coordinator / "roster.json")
        kit, folder = (
            federation.forge("north", roster, federation.certify("north", stranger)),
            federation.folder / "north",
        )
        with pytest.raises(Refused, match="it is for another key than"):
            accept(folder, review(folder, kit), now=NOW)
        assert Settings.load(folder).roster == ""

    @pytest.mark.parametrize("key", ["coordinator", "name"])
    def test_refuses_a_site_file_that_contradicts_the_invitation(
        self, federation: Federation, north: SiteFolder, key: str
    ) -> None:
        value = "ab" * 32 if key == "coordinator" else "south"
        north.settings.write_text(
            re.sub(rf'^{key} = ".*"', f'{key} = "{value}"', north.settings.read_text(), flags=re.M)
        )
        with pytest.raises(Refused, match=f"site.toml: {key} is .*put back what it was"):
            review(north.path, federation.kit("north"))

    def test_keeps_a_certificate_that_ends_later_than_the_kit_s(
        self, federation: Federation, north: SiteFolder
    ) -> None:
        newer = federation.certify("north", TlsKey.load(north.tls_key))
        install_certificate(north.path, newer, now=NOW)
        federation.accept("north")
        assert north.certificate.read_bytes() == newer


class TestRenewal:
    def test_goes_from_the_site_s_request_to_its_new_certificate(
        self, federation: Federation, north: SiteFolder
    ) -> None:
        authority = Authority.load(federation.coordinator / "authority")
        peer = peer_of_pem(north.certificate.read_bytes(), authority=authority.certificate)
        later = NOW + timedelta(days=20)
        csr = renewal_csr(north.path)
        pem = renew(federation.coordinator, csr, peer=peer, authority=authority, days=30, now=later)
        install_certificate(north.path, pem, now=later)
        renewed = peer_of_pem(north.certificate.read_bytes(), authority=authority.certificate)
        assert renewed.not_after == NOW + timedelta(days=50)
        assert renewed.public_bytes == TlsKey.load(north.tls_key).public_bytes

    def test_installs_only_a_newer_certificate_of_this_site_s_key_and_authority(
        self, federation: Federation, north: SiteFolder, tmp_path: Path
    ) -> None:
        own, stranger = TlsKey.load(north.tls_key), TlsKey(ec.generate_private_key(ec.SECP256R1()))
        foreign = Authority.create(tmp_path / "foreign", "cancer", now=NOW)
        before = north.certificate.read_bytes()
        for pem, expected in (
            (federation.certify("south", own), "it is for south, this is north"),
            (federation.certify("north", stranger), "for another key"),
            (federation.certify("north", own, days=30), "does not end later"),
            (federation.certify("north", own, days=1, now=NOW - timedelta(days=2)), "it ended on .* sign request.json"),
            (federation.certify("north", own, now=NOW + timedelta(days=1)), "is this machine's clock right"),
            (foreign.issue_client(make_csr(own, "north"), site="north", days=60, now=NOW), "not issued by"),
            (b"junk", "certificate"),
        ):
            with pytest.raises(Refused, match=expected):
                install_certificate(north.path, pem, now=NOW)
            assert north.certificate.read_bytes() == before

    def test_replaces_a_certificate_that_is_damaged(self, federation: Federation, north: SiteFolder) -> None:
        north.certificate.write_bytes(b"junk")
        federation.accept("north")
        assert north.certificate.read_bytes().startswith(b"-----BEGIN CERTIFICATE")


SITE = f'version = 1\nname = "north"\nfederation = "cancer"\nserver = "s:1"\ncoordinator = "{"ab" * 32}"\nroster = ""\n'


class TestSettings:
    def test_have_defaults_for_all_that_enrolment_does_not_know(self, tmp_path: Path) -> None:
        (tmp_path / "site.toml").write_text(SITE.replace('roster = ""\n', ""))
        settings = Settings.load(tmp_path)
        assert (settings.roster, settings.data, settings.health.listen) == ("", {}, None)
        assert (settings.trainer.isolation, settings.trainer.memory_gb) == ("auto", None)
        assert settings.max_clock_skew_s == 300

    def test_are_read_in_full(self, tmp_path: Path) -> None:
        text = SITE + (
            '[data.records]\npath = "r.csv"\n[trainer]\nisolation = "required"\nmemory_gb = 16\n'
            '[health]\nlisten = "127.0.0.1:9100"\n'
        )
        (tmp_path / "site.toml").write_text(text)
        settings = Settings.load(tmp_path)
        assert settings.data["records"].path == "r.csv"
        assert (settings.trainer.isolation, settings.trainer.memory_gb) == ("required", 16)
        assert settings.health.listen == "127.0.0.1:9100"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "its first line must be `version = 1`"),
            (SITE.replace("version = 1", 'version = "1"'), "its first line must be `version = 1`"),
            (SITE.replace("version = 1", "version = true"), "its first line must be `version = 1`"),
            (SITE.replace("version = 1", "version = 0"), "its first line must be `version = 1`"),
            (SITE.replace("version = 1", "version = 9\nnew = 1"), "version 9 is newer than this program reads (1)"),
            (SITE.replace('name = "north"\n', ""), "name is missing"),
            (SITE.replace('"north"', '"../north"'), "name: '../north' is not a name"),
            (SITE.replace('"s:1"', '"https://s:1"'), 'server: expected "host:port"'),
            (SITE.replace("ab" * 32, "AB" * 32), "coordinator: expected a key or hash of 64 hexadecimal digits"),
            (SITE.replace('roster = ""', 'roster = "abc"'), "roster: expected a hash of 64 hexadecimal digits"),
            (SITE + "max_clock_skew = 1", "unknown key max_clock_skew; did you mean max_clock_skew_s?"),
            (SITE + "max_clock_skew_s = 0", "max_clock_skew_s: should be greater than 0, got 0"),
            (SITE + "max_clock_skew_s = inf", "max_clock_skew_s: should be less than or equal to 3600"),
            (SITE + '[trainer]\nisolaton = "none"', "unknown key trainer.isolaton; did you mean trainer.isolation?"),
            (SITE + '[trainer]\nisolation = "require"', "did you mean 'required'?"),
            (SITE + "[trainer]\nmemory_gb = 0", "trainer.memory_gb: should be greater than 0"),
            (SITE + '[data.records]\npth = "r"', "unknown key data.records.pth; did you mean data.records.path?"),
            (SITE + '[data.records]\npath = ""', "data.records.path: string should have at least 1 character"),
            (SITE + 'data = "r.csv"', "data: should be a table, got 'r.csv'"),
            (SITE + '[health]\nlisten = "9100"', 'health.listen: expected "host:port"'),
            (SITE + "[data.records", "not valid TOML"),
        ],
    )
    def test_explain_a_mistake_in_one_line(self, tmp_path: Path, text: str, expected: str) -> None:
        (tmp_path / "site.toml").write_text(text)
        with pytest.raises(RunError) as caught:
            Settings.load(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path / 'site.toml'}: ")
        assert expected in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_that_are_not_there_or_no_text_say_so(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no such site settings"):
            Settings.load(tmp_path)
        (tmp_path / "site.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(RunError, match="not a text file in UTF-8"):
            Settings.load(tmp_path)


class TestPin:
    HASH = "cd" * 32

    @pytest.mark.parametrize(
        "text",
        [
            SITE + "# my note\n",
            SITE.replace('roster = ""', f'roster="{"12" * 32}" # pinned in May'),
            SITE.replace("\n", "\r\n"),
            "\ufeff" + SITE,
            SITE.replace('roster = ""', 'roster\t=\t""') + '[data.roster]\npath = "roster = 1"\n',
            SITE + '[data.records]\npath = """\nroster = ""\n"""\n',
        ],
    )
    def test_changes_its_own_digits_and_no_other_byte(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "site.toml").write_bytes(text.encode())
        pin_roster(tmp_path, self.HASH)
        after = (tmp_path / "site.toml").read_bytes().decode()
        assert Settings.load(tmp_path).roster == self.HASH
        blank = re.compile(r'^(roster\s*=\s*")[0-9a-f]*"', re.MULTILINE)
        assert blank.sub(r"\1", after, count=1) == blank.sub(r"\1", text, count=1)

    @pytest.mark.parametrize(
        "text",
        [
            SITE.replace('roster = ""\n', ""),
            SITE.replace('roster = ""', "roster = ''"),
            SITE.replace('roster = ""\n', '[data.records]\npath = """\nroster = ""\n"""\n'),
        ],
    )
    def test_is_left_to_a_person_where_the_line_is_not_plain(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "site.toml").write_text(text)
        with pytest.raises(RunError, match=f'write: roster = "{self.HASH}"'):
            pin_roster(tmp_path, self.HASH)
        assert (tmp_path / "site.toml").read_text() == text


APP = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
server.enrol_commands.add_to(APP)
client.enrol_commands.add_to(APP)


def fedchorus(*arguments: str | Path, answer: str = "") -> subprocess.CompletedProcess[str]:
    """A command as a person types it; an error that they may see is re-raised."""
    done = CliRunner().invoke(APP, [*map(str, arguments)], input=answer)
    if isinstance(done.exception, FedchorusError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


class TestCommands:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        Path("federation.toml").write_text('name = "cancer"\naddress = "127.0.0.1:8443"\n')
        return tmp_path

    def last(self, done: subprocess.CompletedProcess[str]) -> dict[str, object]:
        assert done.returncode == 0, done.stderr
        record: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return record

    def test_lead_from_nothing_to_three_sites_that_agree(self, here: Path) -> None:
        made = self.last(fedchorus("provision", "federation.toml", "--out", "coordinator", "--json"))
        fingerprints = []
        for name in NAMES:
            told = fedchorus(
                "enrol", "coordinator/invitation.json", "--name", name, "--out", name,
                "--fingerprint", str(made["fingerprint"]), "--json",
            )  # fmt: skip
            fingerprints.append(str(self.last(told)["request"]))
        requests = [f"{name}/request.json" for name in NAMES]
        given = [part for one in fingerprints for part in ("--fingerprint", one)]
        signed = self.last(fedchorus("sign", "coordinator", *requests, *given, "--json"))
        assert signed["roster_version"] == 1
        hashes = {
            str(self.last(fedchorus("accept", name, f"coordinator/kits/{name}.kit.json", "--yes", "--json"))["roster"])
            for name in NAMES
        }
        assert hashes == {Settings.load(here / "north").roster}

    def test_ask_before_they_sign_or_accept_and_take_no_for_an_answer(self, here: Path) -> None:
        fedchorus("provision", "federation.toml", "--out", "coordinator")
        shown = fedchorus("enrol", "coordinator/invitation.json", "--name", "north", "--out", "north").stdout
        request = EnrolmentRequest.parse(
            Path("north/request.json").read_bytes(), read_invitation(Path("coordinator/invitation.json"))
        )
        assert request.fingerprint in shown
        assert key_fingerprint(request.identity) in shown
        for answer in ("n\n", "\n", ""):
            refused = fedchorus("sign", "coordinator", "north/request.json", answer=answer)
            assert refused.returncode == 1
            assert request.fingerprint in refused.stdout
        assert not list(Path("coordinator/sites").iterdir())
        assert fedchorus("sign", "coordinator", "north/request.json", answer="y\n").returncode == 0
        for answer in ("n\n", ""):
            refused = fedchorus("accept", "north", "coordinator/kits/north.kit.json", answer=answer)
            assert refused.returncode == 1
            assert key_fingerprint(request.identity) in refused.stdout
        assert Settings.load(here / "north").roster == ""
        assert fedchorus("accept", "north", "coordinator/kits/north.kit.json", answer="y\n").returncode == 0
        assert Settings.load(here / "north").roster

    def test_refuse_another_fingerprint_than_was_read_out(self, here: Path) -> None:
        fedchorus("provision", "federation.toml", "--out", "coordinator")
        wrong = "0000 " * 10
        with pytest.raises(Refused, match="not the one given; ask the coordinator again"):
            fedchorus("enrol", "coordinator/invitation.json", "--name", "a", "--out", "a", "--fingerprint", wrong)
        assert not Path("a").exists()
        fedchorus("enrol", "coordinator/invitation.json", "--name", "a", "--out", "a")
        with pytest.raises(Refused, match="none of those given; do not sign it"):
            fedchorus("sign", "coordinator", "a/request.json", "--fingerprint", wrong, "--yes")
        assert not list(Path("coordinator/sites").iterdir())

    def test_warn_of_a_changed_key_even_with_yes(self, here: Path) -> None:
        fedchorus("provision", "federation.toml", "--out", "coordinator")
        for name in ("north", "south"):
            fedchorus("enrol", "coordinator/invitation.json", "--name", name, "--out", name)
        fedchorus("sign", "coordinator", "north/request.json", "south/request.json", "--yes")
        fedchorus("accept", "north", "coordinator/kits/north.kit.json", "--yes")
        fedchorus("enrol", "coordinator/invitation.json", "--name", "south", "--out", "south2")
        fedchorus("sign", "coordinator", "south2/request.json", "--yes", "--replace")
        with pytest.raises(Refused, match="south's key changed"):
            fedchorus("accept", "north", "coordinator/kits/north.kit.json", "--yes")
        done = fedchorus("accept", "north", "coordinator/kits/north.kit.json", "--yes", "--allow-changed-keys")
        assert "WARNING: south's key changed" in done.stderr

    def test_revoke_a_site_and_make_a_token(self, here: Path) -> None:
        fedchorus("provision", "federation.toml", "--out", "coordinator")
        fedchorus("enrol", "coordinator/invitation.json", "--name", "north", "--out", "north")
        fedchorus("sign", "coordinator", "north/request.json", "--yes")
        assert "north is revoked" in fedchorus("revoke", "coordinator", "north", "--reason", "stolen").stdout
        told = fedchorus("token", "coordinator", "alice").stdout
        assert "operator-alice/operator.json" in told
        assert json.loads(Path("coordinator/operator-alice/operator.json").read_text())["token"] not in told

    def test_take_the_passphrase_from_a_file(self, here: Path) -> None:
        Path("passphrase").write_text("secret\n")
        secret = ("--passphrase-file", "passphrase")
        fedchorus("provision", "federation.toml", "--out", "coordinator", *secret)
        fedchorus("enrol", "coordinator/invitation.json", "--name", "north", "--out", "north", *secret)
        fedchorus("sign", "coordinator", "north/request.json", "--yes", *secret)
        fedchorus("accept", "north", "coordinator/kits/north.kit.json", "--yes", *secret)
        for key in ("coordinator/identity.pem", "north/keys/identity.pem"):
            with pytest.raises(LedgerError, match="--passphrase-file"):
                IdentityKey.load(here / key)

    @pytest.mark.parametrize("command", ["provision", "sign", "revoke", "token", "enrol", "accept"])
    def test_show_an_example_in_their_help(self, command: str) -> None:
        assert f"Example: fedchorus {command} " in " ".join(fedchorus(command, "--help").stdout.split())


def test_the_settings_that_enrolment_writes_name_every_key(federation: Federation) -> None:
    federation.enrol("north")
    text = (federation.folder / "north" / "site.toml").read_text()
    for key in [*Settings.model_fields, "isolation", "memory_gb", "listen", "path"]:
        assert re.search(rf"^(# )?(\[(data\.)?)?{key}\b", text, re.MULTILINE), key
    uncommented = re.sub(r"^# (?=\[data|path =|memory_gb =|listen =)", "", text, flags=re.MULTILINE)
    assert set(tomllib.loads(uncommented)) == set(Settings.model_fields)
