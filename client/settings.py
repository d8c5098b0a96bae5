"""A site's folder: where each file lies, and `site.toml`, the one configuration file.

site.toml  policy.toml  keys/{identity.pem,tls.key}  invitation.json  request.json  certificate.pem  authority.pem
roster.json  ledgers/DATASET.jsonl  state/
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from privacy.durable import write_atomically
from privacy.errors import RunError
from strategies.sections import Name, Positive, Section
from strategies.settings import Address, Hex32, read_settings

VERSION = 1
_PIN = re.compile(r'^(roster[ \t]*=[ \t]*")[0-9a-f]*(")', re.MULTILINE)


@dataclass(frozen=True)
class SiteFolder:
    """The paths in a site's folder."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "site.toml"

    @property
    def policy(self) -> Path:
        return self.path / "policy.toml"

    @property
    def identity(self) -> Path:
        return self.path / "keys" / "identity.pem"

    @property
    def tls_key(self) -> Path:
        return self.path / "keys" / "tls.key"

    @property
    def invitation(self) -> Path:
        return self.path / "invitation.json"

    @property
    def request(self) -> Path:
        return self.path / "request.json"

    @property
    def certificate(self) -> Path:
        return self.path / "certificate.pem"

    @property
    def authority(self) -> Path:
        return self.path / "authority.pem"

    @property
    def roster(self) -> Path:
        return self.path / "roster.json"

    @property
    def state(self) -> Path:
        return self.path / "state"

    def ledger(self, dataset: str) -> Path:
        return self.path / "ledgers" / f"{dataset}.jsonl"


class DataSet(Section):
    """Where the records of one data set are; a relative path starts at the site's folder."""

    path: Annotated[str, Field(min_length=1)]


class TrainerSettings(Section):
    """How the process that runs the user's code is shut in, and how much memory and time it may take. `models` is the
    folder of this site's pre-trained checkpoints; a relative path starts at the site's folder. A small device trains
    heads without torch (`edge`)."""

    models: Annotated[str, Field(min_length=1)] | None = None
    engine: Literal["torch", "edge"] = "torch"
    isolation: Literal["auto", "required", "none"] = "auto"
    memory_gb: Positive | None = None
    longest_s: Positive = 3600.0


class Health(Section):
    """Where the health endpoint listens; nowhere without."""

    listen: Address | None = None


class Settings(Section):
    """`site.toml`. `roster` is the hash of the roster that this site agreed to, or "" before it did."""

    version: Literal[1]
    name: Name
    federation: Name
    server: Address
    coordinator: Hex32
    roster: str = ""
    data: dict[Name, DataSet] = Field(default_factory=dict)
    trainer: TrainerSettings = TrainerSettings()
    health: Health = Health()
    max_clock_skew_s: Annotated[float, Field(gt=0, le=3600)] = 300

    @field_validator("roster")
    @classmethod
    def _a_hash_or_nothing(cls, value: str) -> str:
        if not re.fullmatch(r"([0-9a-f]{64})?", value):
            raise ValueError('expected a hash of 64 hexadecimal digits, lower case, or ""; fedchorus accept writes it')
        return value

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Read the settings in a site's folder. Raises `RunError`, one line, for any mistake."""
        return read_settings(SiteFolder(folder).settings, cls, what="site settings", version=VERSION)


def pin_roster(folder: Path, roster_hash: str) -> None:
    """Write the hash of the roster into `site.toml`, in its place; every other byte stays, the comments too.

    Raises `RunError`, and changes nothing, where the file has no plain line `roster = "..."`.
    """
    path = SiteFolder(folder).settings
    before = path.read_bytes().decode()
    after = _PIN.sub(rf"\g<1>{roster_hash}\g<2>", before, count=1)
    # Of two such lines one may be in a table or a text: what counts is what the file then says.
    if tomllib.loads(after.removeprefix("\ufeff")) != {
        **tomllib.loads(before.removeprefix("\ufeff")),
        "roster": roster_hash,
    }:
        raise RunError(f'{path}: has no line of its own that begins with `roster = "`; write: roster = "{roster_hash}"')
    write_atomically(path, after.encode())
