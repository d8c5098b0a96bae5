"""Make a federation: the coordinator's folder with its authority, keys, invitation and first operators.

    federation.toml  server.toml  invitation.json  identity.pem  authority/  tls/  sites/  revoked.json  operators.json
    operator/        (to hand to the person who submits)

What is secret (keys, tokens) is readable by its owner alone. Sites join afterwards (`server.membership`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from privacy.authority import Authority, Revocations
from privacy.durable import write_atomically
from privacy.enrolment import Invitation, split_address
from privacy.errors import Refused, RunError
from privacy.keys import IdentityKey, TlsKey, new_private_folder
from server.operators import new_token
from strategies.sections import Name, Positive, Section
from strategies.settings import Address, Hex32, read_settings

SERVER_TOML = """\
# The coordinator's server. It reads this file when it starts.
version = 1
federation = "{name}"

# Where it listens. What sites call is the address in invitation.json.
listen = "{listen}"

# Names and addresses under which it is reached; its certificate has them all.
hosts = {hosts}

# How long certificates last. Server and sites renew theirs by themselves.
certificate_days = {days}

# How long a round waits for answers where its job does not say (seconds), and how long it waits for sites that are
# away when enough are there without them.
round_deadline_s = 3600
patience_s = 20

# Strategies of your own, "package.module:Name", that jobs may ask this server to run. They must be installed here.
strategies = []

# Whether /metrics is for everybody who reaches the address above, or for this machine alone.
public_metrics = false
"""


def _listen(text: str) -> str:
    try:
        split_address(text if text.rpartition("]")[2].count(":") == 1 else f"{text}:1")
    except Refused:
        raise ValueError('expected "host" or "host:port", an IPv6 host in brackets') from None
    return text


def _host(text: str) -> str:
    try:
        split_address(f"[{text}]:1" if ":" in text else f"{text}:1")
    except Refused:
        raise ValueError("expected a host name or an IP address") from None
    return text


Host = Annotated[str, AfterValidator(_host)]
Days = Annotated[int, Field(ge=1, le=825)]  # Some TLS libraries accept no longer-lived server.


class Approval(Section):
    """Who must sign a job before sites run it: `required` of the `approvers` (Ed25519 keys by name)."""

    required: Annotated[int, Field(ge=0)] = 0
    approvers: dict[Name, Hex32] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _enough_approvers(self) -> Self:
        if self.required > len(self.approvers):
            raise ValueError(f"required is {self.required}, but there are {len(self.approvers)} approvers")
        if len(set(self.approvers.values())) != len(self.approvers):
            raise ValueError("two approvers have the same key")
        return self


class FederationFile(Section):
    """`federation.toml`. `address` is what sites call; `hosts` are further names of the server."""

    name: Name
    address: Address
    listen: Annotated[str, AfterValidator(_listen)] = "0.0.0.0"
    hosts: list[Host] = Field(default_factory=list)
    certificate_days: Days = 30
    operators: list[Name] = Field(default=["ops"], min_length=1)
    approval: Approval = Approval()


class ServerSettings(Section):
    """`server.toml`, as `provision` writes it and the server reads it."""

    version: Literal[1]
    federation: Name
    listen: Address
    hosts: Annotated[list[Host], Field(min_length=1)]
    certificate_days: Days
    round_deadline_s: Positive = 3600.0
    patience_s: Positive = 20.0
    strategies: list[str] = Field(default_factory=list)
    public_metrics: bool = False

    @classmethod
    def load(cls, folder: Path) -> ServerSettings:
        """Read the settings in a coordinator's folder. Raises `RunError`, one line, for any mistake."""
        return read_settings(folder / "server.toml", cls, what="server settings", version=1)


@dataclass(frozen=True)
class Provisioned:
    """The invitation to send to sites, and the file of each operator to hand over."""

    invitation: Invitation
    operators: dict[str, Path]


def provision(federation_file: Path, out: Path, *, now: datetime, passphrase: bytes | None = None) -> Provisioned:
    """Make the coordinator's folder `out` from `federation.toml`; keys are encrypted where there is a passphrase.

    Raises `RunError` for a mistake in the file and for a folder that holds anything.
    """
    wanted = read_settings(federation_file, FederationFile, what="federation file")
    host, port = split_address(wanted.address)
    listen = wanted.listen if wanted.listen.rpartition("]")[2].count(":") else f"{wanted.listen}:{port}"
    hosts = [host, *(other for other in wanted.hosts if other != host)]
    content = federation_file.read_bytes()
    new_private_folder(out)
    for name in ("authority", "tls", "sites", "kits"):
        (out / name).mkdir(mode=0o700)
    identity = IdentityKey.create(out / "identity.pem", passphrase)
    authority = Authority.create(out / "authority", wanted.name, now=now, passphrase=passphrase)
    server = TlsKey.create(out / "tls" / "server.key", passphrase)
    certificate = authority.issue_server(server, hosts, days=wanted.certificate_days, now=now)
    write_atomically(out / "tls" / "server.pem", certificate)
    Revocations.create(out / "revoked.json")
    invitation = Invitation(
        federation=wanted.name,
        address=wanted.address,
        authority=authority.pem.decode(),
        coordinator=identity.public_hex,
        approvers=wanted.approval.approvers,
        required=wanted.approval.required,
    ).signed(identity)
    write_atomically(out / "federation.toml", content)
    settings = SERVER_TOML.format(
        name=wanted.name, listen=listen, hosts=json.dumps(hosts), days=wanted.certificate_days
    )
    write_atomically(out / "server.toml", settings.encode())
    operators = {name: new_token(out, name, invitation, now=now) for name in wanted.operators}
    write_atomically(out / "invitation.json", invitation.to_bytes())  # Last: without it nothing else is used.
    return Provisioned(invitation, operators)


def read_invitation(folder: Path) -> Invitation:
    """Read the invitation in a coordinator's folder. Raises `RunError` where there is none."""
    path = folder / "invitation.json"
    try:
        return Invitation.parse(path.read_bytes())
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}); is this the folder that fedchorus provision made?"
        ) from None


def renew_server(folder: Path, *, now: datetime, passphrase: bytes | None = None) -> None:
    """Give the server a new certificate for the key that it has, as `server.toml` says now."""
    settings = ServerSettings.load(folder)
    authority = Authority.load(folder / "authority", passphrase)
    key = TlsKey.load(folder / "tls" / "server.key", passphrase)
    certificate = authority.issue_server(key, settings.hosts, days=settings.certificate_days, now=now)
    write_atomically(folder / "tls" / "server.pem", certificate)
