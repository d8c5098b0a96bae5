"""Who is in a federation: sign sites' requests into kits, renew their certificates, revoke them.

One record a site (`sites/NAME.json`) has what was issued to it; a certificate is on record before anybody has it, so
that a revocation reaches all there are. A change of members, names or keys is a new version of the roster, and a new
kit for everyone. Slots are never given twice.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from privacy.authority import Authority, Peer, Revocations, key_of_csr, peer_of, peer_of_pem, public_pem
from privacy.durable import write_atomically
from privacy.enrolment import EnrolmentRequest, Kit, with_signatures
from privacy.errors import Refused, RunError
from privacy.keys import IdentityKey
from privacy.secagg.roster import MAX_SLOT, Member, Roster
from server.provision import ServerSettings, read_invitation

FORMAT = "fedchorus site 1"
MOST_CERTIFICATES = 64  # Valid at a time: a site in a loop cannot grow its record without end.


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """What the coordinator knows of one site. `serials` has when each certificate that is still valid ends (ISO)."""

    site: str
    slot: int
    identity: str
    certificate: str
    request: str
    serials: Mapping[str, str]
    revoked: bool = False


@dataclass(frozen=True)
class Pending:
    """A request that was checked, and what signing it means."""

    request: EnrolmentRequest
    kind: Literal["new", "renewal", "replacement"]


@dataclass(frozen=True)
class Signed:
    """The kits that were written, by site, and the roster's version; `changed` says whether that is a new one."""

    kits: dict[str, Path]
    version: int
    changed: bool


def read_request(folder: Path, path: Path) -> EnrolmentRequest:
    """Read a site's request and hold it to this coordinator's invitation. Raises `Refused`, `RunError`."""
    try:
        with open(path, "rb") as file:
            data = file.read(EnrolmentRequest.MOST_BYTES + 1)
    except OSError as error:
        raise RunError(f"{path}: the request cannot be read ({error.strerror})") from None
    try:
        return EnrolmentRequest.parse(data, read_invitation(folder))
    except Refused as error:
        raise Refused(f"{path}: {error}") from None


def review(folder: Path, requests: Sequence[EnrolmentRequest], *, replace_keys: bool = False) -> list[Pending]:
    """Say what signing each request would mean; nothing is written.

    Raises `Refused` for a name or key of another site, a revoked identity key, two requests of one site and, without
    `replace_keys`, a known site with another identity key.
    """
    records, revocations = _records(folder), Revocations(folder / "revoked.json")
    owners, pending = _owners(records), list[Pending]()
    for number, request in enumerate(requests):
        name, key = request.site, _tls_key(request)
        for before in requests[:number]:
            if before.site.lower() == name.lower() or before.identity == request.identity or _tls_key(before) == key:
                raise Refused(f"{name}: {before.site}, in the same call, has the same name or key; ask both sites")
        for other in (record for record in records.values() if record.site != name):
            if other.site.lower() == name.lower():
                raise Refused(f"{name}: differs only in capitals from {other.site}; ask for another name")
            if other.identity == request.identity or owners.get(key) == other.site:
                raise Refused(f"{name}: its key is {other.site}'s; each site makes its own with fedchorus enrol")
        if revocations.is_key_revoked(request.identity):
            raise Refused(f"{name}: its identity key was revoked; the site enrols anew, into another folder")
        known = records.get(name)
        kind: Literal["new", "renewal", "replacement"] = "new" if known is None else "renewal"
        if revocations.is_site_revoked(name) or (known is not None and known.identity != request.identity):
            kind = "replacement"
            if not replace_keys:
                raise Refused(
                    f"{name}: this name is another identity key's; if you know that the site made a new key, sign with "
                    "--replace, which ends the old one"
                )
        pending.append(Pending(request, kind))
    return pending


def sign(
    folder: Path,
    requests: Sequence[EnrolmentRequest],
    *,
    now: datetime,
    passphrase: bytes | None = None,
    replace_keys: bool = False,
) -> Signed:
    """Issue a certificate for each request, write the roster if it changed, and the kits: all members' if it did.

    Raises what `review` does, before anything is written.
    """
    days, coordinator = ServerSettings.load(folder).certificate_days, _coordinator(folder, passphrase)
    authority, revocations = Authority.load(folder / "authority", passphrase), Revocations(folder / "revoked.json")
    with _locked(folder):
        pending, records = review(folder, requests, replace_keys=replace_keys), _records(folder)
        for item in pending:
            request = item.request
            old = records.get(request.site)
            certificate = authority.issue_client(request.csr.encode(), site=request.site, days=days, now=now)
            if old is not None and item.kind == "replacement":
                revocations.add(serials=old.serials, key=old.identity, reason="replaced by a new key", now=now)
            slot = 1 + max((record.slot for record in records.values()), default=0) if old is None else old.slot
            if slot > MAX_SLOT:
                raise Refused(f"{request.site}: the federation has given away all its {MAX_SLOT} slots")
            record = SiteRecord(
                site=request.site,
                slot=slot,
                identity=request.identity,
                certificate="",
                request=request.hash,
                serials=old.serials if old and item.kind == "renewal" else {},
            )
            records[request.site] = _with_certificate(record, certificate, authority, now)
            _save(folder, records[request.site])
            if item.kind == "replacement":
                revocations.readmit(request.site)
        return _publish(folder, coordinator, {request.site for request in requests})


