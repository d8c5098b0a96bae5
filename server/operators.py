"""Operators: who may submit jobs. Each holds a token; the server keeps only its SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from privacy.durable import write_atomically
from privacy.enrolment import Invitation
from privacy.errors import RunError
from privacy.keys import write_secret
from privacy.ledger import SITE_NAME

FORMAT = "fedchorus operator 1"


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What the person who submits needs: where the server is, whom to believe (PEM) and their own secret `token`."""

    operator: str
    federation: str
    address: str
    authority: str
    token: str = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> Operator:
        """Read an operator file. Raises `RunError`."""
        try:
            record = json.loads(path.read_bytes())
            if record.pop("format") == FORMAT and all(isinstance(value, str) for value in record.values()):
                return cls(**record)
        except OSError as error:
            raise RunError(f"{path}: the operator's file cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            pass
        raise RunError(f"{path}: not an operator's file; the coordinator makes one with fedchorus token")


def new_token(folder: Path, name: str, invitation: Invitation, *, now: datetime) -> Path:
    """Make a token for operator `name`, whose older one ends; return the file to hand over (0600).

    The file is operator.json in the folder `operator`, or `operator-NAME` where that one is somebody else's.
    """
    if not SITE_NAME.fullmatch(name):
        raise RunError(f"operator {name!r}: not a name (letters, digits, dot, dash, underscore; at most 64)")
    known = folder / "operators.json"
    try:
        operators = json.loads(known.read_bytes()) if known.exists() else {}
    except ValueError:
        raise RunError(f"{known}: damaged; restore it from a backup") from None
    operator = Operator(
        operator=name,
        federation=invitation.federation,
        address=invitation.address,
        authority=invitation.authority,
        token=secrets.token_urlsafe(32),
    )
    path = _file_of(folder, name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fresh = path.with_name("operator.json.new")
    fresh.unlink(missing_ok=True)  # Of a command that was cut off: its token never came to count.
    write_secret(fresh, json.dumps({"format": FORMAT, **asdict(operator)}, indent=1).encode() + b"\n")
    digest = hashlib.sha256(operator.token.encode()).hexdigest()
    operators[name] = {"sha256": digest, "created": now.astimezone(UTC).isoformat(timespec="seconds")}
    write_atomically(known, json.dumps(operators, indent=1, sort_keys=True).encode() + b"\n")
    os.replace(fresh, path)
    return path


def _file_of(folder: Path, name: str) -> Path:
    first = folder / "operator" / "operator.json"
    return (
        first
        if not first.exists() or Operator.load(first).operator == name
        else folder / f"operator-{name}" / first.name
    )
