"""A site joins a federation: make the keys and a request, then accept the coordinator's kit.

The roster is where a site decides whom it trusts. `review` says what a kit changes; `accept` signs the roster and pins
its hash in `site.toml`. A key that changed, or an older roster, is accepted only where a person says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from client.settings import VERSION, Settings, SiteFolder, pin_roster
from privacy.authority import authority_of, make_csr, peer_of_pem
from privacy.durable import write_atomically
from privacy.enrolment import EnrolmentRequest, Invitation, Kit, key_fingerprint, with_signatures
from privacy.errors import Refused, RunError
from privacy.keys import IdentityKey, TlsKey, new_private_folder
from privacy.ledger import SITE_NAME
from privacy.secagg.roster import Roster

Document = TypeVar("Document", Invitation, EnrolmentRequest, Kit)

SITE_TOML = """\
# The one configuration file of this site. What may leave the site is in policy.toml.
version = {version}
name = "{name}"
federation = "{federation}"
server = "{server}"
coordinator = "{coordinator}"

# The list of participants that this site agreed to, by its hash: fedchorus accept writes it.
roster = ""

# Refuse to work when the clock of the server is further away, in seconds.
max_clock_skew_s = 300

# One table for each data set that a job may name, with its file or folder of images. Take the # away and edit:
# [data.records]
# path = "/srv/data/records.csv"

[trainer]
# "required": no training unless the process that runs model and data code is cut off from the network.
# "auto": as well as this machine can. "none": not at all.
isolation = "auto"
# memory_gb = 16
# The folder of this site's pre-trained checkpoints, one folder each, which a job names by "models:NAME":
# models = "/srv/models"
# Training that takes longer than this in one round is ended, whatever the job says (seconds).
longest_s = 3600

[health]
# listen = "127.0.0.1:9100"
"""


def enrol(
    invitation: Invitation, name: str, out: Path, *, policy: str, passphrase: bytes | None = None
) -> EnrolmentRequest:
    """Make a site's folder `out` with its own keys, settings, `policy` (the text of policy.toml) and a request.

    That the invitation is the coordinator's is for a person to say, who compares its fingerprint. Raises `RunError`
    for a folder that holds anything: no key is ever overwritten.
    """
    if not SITE_NAME.fullmatch(name):
        raise RunError(f"--name {name!r}: not a name (letters, digits, dot, dash, underscore; at most 64)")
    new_private_folder(out)
    files = SiteFolder(out)
    for folder in (files.identity.parent, files.state, out / "ledgers"):
        folder.mkdir(mode=0o700)
    identity, tls = IdentityKey.create(files.identity, passphrase), TlsKey.create(files.tls_key, passphrase)
    request = EnrolmentRequest.make(invitation, name, identity=identity, tls=tls)
    settings = SITE_TOML.format(
        version=VERSION,
        name=name,
        federation=invitation.federation,
        server=invitation.address,
        coordinator=invitation.coordinator,
    )
    write_atomically(files.settings, settings.encode())
    write_atomically(files.policy, policy.encode())
    write_atomically(files.invitation, invitation.to_bytes())
    write_atomically(files.request, request.to_bytes())
    return request


@dataclass(frozen=True)
class Review:
    """What a kit would change. `warnings` need a person's word (`allow_changed_keys`); `news` say who came and went."""

    kit: Kit
    invitation: Invitation
    warnings: tuple[str, ...]
    news: tuple[str, ...]

    @property
    def roster(self) -> Roster:
        return self.kit.participants


def review(folder: Path, kit_file: Path) -> Review:
    """Hold a kit to this site's invitation, request and the roster that it agreed to. Nothing is written.

    Raises `Refused` for a kit that is not the coordinator's answer to this site.
    """
    files, settings = SiteFolder(folder), Settings.load(folder)
    invitation = read_invitation(files.invitation)
    if invitation.coordinator != settings.coordinator:
        raise Refused(f"{files.settings}: coordinator is another one than the invitation's; put back what it was")
    request = EnrolmentRequest.parse(_read(files.request, EnrolmentRequest), invitation)
    kit = Kit.parse(_read(kit_file, Kit), request, invitation)
    if kit.site != settings.name:
        raise Refused(f"{files.settings}: name is {settings.name}, the kit is for {kit.site}; put back what it was")
    old = Roster.load(files.roster) if files.roster.exists() else None
    warnings = [] if old is None else _warnings(old, kit.participants, _met(files))
    if settings.roster and (old is None or settings.roster not in (old.hash, kit.participants.hash)):
        warnings.append("the roster that this site agreed to is missing: nobody can tell whose key changed")
    return Review(kit, invitation, tuple(warnings), _news(old, kit.participants))


