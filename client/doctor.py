"""`fedchorus doctor`: what would stop this site, found before a job finds it, each with what to do about it.

Every check stands for itself: what is broken hides nothing but what cannot be asked without it. Nothing on the disk is
changed, and neither keys nor records are shown: of data, how many rows and columns. `client.reach` asks the server,
`client.machine` measures, `client.rehearsal` tries a job.
"""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from client.enrol import read_invitation
from client.history import History
from client.machine import Machine
from client.policy import Policy
from client.reach import NotReached, ask_server
from client.settings import Settings, SiteFolder
from privacy.authority import authority_of, peer_of_pem
from privacy.budget import Accounts, Limit
from privacy.enrolment import Invitation, with_signatures
from privacy.errors import FedchorusError, LedgerError
from privacy.keys import IdentityKey, TlsKey
from privacy.ledger import Entry, parse
from privacy.secagg.roster import Roster

if TYPE_CHECKING:
    from client.rehearsal import Rehearsal

Level = Literal["ok", "warning", "error"]
MARKS: dict[Level, str] = {"ok": "ok   ", "warning": "warn ", "error": "ERROR"}
WARN_DISK, LEAST_DISK = 5 * 10**9, 500 * 10**6  # Bytes, as those of memory.
WARN_MEMORY, LEAST_MEMORY = 2 * 10**9, 500 * 10**6
WARN_FILES, LEAST_FILES = 1024, 256
NEARLY_SPENT = 0.9  # Of a budget.
_Key = TypeVar("_Key", IdentityKey, TlsKey)


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found there and, unless all is well, how to mend it."""

    level: Level
    what: str
    found: str
    fix: str = ""

    @property
    def mark(self) -> str:
        return MARKS[self.level]

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(
    folder: Path,
    passphrase: bytes | None = None,
    *,
    now: datetime | None = None,
    job: Path | None = None,
    machine: Machine | None = None,
    timeout_s: float = 10.0,
) -> list[Finding]:
    """Examine a site's folder, its machine and the way to its server; with `job` (a job file) that job here, too.

    A site's mistake is a finding and raises nothing. A server that does not answer costs `timeout_s`. `now` is this
    machine's time, with its zone; by default the clock's.
    """
    if not folder.is_dir():
        return [Finding("error", "folder", f"{folder}: no such folder", "give the one that `fedchorus enrol` made")]
    examination = _Examination(folder, passphrase, now or datetime.now(UTC), machine or Machine(), timeout_s)
    examination.run(job)
    return examination.findings


class _Examination:
    """The checks in their order. What several of them need is read once, and is None where it cannot be."""

    def __init__(
        self, folder: Path, passphrase: bytes | None, now: datetime, machine: Machine, timeout_s: float
    ) -> None:
        self.files, self.passphrase, self.now, self.machine = SiteFolder(folder), passphrase, now, machine
        self.timeout_s, self.began = timeout_s, time.monotonic()
        self.findings: list[Finding] = []
        self.settings: Settings | None = None
        self.policy: Policy | None = None
        self.invitation: Invitation | None = None
        self.identity: IdentityKey | None = None
        self.tls: TlsKey | None = None
        self.roster: Roster | None = None
        self.ledgers: dict[str, list[Entry]] = {}

    def run(self, job: Path | None) -> None:
        own = self._check_settings, self._check_policy, self._check_invitation, self._check_keys, self._check_roster
        around = self._check_certificate, self._check_server, self._check_machine, self._check_trainer
        for check in (*own, *around, self._check_history, self._check_data):
            self._try(check.__name__.removeprefix("_check_"), check)
        if job is not None:
            self._check_job(job)

    def _try(self, what: str, check: Callable[[], None]) -> None:
        """Make one check; what it did not foresee is a finding, and no end of the others."""
        try:
            check()
        except (FedchorusError, OSError, ValueError, RuntimeError) as error:
            found = str(error) if isinstance(error, FedchorusError) else type(error).__name__
            if isinstance(error, OSError):
                found = f"{error.filename}: {error.strerror}"
            self.fail(what, found, "mend this, and run the doctor again: the check could not be finished")

    def ok(self, what: str, found: str) -> None:
        self.findings.append(Finding("ok", what, found))

    def warn(self, what: str, found: str, fix: str) -> None:
        self.findings.append(Finding("warning", what, found, fix))

    def fail(self, what: str, found: str, fix: str) -> None:
        self.findings.append(Finding("error", what, found, fix))

    # -- the site's own files ------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        try:
            self.settings = Settings.load(self.files.path)
        except FedchorusError as error:
            self.fail("site.toml", str(error), "mend it, and run the doctor again: what it names was not looked at")
        else:
            self.ok("site.toml", f"site {self.settings.name} of federation {self.settings.federation}")

    def _check_policy(self) -> None:
        try:
            policy = self.policy = Policy.load(self.files.policy)
        except FedchorusError as error:
            self.fail("policy.toml", str(error), "mend it: the client does not start without (docs/policy.md)")
            return
        absent = [name for name, given in (("purposes", policy.purposes), ("data sets", policy.data)) if not given]
        if absent:
            self.warn("policy.toml", f"it allows no {' and no '.join(absent)}, so no job", "fill it in: docs/policy.md")
        else:
            self.ok("policy.toml", f"allows the purposes {', '.join(policy.purposes)}")

    def _check_invitation(self) -> None:
        try:
            invitation = self.invitation = read_invitation(self.files.invitation)
        except FedchorusError as error:
            fix = f"ask the coordinator for it again, and put it at {self.files.invitation}"
            self.fail("invitation", str(error), fix)
            return
        for key in ("federation", "coordinator") if self.settings is not None else ():
            if (here := getattr(self.settings, key)) != (there := getattr(invitation, key)):
                fix = f'write {key} = "{there}" in site.toml, or put this federation\'s invitation.json back'
                self.fail("invitation", f"its {key} is {there}, that of site.toml {here}", fix)
                return
        self.ok("invitation", f"from {invitation.federation}, whose server is {invitation.address}")

    def _check_keys(self) -> None:
        self.identity = self._key("identity key", self.files.identity, IdentityKey.load)
        self.tls = self._key("TLS key", self.files.tls_key, TlsKey.load)

    def _key(self, what: str, path: Path, load: Callable[[Path, bytes | None], _Key]) -> _Key | None:
        try:
            key = load(path, self.passphrase)
        except LedgerError as error:
            self.fail(what, str(error), "the coordinator cannot help: the key is in this folder and its backups alone")
            return None
        found = path.stat()
        if (mode := stat.S_IMODE(found.st_mode)) & 0o077:
            fix = f"chmod 600 {path}; if others could log in to this machine, enrol anew with new keys"
            self.fail(what, f"{path}: its mode is {mode:04o}, so other users can open it", fix)
        elif found.st_uid != os.geteuid():
            fix = f"run the doctor as the user of the client: sudo -u '#{found.st_uid}' fedchorus doctor ..."
            self.warn(what, "there, and it opens, but it is another user's: what is said here holds for you", fix)
        else:
            self.ok(what, "there, its owner's alone, and it opens")
        return key

    def _check_roster(self) -> None:
        again = f"`fedchorus accept {self.files.path} KIT` with the coordinator's newest kit"
        pinned = self.settings.roster if self.settings is not None else None
        if not self.files.roster.exists():
            if pinned or self.files.certificate.exists():
                self.fail("roster", f"{self.files.roster}: missing, though a kit was accepted", again)
            else:
                fix = f"send {self.files.request} to the coordinator; when its kit is here, {again}"
                self.fail("roster", "no kit was accepted yet", fix)
            return
        try:
            roster = self.roster = Roster.load(self.files.roster)
            with_signatures(roster, dict(roster.signatures))
            own = roster.member(self.settings.name) if self.settings is not None else None
        except FedchorusError as error:
            self.fail("roster", str(error), again)
            return
        if pinned is not None and pinned != roster.hash:
            self.fail("roster", "roster.json is not the one that site.toml pins", again)
        elif own is not None and self.identity is not None and own.key != self.identity.public_hex:
            self.fail("roster", f"it has another identity key for {own.name} than the one here", again)
        elif own is not None and own.name not in roster.signatures:
            self.fail("roster", "this site has not signed it", again)
        elif missing := sorted({member.name for member in roster.members} - set(roster.signatures)):
            fix = "they run `fedchorus accept`, then `fedchorus client`; this client collects the signatures meanwhile"
            self.warn("roster", f"version {roster.version}: not signed yet by {', '.join(missing)}, as known here", fix)
        else:
            self.ok("roster", f"version {roster.version}, signed by all of its {len(roster.members)} members")

    def _check_certificate(self) -> None:
        if not self.files.certificate.exists() and self.roster is None:
            return  # It comes with the kit, of which the roster's finding tells.
        again = f"`fedchorus accept {self.files.path} KIT` again; if that does not help, ask for a new kit"
        try:
            authority, pem = self.files.authority.read_bytes(), self.files.certificate.read_bytes()
            peer = peer_of_pem(pem, authority=authority_of(authority))
        except OSError as error:
            self.fail("certificate", f"{error.filename}: {error.strerror}", again)
            return
        except FedchorusError as error:
            self.fail("certificate", f"{self.files.certificate}: {error}", again)
            return
        if self.invitation is not None and authority != self.invitation.authority.encode():
            self.fail("certificate", f"{self.files.authority}: not the authority that the invitation names", again)
            return
        days = (peer.not_after - self.now).total_seconds() / 86_400
        if self.settings is not None and peer.site != self.settings.name:
            self.fail("certificate", f"it is {peer.site}'s, not {self.settings.name}'s", again)
        elif self.tls is not None and peer.public_bytes != self.tls.public_bytes:
            self.fail("certificate", f"it is for another key than {self.files.tls_key}", again)
        elif self.now < peer.not_before:
            fix = "set this machine's clock (NTP): it is behind, or the coordinator's was ahead"
            self.fail("certificate", f"it begins only at {peer.not_before:%Y-%m-%d %H:%M} UTC", fix)
        elif days < 0:
            fix = f"send {self.files.request} to the coordinator again and accept the kit; check this machine's clock"
            self.fail("certificate", f"it ended on {peer.not_after:%Y-%m-%d}", fix)
        elif 3 * (peer.not_after - self.now) < peer.not_after - peer.not_before:
            fix = "let `fedchorus client` run, with the server within reach: it renews the certificate by itself"
            self.warn("certificate", f"{days:.1f} days left, less than a third of its life", fix)
        else:
            self.ok("certificate", f"goes with the key and the authority; {days:.0f} days left")

    # -- the server ----------------------------------------------------------------------------------------------------

    def _check_server(self) -> None:
        address = self.settings.server if self.settings is not None else None
        address = address or (self.invitation.address if self.invitation is not None else None)
        authority = self.invitation.authority if self.invitation is not None else None
        if authority is None and self.files.authority.exists():
            authority = self.files.authority.read_text(encoding="ascii", errors="ignore")
        if address is None or authority is None:
            fix = "mend site.toml and invitation.json first: they say where it is, and whom to believe"
            self.fail("server", "not tried", fix)
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_verify_locations(cadata=authority)
        except (ssl.SSLError, ValueError):
            self.fail("server", f"not tried: {self.files.authority} is damaged", "accept the coordinator's kit again")
            return
        try:
            context.load_cert_chain(self.files.certificate, self.files.tls_key, password=self.passphrase or b"")
            known = True
        except OSError:  # What is wrong with them has its own finding: here it is the way that counts.
            known = False
        try:
            answer = ask_server(address, context, clock=self._clock, timeout_s=self.timeout_s)
        except NotReached as error:
            if known or error.status is None:
                self.fail("server", error.found, error.fix)
            else:
                self.ok("server", f"{address} answers over TLS; it lets this site in with a certificate alone")
            return
        self.ok("server", f"{address} answers, and lets this site in")
        if self.settings is not None:
            self._compare("federation", answer.federation, self.settings.federation, "check `server` in site.toml")
        fix = "install the same version as the server's, or ask the coordinator to: another one's jobs are refused"
        self._compare("version", answer.version, version("fedchorus"), fix)
        self._compare_clocks(answer.ahead_s)

    def _compare(self, what: str, there: str, here: str, fix: str) -> None:
        if there == here:
            self.ok(what, f"{here}, here and at the server")
        else:
            self.fail(what, f"the server's is {there}, this site's {here}", fix)

    def _compare_clocks(self, ahead_s: float) -> None:
        most = self.settings.max_clock_skew_s if self.settings is not None else 300.0
        found = f"the server's is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's"
        fix = "switch NTP on (`timedatectl set-ntp true`), and ask the coordinator to do so"
        if abs(ahead_s) > most:
            self.fail("clock", f"{found}, {most:g} s are allowed: every message would be refused", fix)
        elif abs(ahead_s) > most / 3:
            self.warn("clock", f"{found}, {most:g} s are allowed", fix)
        else:
            self.ok("clock", found)

    def _clock(self) -> float:
        return self.now.timestamp() + time.monotonic() - self.began

    # -- the machine ---------------------------------------------------------------------------------------------------

    def _check_machine(self) -> None:
        needed = (self.files.path, self.files.state, self.files.path / "ledgers")
        closed = [str(path) for path in needed if not self.machine.is_writable(path)]
        if closed:
            fix = "give them to the client's user (chown -R), on a disk that is not read-only; run doctor as that user"
            self.fail("disk", f"not writable for this user, or missing: {', '.join(closed)}", fix)
        else:
            free = self.machine.free_bytes(self.files.path)
            fix = "free some space: models, the ledger and the log are written there"
            self._enough("disk", f"{free / 1e9:.1f} GB free", free, WARN_DISK, LEAST_DISK, fix)
        memory = self.machine.memory_bytes()
        limit = (self.settings.trainer.memory_gb if self.settings is not None else None) or 0.0
        fix = "end other programs, or raise the limit of the service or container; trainer.memory_gb must fit in"
        self._enough(
            "memory", f"{memory / 1e9:.1f} GB can be had", memory, max(WARN_MEMORY, limit * 2**30), LEAST_MEMORY, fix
        )
        files = self.machine.open_files()
        fix = "raise it: LimitNOFILE=65536 in the service, or `ulimit -n 65536`"
        self._enough("open files", f"{files} at a time", files, WARN_FILES, LEAST_FILES, fix)
        nodes = self.machine.nodes_of(self.files.path)
        if len(nodes) > 1:
            numbers = ", ".join(map(str, nodes))
            self.fail("client", f"{len(nodes)} run on this folder (processes {numbers})", "stop all but one of them")
        else:
            self.ok("client", f"runs on this folder as process {nodes[0]}" if nodes else "none runs on this folder now")

    def _enough(self, what: str, found: str, value: float, wanted: float, least: float, fix: str) -> None:
        if value < least:
            self.fail(what, f"{found}, too little to work", fix)
        elif value < wanted:
            self.warn(what, f"{found}, which may become too little", fix)
        else:
            self.ok(what, found)

    def _check_trainer(self) -> None:
        try:
            gpus, nodes = self.machine.gpus(), self.machine.gpu_nodes()
        except FedchorusError as error:
            self.fail("GPU", str(error), "install fedchorus with its extra `train`: pip install 'fedchorus[train]'")
        else:
            if nodes and not gpus:
                fix = "check the driver (`nvidia-smi`), the user's right to open it, and that torch is its CUDA build"
                self.warn("GPU", f"{', '.join(nodes)} is there, but torch uses none: trains on the CPU", fix)
            else:
                self.ok("GPU", ", ".join(gpus) or "none: trains on the CPU")
        asked = self.settings.trainer.isolation if self.settings is not None else "auto"
        wrapper = self.machine.wrapper()
        fix = "install bubblewrap (apt install bubblewrap), or allow user namespaces"
        if asked == "none":
            fix = 'write isolation = "auto" under [trainer] in site.toml'
            self.warn("isolation", "switched off: the process with model and data code can use the network", fix)
        elif wrapper != "limits":
            self.ok("isolation", f"{wrapper}: the trainer has no network and does not see the keys")
        elif asked == "required":
            self.fail("isolation", "site.toml requires it, and this machine can give none: every job is refused", fix)
        else:
            self.warn("isolation", "none can be had: the process with model and data code can use the network", fix)

    # -- data and budget -----------------------------------------------------------------------------------------------

    def _check_history(self) -> None:
        History(self.files.state / "history.jsonl")  # Raises for a damaged one, and says what to do.
        self.ok("history", "what the policy's rates are counted from is whole")

    def _check_data(self) -> None:
        if self.settings is None:
            return
        if not self.settings.data:
            self.warn("data", "site.toml names no data set", "write a table [data.NAME] with its path there")
        for name, known in self.settings.data.items():
            self._try(f"data set {name}", partial(self._check_table, name, self.files.path / known.path))
            self._try(f"ledger of {name}", partial(self._check_ledger, name, self.settings.name))

    def _check_table(self, name: str, path: Path) -> None:
        what, path = f"data set {name}", path.resolve()
        if path.is_dir():
            self.ok(what, f"{path}: a folder, for jobs that read images")
        elif not path.is_file():
            self.fail(what, f"{path}: no such file", f"correct the path under [data.{name}] in site.toml")
        elif not self.machine.is_readable(path):
            self.fail(what, f"{path}: this user may not read it", f"chown or `setfacl -m u:USER:r {path}`")
        else:
            try:
                rows, columns = self.machine.table_shape(path)
            except FedchorusError as error:
                self.fail(what, str(error), "write it anew as CSV in UTF-8, with a header, or as Parquet")
                return
            if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o022:
                found = f"{path}: other users can change it (mode {mode:04o}), and so what is trained"
                self.warn(what, found, f"chmod go-w {path}")
            elif rows == 0:
                self.fail(what, f"{path}: no rows below the header", "write the records into it")
            else:
                self.ok(what, f"{path}: {rows} rows, {columns} columns")

    def _check_ledger(self, name: str, site: str) -> None:
        path, what = self.files.ledger(name), f"ledger of {name}"
        key = self.identity.public_hex if self.identity is not None else None
        if key is None and self.roster is not None:
            key = self.roster.member(site).key
        if key is None:
            self.fail(what, "not verified: neither the identity key nor a roster is there", "mend that first")
            return
        content = path.read_bytes() if path.exists() else b""
        end = content.rfind(b"\n") + 1  # Behind it a crash, or a client that is writing: it does not count yet.
        try:
            entries = self.ledgers[name] = parse(content[:end], site, key)
            accounts = Accounts.of("this site", entries)
        except FedchorusError as error:
            fix = "leave the file as it is and call the privacy officer; a backup counts only if nothing came after it"
            self.fail(what, f"{path}: {error}", fix)
            return
        if accounts.dataset not in (None, name):
            fix = f"give the data set its old name in site.toml, {accounts.dataset}: a budget belongs to the records"
            self.fail(what, f"{path}: it is that of data set {accounts.dataset}", fix)
            return
        self.ok(what, f"{len(entries)} entries, all as signed" if entries else "none yet: nothing was charged")
        self._check_budget(name, accounts)

    def _check_budget(self, name: str, accounts: Accounts) -> None:
        what = f"budget of {name}"
        if self.policy is not None and name not in self.policy.data:
            self.warn(what, "policy.toml does not list this data set, so no job may use it", f"add [data.{name}] there")
        limits: list[tuple[str | None, Limit]] = []
        if self.policy is not None:
            limits = [(None, limit) for limit in self.policy.budgets(name)]
        limits += [
            (purpose, limit) for (purpose, _), limit in accounts.budgets.items() if (purpose, limit) not in limits
        ]
        for purpose, limit in limits:
            self._check_limit(what, accounts, purpose, limit)
        if not limits and self.policy is not None and name in self.policy.data:
            self.ok(what, "policy.toml sets none for all jobs together: each job's own limits hold")

    def _check_limit(self, what: str, accounts: Accounts, purpose: str | None, limit: Limit) -> None:
        if limit.epsilon is None:
            return
        spent = accounts.epsilon(limit.unit, limit.delta, purpose=purpose)
        for_what = f" for {purpose}" if purpose is not None else ""
        found = f"{limit.unit} level{for_what}: epsilon {spent:.4g} of {limit.epsilon:g} is spent or set aside"
        fix = "more is for the privacy officer to allow: in policy.toml, and with `fedchorus budget --set`"
        if spent >= limit.epsilon:
            self.fail(what, f"{found} (delta {limit.delta:g})", fix)
        elif spent > NEARLY_SPENT * limit.epsilon:
            self.warn(what, f"{found} (delta {limit.delta:g})", fix)
        else:
            self.ok(what, f"{found}, {limit.epsilon - spent:.4g} is left (delta {limit.delta:g})")

    # -- a job ---------------------------------------------------------------------------------------------------------

    def _check_schema(self, tried: Rehearsal) -> None:
        """Name all differences at once: opening the data stops at the first that nothing can be trained with."""
        fix = "mend the table, or ask whoever wrote the job to describe it as it is"
        for difference in tried.schema():
            self.warn("job's schema", difference, fix)

    def _check_job(self, path: Path) -> None:
        from client.rehearsal import Rehearsal
        from strategies.job import load_job

        try:
            job = load_job(path).portable
        except FedchorusError as error:
            self.fail("job", str(error), "ask whoever wrote the job")
            return
        settings, policy, invitation = self.settings, self.policy, self.invitation
        if settings is None or policy is None or invitation is None or self.roster is None:
            self.fail("job", "not tried: the site's own files are not in order", "mend what is said above first")
            return
        entries = self.ledgers.get(job.data.dataset, [])
        sites = len(self.roster.members)
        tried = Rehearsal(job, self.files, settings, policy, invitation, sites, entries, self.now)
        for what, step, fix in (
            ("terms", tried.terms, f"change policy.toml if you want this job (`fedchorus content {path}` helps)"),
            ("data", tried.data, "mend the data, or ask whoever wrote the job to describe them as they are"),
            ("cost", tried.cost, "change policy.toml if you want this job, or ask for one that costs less"),
        ):
            try:
                if what == "data":
                    self._check_schema(tried)
                self.ok(f"job's {what}", step())
            except (FedchorusError, OSError) as error:
                self.fail(f"job's {what}", str(error), fix)
                return