def revoke(folder: Path, site: str, *, reason: str, now: datetime, passphrase: bytes | None = None) -> Signed:
    """Let a site in no longer: its name, every certificate of it and its identity key; a roster without it.

    It holds from the next call that the site makes. Raises `RunError` for a name that is none of the sites'.
    """
    coordinator = _coordinator(folder, passphrase)
    with _locked(folder):
        record = _record(folder, site)
        Revocations(folder / "revoked.json").add(
            site=site, serials=record.serials, key=record.identity, reason=reason, now=now
        )
        _save(folder, replace(record, revoked=True))
        (folder / "kits" / f"{site}.kit.json").unlink(missing_ok=True)
        return _publish(folder, coordinator, set())


def renew(folder: Path, csr_pem: bytes, *, peer: Peer, authority: Authority, days: float, now: datetime) -> bytes:
    """Issue a new certificate to the site at the other end of a TLS connection; return PEM.

    It is on record, and durable, before this returns. Raises `Refused` for a revoked or unknown certificate, a request
    in another name or with another site's key.
    """
    with _locked(folder):
        records = _records(folder)
        record = records.get(peer.site)
        if record is None or record.revoked or peer.serial_hex not in record.serials:
            raise Refused(
                f"{peer.site}: no such certificate is on record; send the coordinator a new enrolment request"
            )
        if Revocations(folder / "revoked.json").is_revoked(peer):
            raise Refused(f"{peer.site}: its certificate was revoked; ask the coordinator")
        key = public_pem(key_of_csr(csr_pem, peer.site))
        if _owners(records).get(key, peer.site) != peer.site:
            raise Refused(f"{peer.site}: its key is another site's")
        if sum(datetime.fromisoformat(until) > now for until in record.serials.values()) >= MOST_CERTIFICATES:
            raise Refused(f"{peer.site}: it has {MOST_CERTIFICATES} certificates that are valid; use one of them")
        certificate = authority.renew(csr_pem, peer=peer, days=days, now=now)
        _save(folder, _with_certificate(record, certificate, authority, now))
        return certificate


def site_keys(folder: Path) -> dict[str, bytes]:
    """The public key of each member's newest certificate, as Flower's node authentication has it, by site."""
    records = {name: record for name, record in _records(folder).items() if not record.revoked}
    return {name: key for key, name in _owners(records).items()}


def add_signature(folder: Path, site: str, signature: str) -> Roster:
    """Keep a member's signature of the current roster; return the roster with all there are.

    Raises `Refused` for one that the member did not make: of another version, or by another key.
    """
    with _locked(folder):
        roster = with_signatures(Roster.load(folder / "roster.json"), {site: signature})
        roster.save(folder / "roster.json")
        return roster


def _publish(folder: Path, coordinator: IdentityKey, signed: set[str]) -> Signed:
    records = {name: record for name, record in _records(folder).items() if not record.revoked}
    path, roster = folder / "roster.json", None
    if path.exists():
        roster = Roster.load(path)
    members = tuple(
        Member(record.slot, name, record.identity)
        for name, record in sorted(records.items(), key=lambda item: item[1].slot)
    )
    changed = roster is None or roster.members != members
    if not members:
        # A roster has members. The one there stays, for its version; nobody in it is let in.
        return Signed({}, roster.version if roster else 0, False)
    if roster is None or changed:
        federation, version = read_invitation(folder).federation, roster.version + 1 if roster else 1
        roster = Roster(federation, version, members)
        roster.save(path)
    kits = {}
    for name, record in records.items():
        if changed or name in signed:
            kits[name] = folder / "kits" / f"{name}.kit.json"
            kit = Kit.make(
                coordinator,
                site=name,
                certificate=record.certificate.encode(),
                request=record.request,
                roster=roster,
            )
            write_atomically(kits[name], kit.to_bytes())
    return Signed(kits, roster.version, changed)


def _with_certificate(record: SiteRecord, pem: bytes, authority: Authority, now: datetime) -> SiteRecord:
    peer = peer_of_pem(pem, authority=authority.certificate)
    valid = {serial: until for serial, until in record.serials.items() if datetime.fromisoformat(until) > now}
    return replace(
        record,
        certificate=pem.decode(),
        serials={**valid, peer.serial_hex: peer.not_after.astimezone(UTC).isoformat()},
    )


def _records(folder: Path) -> dict[str, SiteRecord]:
    return {path.stem: _record(folder, path.stem) for path in sorted((folder / "sites").glob("*.json"))}


def _record(folder: Path, site: str) -> SiteRecord:
    path = folder / "sites" / f"{site}.json"
    try:
        record = json.loads(path.read_bytes())
        if record.pop("format") == FORMAT and record["site"] == site:
            return SiteRecord(**record)
    except FileNotFoundError:
        known = [other.stem for other in (folder / "sites").glob("*.json")]
        near = difflib.get_close_matches(site, known, n=1)
        raise RunError(f"{site!r} is no site of {folder}" + (f"; did you mean {near[0]!r}?" if near else "")) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise RunError(f"{path}: damaged; restore it from a backup")


def _save(folder: Path, record: SiteRecord) -> None:
    path = folder / "sites" / f"{record.site}.json"
    write_atomically(path, json.dumps({"format": FORMAT, **asdict(record)}, indent=1).encode() + b"\n")


def _owners(records: Mapping[str, SiteRecord]) -> dict[bytes, str]:
    """Whose TLS key is which."""
    return {
        peer_of(ssl.PEM_cert_to_DER_cert(record.certificate)).public_bytes: name for name, record in records.items()
    }


def _tls_key(request: EnrolmentRequest) -> bytes:
    return public_pem(key_of_csr(request.csr.encode(), request.site))


def _coordinator(folder: Path, passphrase: bytes | None) -> IdentityKey:
    return IdentityKey.load(folder / "identity.pem", passphrase)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One command, or the server, changes the members at a time."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