def accept(
    folder: Path,
    review: Review,
    *,
    now: datetime,
    passphrase: bytes | None = None,
    allow_changed_keys: bool = False,
) -> Roster:
    """Sign the kit's roster, pin it, install the certificate; return the roster with all signatures there are.

    Raises `Refused` for a review with warnings unless `allow_changed_keys`, and for a certificate of another key. Cut
    off in the middle it is repeated as it was: until the roster is there, last, it is not the one that is pinned.
    """
    if review.warnings and not allow_changed_keys:
        raise Refused(
            f"{'; '.join(review.warnings)}: ask the sites themselves, then repeat with --allow-changed-keys if it is so"
        )
    files, kit, roster = SiteFolder(folder), review.kit, review.roster
    identity = IdentityKey.load(files.identity, passphrase)
    others = {name: signature for name, signature in roster.signatures.items() if name != kit.site}
    if files.roster.exists() and (old := Roster.load(files.roster)).hash == roster.hash:
        others = {**old.signatures, **others}
    unsigned = Roster(roster.federation, roster.version, roster.members)
    signed = with_signatures(unsigned, others).signed_by(identity, kit.site)
    certificate = kit.certificate.encode()
    if not files.certificate.exists() or _is_newer(files, review.invitation, certificate):
        install_certificate(folder, certificate, now=now, passphrase=passphrase)
    write_atomically(files.authority, review.invitation.authority.encode())
    pin_roster(folder, signed.hash)
    met = {**_met(files), **{member.name: member.key for member in signed.members}}
    write_atomically(files.state / "members.json", json.dumps(met, indent=1, sort_keys=True).encode() + b"\n")
    signed.save(files.roster)
    return signed


def add_signatures(folder: Path, signatures: Mapping[str, str]) -> Roster:
    """Keep other members' signatures of the roster that this site pinned; return it with all there are.

    Raises `Refused` for a roster that is not the pinned one and for a signature that its member did not make.
    """
    path, pinned = SiteFolder(folder).roster, Settings.load(folder).roster
    roster = Roster.load(path)
    if roster.hash != pinned:
        raise Refused(f"{path}: not the roster that site.toml pins; accept the coordinator's kit again")
    roster = with_signatures(roster, signatures)
    roster.save(path)
    return roster


def renewal_csr(folder: Path, passphrase: bytes | None = None) -> bytes:
    """Ask for a new certificate of the TLS key that the site has (PKCS#10 in PEM)."""
    return make_csr(TlsKey.load(SiteFolder(folder).tls_key, passphrase), Settings.load(folder).name)


def install_certificate(folder: Path, pem: bytes, *, now: datetime, passphrase: bytes | None = None) -> None:
    """Replace the site's certificate by a newer one, whole or not at all.

    Raises `Refused` unless the federation's authority issued it, in this site's name, for this site's TLS key, it is
    valid now, and ends later than the one that is installed.
    """
    files = SiteFolder(folder)
    invitation, name = read_invitation(files.invitation), Settings.load(folder).name
    peer = peer_of_pem(pem, authority=authority_of(invitation.authority.encode()))
    if peer.site != name:
        raise Refused(f"certificate: it is for {peer.site}, this is {name}; tell the coordinator")
    if peer.public_bytes != TlsKey.load(files.tls_key, passphrase).public_bytes:
        raise Refused(
            f"certificate: it is for another key than {files.tls_key}; send the coordinator request.json again"
        )
    if now > peer.not_after:
        raise Refused(
            f"certificate: it ended on {peer.not_after:%Y-%m-%d}; ask the coordinator to sign request.json again"
        )
    if now < peer.not_before:
        raise Refused(f"certificate: it begins at {peer.not_before:%Y-%m-%d %H:%M} UTC; is this machine's clock right?")
    if files.certificate.exists() and not _is_newer(files, invitation, pem):
        raise Refused("certificate: it does not end later than the one that is installed")
    write_atomically(files.certificate, pem)


def read_invitation(path: Path) -> Invitation:
    """Read an invitation file. Raises `RunError` for no file, `Refused` for one that is damaged."""
    return Invitation.parse(_read(path, Invitation))


def _read(path: Path, kind: type[Document]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(kind.MOST_BYTES + 1)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None


def _is_newer(files: SiteFolder, invitation: Invitation, pem: bytes) -> bool:
    authority = authority_of(invitation.authority.encode())
    try:
        installed = peer_of_pem(files.certificate.read_bytes(), authority=authority)
    except Refused:
        return True  # Whatever lies there lets nobody in.
    return peer_of_pem(pem, authority=authority).not_after > installed.not_after


def _warnings(old: Roster, new: Roster, met: Mapping[str, str]) -> list[str]:
    """`met` are the keys of all members that this site ever agreed to: one that left may not come back as another."""
    warnings = []
    if new.version < old.version:
        warnings.append(f"roster version {new.version} is older than {old.version}, which this site agreed to")
    if new.version == old.version and new.hash != old.hash:
        warnings.append(f"roster version {new.version} is another one than the version {old.version} agreed to")
    keys = {**met, **{member.name: member.key for member in old.members}}
    names = {key: name for name, key in keys.items()}
    for member in new.members:
        if keys.get(member.name, member.key) != member.key:
            was, now = key_fingerprint(keys[member.name]), key_fingerprint(member.key)
            warnings.append(f"{member.name}'s key changed from {was} to {now}")
        if names.get(member.key, member.name) != member.name:
            warnings.append(f"{names[member.key]}'s key is now {member.name}'s")
    return warnings


def _met(files: SiteFolder) -> dict[str, str]:
    """The newest key of each member that this site ever agreed to. Raises `RunError` for a damaged file."""
    path = files.state / "members.json"
    try:
        met = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        met = None
    if not isinstance(met, dict) or not all(isinstance(key, str) for key in met.values()):
        raise RunError(f"{path}: damaged; restore it from a backup, or remove it and compare all keys by hand")
    return met


def _news(old: Roster | None, new: Roster) -> tuple[str, ...]:
    before = {member.name for member in old.members} if old else set()
    after = {member.name for member in new.members}
    joined = [f"{name} joins" for name in sorted(after - before)] if old else []
    return (*joined, *(f"{name} leaves" for name in sorted(before - after)))
