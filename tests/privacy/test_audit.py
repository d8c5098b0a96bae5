"""The audit believes no number that a run wrote down, names the site and the entry, and survives whatever it reads.

What is checked of a site's ledger is checked of the server's: most tables run over both.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import privacy.audit
from privacy.accountant import bounds, epsilon, epsilon_pld, rdp_at
from privacy.audit import Audit, audit_run
from privacy.budget import Accounts, Filter, Limit, SiteBudget
from privacy.distributed_sum import DistributedSum
from privacy.errors import RunError
from privacy.events import CorrelatedEvent, DistributedEvent, Event, GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import SERVER, Entry, Ledger, digest_of, read_ledger
from privacy.prv import Bounds
from privacy.secagg.roster import Member, Roster
from privacy.secure_claims import SecurePromise
from simulations.scenarios import scenario_path
from strategies.job import load_job
from strategies.secure import SecureSum
from strategies.total import Layout

SITES = ("bank-a", "bank-b", "bank-c")
DELTA, LIMIT, ROUNDS = 1e-5, 8.0, 3
EVENT = GaussianEvent(
    noise_multiplier=20.0, clip_norm=1.0, sampling_rate=1.0, count=4, rng="os", discretisation_tv=1e-30
)
WHOLE = dataclasses.replace(EVENT, unit="client", count=1, noise_multiplier=5.0)
CORRELATED = CorrelatedEvent(
    noise_multiplier=5.0,
    clip_norm=1.0,
    coefficients=(1.0, 0.5),
    rounds=3,
    participations=2,
    separation=2,
    dimension=10,
    rng="os",
)
SHARES = DistributedSum.plan(
    mechanism="discrete_gaussian", parameters=10, clients=3, cohort=3, clip_norm=1.0, noise_multiplier=5.0, bits=20
).event(count=1, rng="os")
OPENING = 'name = "small"\n\n[training]\nrounds = 3\nlocal_steps = 4\nsampling_rate = 1.0\n'
OF_RECORDS = "\n[privacy.record]\nepsilon = 8.0\ndelta = 1e-05\nclip_norm = 1.0\n"
OF_CLIENTS = "\n[privacy.client]\nepsilon = 8.0\ndelta = 1e-05\nclip_norm = 1.0\nplacement = "
OF_SHARES = f'{OF_CLIENTS}"distributed"\nshares = "discrete-gaussian"\n'
SECURELY = """
[secure_aggregation]
colluders = 0
graph = "complete"
bits = 20
groups = 1
reduce = "sum"
"""


@dataclass(frozen=True)
class Kind:
    """A kind of job, and what one round of it releases at a site and at the server."""

    toml: str
    at_sites: tuple[Event, ...] = ()
    at_server: tuple[Event, ...] = ()

    @property
    def securely(self) -> bool:
        return "[secure_aggregation]" in self.toml

    @property
    def shared(self) -> bool:
        """Whether noise comes in shares."""
        return any(isinstance(event, DistributedEvent) for event in self.at_sites)

    @property
    def units(self) -> set[str]:
        return {event.unit for event in (*self.at_sites, *self.at_server)}


RECORD = Kind(OPENING + OF_RECORDS, (EVENT,))
CENTRAL = Kind(
    f'{OPENING}\n[cohort]\nrate = 0.5\n{OF_CLIENTS}"central"\n', (), (dataclasses.replace(WHOLE, sampling_rate=0.5),)
)
ADAPTIVE = Kind(
    f'{OPENING}{OF_CLIENTS}"central"\n\n[privacy.client.adaptive_clip]\nbit_noise = 4.0\n',
    (),
    (dataclasses.replace(WHOLE, quantile_noise=4.0),),
)
BANDED = Kind(f'{OPENING}\n[cohort]\nseparation = 2\n{OF_CLIENTS}"central"\nnoise = "banded"\n', (), (CORRELATED,))
BOTH = Kind(f'{OPENING}{OF_RECORDS}{OF_CLIENTS}"central"\n', (EVENT,), (WHOLE,))
LOCAL = Kind(f'{OPENING}{OF_CLIENTS}"local"\n', (WHOLE,))
BOTH_LOCAL = Kind(f'{OPENING}{OF_RECORDS}{OF_CLIENTS}"local"\n', (EVENT, WHOLE))
SECURE = Kind(RECORD.toml + SECURELY, (EVENT,))
SHARED = Kind(OPENING + OF_SHARES + SECURELY, (SHARES,))
BOTH_SHARED = Kind(OPENING + OF_RECORDS + OF_SHARES + SECURELY, (EVENT, SHARES))
KINDS = {
    "record": RECORD,
    "central": CENTRAL,
    "adaptive": ADAPTIVE,
    "banded": BANDED,
    "both": BOTH,
    "local": LOCAL,
    "both, local": BOTH_LOCAL,
    "record, securely": SECURE,
    "shares": SHARED,
    "both, shares": BOTH_SHARED,
}
TOML = RECORD.toml.encode()
JOB = hashlib.sha256(TOML).hexdigest()
# What `simulate` says of the secure sums of three sites of which none colludes: two others hold each one's shares.
SUMS = {"groups": 1, "reduce": "sum", "sites_in_a_sum": 3, "fewest_in_a_sum": 3, "colluders": 0, "hidden_among": 3,
        "threshold": 2, "neighbours": 2, "dropouts": 0, "bits": 20}  # fmt: skip
# Entries of each ledger: 0 open, 1 plan, then reserve and commit of each round: 2 and 3, 4 and 5, 6 and 7.


@dataclass(frozen=True)
class Run:
    """A run folder as a simulation leaves it, and the hands to tamper with it, by default at the `victim`."""

    path: Path
    kind: Kind = RECORD
    victim: str = "bank-b"

    @property
    def job(self) -> str:
        return hashlib.sha256((self.path / "job.toml").read_bytes()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Whose ledgers there are."""
        return (*(SITES if self.kind.at_sites else ()), *([SERVER] if self.kind.at_server else []))

    def events(self, name: str) -> tuple[Event, ...]:
        return self.kind.at_server if name == SERVER else self.kind.at_sites

    def ledger(self, site: str | None = None) -> Path:
        site = site or self.victim
        return self.path / ("server.jsonl" if site == SERVER else f"ledgers/{site}.jsonl")

    def key(self, site: str | None = None) -> IdentityKey:
        return IdentityKey.load(self.path / "private" / (site or self.victim) / "identity.pem")

    def budget(self, site: str | None = None) -> SiteBudget:
        return SiteBudget(Ledger(self.ledger(site), site or self.victim, self.key(site)))

    def sign(self, kind: str, body: Mapping[str, Any], site: str | None = None) -> Entry:
        """What a site that does not keep to its budget's rules can sign itself."""
        return Ledger(self.ledger(site), site or self.victim, self.key(site)).append(kind, body)

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_bytes())

    def write(self, name: str, record: object) -> None:
        (self.path / name).write_text(json.dumps(record))

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / name).read_bytes().splitlines()]

    def write_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        (self.path / name).write_text("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records))

    def convene(self, keys: Mapping[str, str]) -> None:
        """Let everybody sign who takes part."""
        roster = Roster("small", 1, tuple(Member(slot, name, keys[name]) for slot, name in enumerate(keys, start=1)))
        for name in keys:
            roster = roster.signed_by(self.key(name), name)
        roster.save(self.path / "participants.json")

    def pinned(self, site: str) -> str:
        roster = self.read("roster.json")
        return str(roster["server"] if site == SERVER else roster["sites"][site])

    def entries(self, site: str) -> list[Entry]:
        return read_ledger(self.ledger(site), site, self.pinned(site)) if self.ledger(site).exists() else []

    def open(self, site: str | None = None, *, simulation: bool = False) -> SiteBudget:
        budget, at_server = self.budget(site), (site or self.victim) == SERVER
        budget.open(rows=3 if at_server else 100, simulation=simulation, dataset="clients" if at_server else "records")
        return budget

    def plan(self, site: str | None = None, *, limit: float | None = LIMIT, simulation: bool = False) -> None:
        events = self.events(site or self.victim)
        whole = any(isinstance(event, CorrelatedEvent) for event in events)
        self.open(site, simulation=simulation).plan(
            job=self.job,
            events=events,
            rounds=1 if whole else ROUNDS,
            limits=[Limit(unit=event.unit, epsilon=limit, delta=DELTA) for event in events],
        )

    def release(self, site: str, round_number: int, witness: str | None) -> list[Any]:
        """Reserve and commit a round; return the head. Correlated noise has one reservation for all rounds."""
        budget, events = self.budget(site), self.events(site)
        mine = [e for e in budget.ledger.entries if e.kind == "reserve" and isinstance(events[0], CorrelatedEvent)]
        moves = any(isinstance(event, GaussianEvent) and event.quantile_noise for event in events)
        reservation = (
            mine[0]
            if mine
            else budget.reserve(
                job=self.job,
                round_number=round_number,
                model="1" * 64,
                witness=None if site == SERVER else witness,
                clip_norm=1.1**round_number if moves else None,
            )
        )
        return list(budget.commit(reservation, output="2" * 64, round_number=round_number))

    def play(self, round_number: int, sites: tuple[str, ...] = SITES) -> None:
        """One round with everything that the server keeps of it."""
        before = self.lines("heads.jsonl")
        line: dict[str, Any] = {"round": round_number, "heads": {**before[-1]["heads"]} if before else {}}
        witness = digest_of(before[-1]) if before else None
        if self.kind.at_sites:
            line["heads"] |= {site: self.release(site, round_number, witness) for site in sites}
            line["heads"] = {site: line["heads"][site] for site in sorted(line["heads"])}
        if self.kind.at_server:
            line["server"] = self.release(SERVER, round_number, None)
        self.write_lines("heads.jsonl", [*before, line])
        records = {site: self.cost(site, "record") for site in SITES} if "record" in self.kind.units else {}
        metrics = {
            "round": round_number,
            "loss": 0.25,
            "epsilon": records,
            "epsilon_client": max((self.cost(n, "client") for n in self.whole()), default=None),
            "contributors": list(sites),
            "failures": {},
        }
        self.write_lines("metrics.jsonl", [*self.lines("metrics.jsonl"), metrics])

    def play_all(self, sites: tuple[str, ...] = SITES) -> None:
        for round_number in range(1, ROUNDS + 1):
            # With correlated noise each client returns every second round.
            alternate = sites[:1] if round_number % 2 else sites[1:]
            self.play(round_number, alternate if self.kind == BANDED else sites)

    def whole(self) -> tuple[str, ...]:
        """Whose ledgers protect whole clients."""
        return tuple(name for name in self.names if any(event.unit == "client" for event in self.events(name)))

    def cost(self, site: str, unit: str = "record") -> float:
        return Accounts.of(site, self.entries(site)).epsilon(unit, DELTA, spent_only=True)

    def conclude(self) -> None:
        """Write down what the ledgers say."""
        units = self.kind.units
        costs = {
            unit: {name: self.cost(name, unit) for name in self.names if unit in self.units(name)} for unit in units
        }
        records, wholes = costs.get("record", {}), costs.get("client", {})
        sites = {
            site: {
                "rows": 100,
                "train_rows": 100,
                "epsilon": records.get(site),
                "delta": DELTA if records else None,
                "client": {"epsilon": wholes[site], "delta": DELTA} if site in wholes else None,
            }
            for site in SITES
        }
        claim = None
        if self.kind.at_server:
            event = self.kind.at_server[0]
            rate = event.sampling_rate if isinstance(event, GaussianEvent) else 1.0
            claim = {"epsilon": wholes[SERVER], "epsilon_rdp": self.by_rdp(SERVER), "delta": DELTA}
            claim |= {"clients": 3, "clip_norm": 1.0, "noise_multiplier": event.noise_multiplier, "sampling_rate": rate}
        self.write(
            "summary.json",
            {
                "rounds": len(self.lines("metrics.jsonl")),
                "job_hash": self.job,
                "sites": sites,
                "epsilon": {
                    "record": max(records.values(), default=None),
                    "client": max(wholes.values(), default=None),
                },
                "client": claim,
                **({"secure_aggregation": SUMS} if self.kind.securely else {}),
                **({"adjacency": "zero_out"} if self.kind == SHARED else {}),
            },
        )

    def units(self, name: str) -> set[str]:
        return {event.unit for event in self.events(name)}

    def by_rdp(self, name: str) -> float:
        return epsilon(Accounts.of(name, self.entries(name)).spent("client"), DELTA).rdp


def begin(
    path: Path,
    kind: Kind = RECORD,
    *,
    simulation: bool = False,
    event: GaussianEvent | None = None,
    limit: float | None = LIMIT,
) -> Run:
    if event is not None:
        kind = dataclasses.replace(kind, at_sites=(event,))
        if event.rng != "os":
            kind = dataclasses.replace(kind, toml=kind.toml + '\n[simulation]\nnoise = "seeded"\n')
    run = Run(path, kind, "bank-b" if kind.at_sites else SERVER)
    path.mkdir(parents=True)
    (path / "job.toml").write_text(kind.toml)
    (path / "heads.jsonl").touch()
    (path / "metrics.jsonl").touch()
    keys = {name: IdentityKey.create(path / "private" / name / "identity.pem").public_hex for name in run.names}
    server = {"server": keys.pop(SERVER)} if kind.at_server else {}
    run.write("roster.json", {"v": 1, "sites": keys, **server})
    if kind.securely:
        run.convene(keys)
    for name in run.names:
        run.plan(name, limit=limit, simulation=simulation)
    return run


Copies = Callable[..., Run]


@pytest.fixture(scope="module")
def pristine_of(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """Honest runs of each kind, made once. Never changed: tests take a copy."""
    made: dict[str, Run] = {}

    def of(name: str) -> Run:
        if name not in made:
            made[name] = begin(tmp_path_factory.mktemp("audit") / "pristine", KINDS[name])
            made[name].play_all()
            made[name].conclude()
        return made[name]

    return of


@pytest.fixture
def copy(pristine_of: Copies, tmp_path: Path) -> Copies:
    """A copy of an honest run of some kind, with somebody to tamper with."""

    def of(name: str, victim: str | None = None) -> Run:
        original = pristine_of(name)
        shutil.copytree(original.path, tmp_path / "run")
        return Run(tmp_path / "run", original.kind, victim or original.victim)

    return of


@pytest.fixture
def run(copy: Copies) -> Run:
    return copy("record")


@pytest.fixture(scope="module")
def pristine(pristine_of: Copies) -> Run:
    """With every file that a run can have."""
    return pristine_of("both")


def found(audit: Audit, site: str | None, entry: int | None, why: str) -> bool:
    return any(f.site == site and f.entry == entry and why in f.why for f in audit.findings)


class TestAnHonestRun:
    def test_is_ok_and_its_figures_are_recomputed(self, run: Run) -> None:
        audit = audit_run(run.path)
        assert audit.findings == []
        assert audit.notices == []
        assert audit.ok
        spent, within = epsilon([EVENT] * ROUNDS, DELTA), bounds([EVENT] * ROUNDS, DELTA)
        assert within is not None
        assert audit.as_dict() == {
            "ok": True,
            "findings": [],
            "notices": [],
            "epsilon": {
                "record": spent.pld,
                "client": None,
                "sites": {
                    site: {
                        "ok": True,
                        "entries": 8,
                        "releases": 12,
                        "delta": DELTA,
                        "pld": spent.pld,
                        "rdp": spent.rdp,
                        "exact": spent.exact,
                        "lower": within.lower,
                        "estimate": within.estimate,
                        "upper": within.upper,
                        "claimed": spent.pld,
                        "client": None,
                    }
                    for site in SITES
                },
                "server": None,
            },
        }

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_of_any_kind_is_ok_and_states_each_unit_where_it_was_spent(self, kind: str, copy: Copies) -> None:
        run = copy(kind)
        audit = audit_run(run.path)
        assert [str(finding) for finding in audit.findings] == []
        assert bool(audit.notices) == (kind == "central" or run.kind.shared)
        report = audit.as_dict()["epsilon"]
        for unit in ("record", "client"):
            spent = [run.cost(name, unit) for name in run.names if unit in run.units(name)]
            assert report[unit] == (max(spent) if spent else None)
        assert (report["server"] is not None) == bool(run.kind.at_server)
        assert sorted(report["sites"]) == (sorted(SITES) if run.kind.at_sites else [])
        for ledger in audit.ledgers:
            assert {spending.unit for spending in ledger.spent} == run.units(ledger.site)
            for spending in ledger.spent:
                assert spending.epsilon is not None
                assert (spending.within is None) == (run.kind.shared and spending.unit == "client")
                if spending.within is not None:
                    assert spending.within.lower - 1e-3 <= spending.epsilon.pld <= spending.within.upper + 1e-3
                assert spending.claimed == spending.epsilon.pld

    def test_with_central_noise_a_round_in_which_nobody_took_part_is_in_order(self, tmp_path: Path) -> None:
        run = begin(tmp_path / "run", CENTRAL)
        run.play(1, ())
        run.play(2)
        run.play(3, ("bank-a",))
        run.conclude()
        assert [str(finding) for finding in audit_run(run.path).findings] == []

    def test_what_the_job_leaves_to_be_derived_is_derived_as_the_run_does(self, tmp_path: Path) -> None:
        # A public cohort of 2 of 3: nothing is sampled, and the noise on the count is a twentieth of it. One round more
        # is planned than run; half an epoch of batches of 30 in 100 rows is two steps.
        toml = ADAPTIVE.toml.replace("bit_noise = 4.0\n", "").replace(
            "clip_norm = 1.0", "clip_norm = 1.0\nspare_rounds = 1"
        )
        toml = toml.replace("local_steps = 4\nsampling_rate = 1.0", "local_epochs = 0.5\nbatch_size = 30")
        site = dataclasses.replace(EVENT, count=2, sampling_rate=0.3)
        server = dataclasses.replace(WHOLE, noise_multiplier=0.15, quantile_noise=2 / 20, discretisation_tv=0.0)
        run = begin(tmp_path / "run", Kind(f"{toml}\n[cohort]\nsize = 2\n{OF_RECORDS}", (site,), (server,)), limit=None)
        whys = [str(finding) for finding in audit_run(run.path).findings]
        assert sum("plans rounds 3, job.toml says 4" in why for why in whys) == 1
        assert not any("plans" in why and "plans rounds" not in why and "plans epsilon" not in why for why in whys), (
            whys
        )

    def test_a_secret_sample_whose_members_the_folder_names_is_noticed(self, copy: Copies) -> None:
        (notice,) = audit_run(copy("central").path).notices
        assert "the cohorts were a secret sample, and metrics.jsonl names them" in notice

    def test_needs_nothing_but_the_public_part_of_the_folder(self, run: Run) -> None:
        shutil.rmtree(run.path / "private")
        assert audit_run(run.path).ok

    def test_the_audit_writes_nothing(self, run: Run) -> None:
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        audit_run(run.path)
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before

    def test_a_round_that_some_sites_sat_out_is_in_order(self, tmp_path: Path) -> None:
        run = begin(tmp_path / "run")
        run.play(1, ("bank-a", "bank-b"))
        run.play(2, ("bank-c",))
        run.play(3)
        run.conclude()
        assert audit_run(run.path).findings == []

    def test_a_crash_that_spent_a_round_twice_is_in_order_when_it_is_charged_twice(self, tmp_path: Path) -> None:
        run = begin(tmp_path / "run")
        run.budget().reserve(job=JOB, round_number=1, model="1" * 64, witness=None)
        run.play(1)
        run.play(2)
        run.play(3, ("bank-a", "bank-c"))
        run.conclude()
        audit = audit_run(run.path)
        assert audit.findings == []
        spent = {site: round(audit.sites[site].releases / EVENT.count) for site in SITES}
        assert spent == {"bank-a": 3, "bank-b": 3, "bank-c": 3}

    def test_a_site_that_was_never_asked_has_no_ledger_and_owes_none(self, tmp_path: Path) -> None:
        run = begin(tmp_path / "run")
        run.play_all(("bank-a", "bank-b"))
        run.conclude()
        run.ledger("bank-c").unlink()
        audit = audit_run(run.path)
        assert audit.findings == []
        assert audit.notices == ["bank-c was never asked: it wrote no ledger"]
        assert audit.as_dict()["epsilon"]["sites"]["bank-c"]["pld"] == 0.0
        assert audit.as_dict()["epsilon"]["record"] == run.cost("bank-a")

    def test_a_round_s_claim_is_held_against_what_was_spent_by_that_round(self, tmp_path: Path) -> None:
        # With many kinds of plan, a line states the costliest sites alone: the last claim for a site may be old.
        run = begin(tmp_path / "run")
        for round_number in (1, 2, 3):
            run.play(round_number)
        rounds = run.lines("metrics.jsonl")
        for line in rounds[1:]:
            del line["epsilon"]["bank-b"]
        run.write_lines("metrics.jsonl", rounds)
        run.conclude()
        assert audit_run(run.path).findings == []
        rounds[0]["epsilon"]["bank-b"] = run.cost("bank-b")
        run.write_lines("metrics.jsonl", rounds)
        assert found(audit_run(run.path), "bank-b", None, "metrics.jsonl claims epsilon")

    def test_an_earlier_job_s_smaller_budget_does_not_bind_a_later_job(self, tmp_path: Path) -> None:
        run = begin(tmp_path / "run")
        run.ledger().unlink()
        budget, earlier = run.budget(), "f" * 64
        budget.open(rows=100, simulation=False)
        budget.plan(
            job=earlier, events=[EVENT], rounds=2, limits=[Limit(epsilon=epsilon_pld([EVENT] * 2, DELTA), delta=DELTA)]
        )
        for round_number in (1, 2):
            budget.reserve(job=earlier, round_number=round_number, model="1" * 64, witness=None)
        run.plan()
        run.play_all()
        run.conclude()
        audit = audit_run(run.path)
        assert audit.findings == []
        assert audit.sites["bank-b"].releases == 5 * EVENT.count  # What was spent before counts all the same.

    @pytest.mark.parametrize("unit", ["record", "client"])
    def test_what_an_earlier_job_promised_at_another_delta_or_unit_is_its_own_run_s_to_claim(
        self, unit: str, tmp_path: Path
    ) -> None:
        run = begin(tmp_path / "run")
        run.ledger().unlink()
        budget = run.open()
        earlier = dataclasses.replace(WHOLE, unit=unit)
        budget.plan(job="f" * 64, events=[earlier], rounds=1, limits=[Limit(unit=unit, epsilon=None, delta=1e-9)])
        budget.reserve(job="f" * 64, round_number=1, model="1" * 64, witness=None)
        run.plan()
        run.play_all()
        run.conclude()
        audit = audit_run(run.path)
        assert audit.findings == []
        (spending,) = audit.sites["bank-b"].spent
        assert spending.delta == DELTA

    def test_a_simulation_says_that_it_is_one(self, tmp_path: Path) -> None:
        run = begin(tmp_path / "run", simulation=True)
        run.play_all()
        run.conclude()
        audit = audit_run(run.path)
        assert audit.ok
        assert audit.notices == ["a simulation: the sites' keys, data and noise were all on one machine"]

    def test_seeded_noise_in_a_simulation_is_ok_and_says_that_it_protects_nobody(self, tmp_path: Path) -> None:
        seeded = dataclasses.replace(EVENT, rng="seeded-simulation")
        run = begin(tmp_path / "run", simulation=True, event=seeded)
        run.play_all()
        run.conclude()
        audit = audit_run(run.path)
        assert audit.ok
        assert any("seeded, so it protects nobody" in notice for notice in audit.notices)


class TestWhatIsNoPrivateRun:
    def test_a_folder_without_a_job_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"job.toml is missing"):
            audit_run(tmp_path)
        with pytest.raises(RunError, match=r"job.toml is missing"):
            audit_run(tmp_path / "absent")

    def test_a_job_without_differential_privacy_is_never_ok(self, run: Run) -> None:
        (run.path / "job.toml").write_text('name = "small"\n')
        audit = audit_run(run.path)
        assert found(audit, None, None, "no differential privacy: nothing is bounded")
        assert not audit.ok


# Tampering with what is not signed, or by who has no key.


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def flip_a_byte(run: Run) -> None:
    lines = lines_of(run.ledger())
    lines[3] = lines[3][:40] + bytes([lines[3][40] ^ 1]) + lines[3][41:]
    run.ledger().write_bytes(b"".join(lines))


def capitalise_a_signature(run: Run) -> None:
    lines = lines_of(run.ledger())
    signature = json.loads(lines[3])["sig"]
    lines[3] = lines[3].replace(signature.encode(), signature.upper().encode())
    run.ledger().write_bytes(b"".join(lines))


def delete_an_entry(run: Run) -> None:
    lines = lines_of(run.ledger())
    run.ledger().write_bytes(b"".join(lines[:4] + lines[6:]))


def swap_two_entries(run: Run) -> None:
    lines = lines_of(run.ledger())
    lines[2], lines[4] = lines[4], lines[2]
    run.ledger().write_bytes(b"".join(lines))


def repeat_an_entry(run: Run) -> None:
    lines = lines_of(run.ledger())
    run.ledger().write_bytes(b"".join([*lines, lines[7]]))


def cut_inside_the_last_line(run: Run) -> None:
    run.ledger().write_bytes(run.ledger().read_bytes()[:-20])


def cut_the_last_newline(run: Run) -> None:
    run.ledger().write_bytes(run.ledger().read_bytes()[:-1])


def cut_whole_entries(count: int) -> Callable[[Run], None]:
    return lambda run: keep_entries(run, 8 - count)


def keep_entries(run: Run, count: int) -> None:
    run.ledger().write_bytes(b"".join(lines_of(run.ledger())[:count]))


def cut_whole_entries_and_what_the_server_kept_of_them(run: Run) -> None:
    """A server and a site together hide round 2 and 3 of that site, and write down what is then left."""
    keep_entries(run, 4)
    heads = run.lines("heads.jsonl")
    for line in heads[1:]:
        line["heads"]["bank-b"] = heads[0]["heads"]["bank-b"]
    run.write_lines("heads.jsonl", heads)
    rounds = run.lines("metrics.jsonl")
    for line in rounds[1:]:
        line["contributors"].remove("bank-b")
        line["epsilon"]["bank-b"] = rounds[0]["epsilon"]["bank-b"]
    run.write_lines("metrics.jsonl", rounds)
    run.conclude()


def cut_the_last_round_everywhere_but_in_the_other_ledgers(run: Run) -> None:
    keep_entries(run, 6)
    rounds = run.lines("metrics.jsonl")
    rounds[2]["contributors"].remove("bank-b")
    rounds[2]["epsilon"]["bank-b"] = rounds[1]["epsilon"]["bank-b"]
    run.write_lines("metrics.jsonl", rounds)
    run.conclude()


def empty_the_ledger(run: Run) -> None:
    run.ledger().write_bytes(b"")


def remove_the_ledger(run: Run) -> None:
    run.ledger().unlink()


def remove_the_ledger_and_its_heads(run: Run) -> None:
    run.ledger().unlink()
    heads = run.lines("heads.jsonl")
    for line in heads:
        del line["heads"]["bank-b"]
    run.write_lines("heads.jsonl", heads)


def put_a_folder_in_its_place(run: Run) -> None:
    run.ledger().unlink()
    run.ledger().mkdir()


def put_another_site_s_ledger_in_its_place(run: Run) -> None:
    shutil.copy(run.ledger("bank-a"), run.ledger("bank-b"))


def add_a_stray_ledger(run: Run) -> None:
    shutil.copy(run.ledger("bank-a"), run.ledger("bank-x"))


def change_a_kept_head(run: Run) -> None:
    heads = run.lines("heads.jsonl")
    heads[0]["heads"]["bank-b"][1] = "0" * 64
    run.write_lines("heads.jsonl", heads)


def remove_a_kept_head(run: Run) -> None:
    heads = run.lines("heads.jsonl")
    del heads[0]["heads"]["bank-b"]
    run.write_lines("heads.jsonl", heads)


def make_up_a_negative_head(run: Run) -> None:
    heads = run.lines("heads.jsonl")
    heads[2]["heads"]["bank-b"][0] = -1
    run.write_lines("heads.jsonl", heads)


def remove_the_first_line_of_heads(run: Run) -> None:
    run.write_lines("heads.jsonl", run.lines("heads.jsonl")[1:])


def remove_the_last_line_of_heads(run: Run) -> None:
    run.write_lines("heads.jsonl", run.lines("heads.jsonl")[:-1])


def empty(name: str) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        (run.path / name).write_bytes(b"")

    return tamper


def remove(name: str) -> Callable[[Run], None]:
    return lambda run: (run.path / name).unlink()


def replace_the_key(run: Run) -> None:
    roster = run.read("roster.json")
    roster["sites"]["bank-b"] = roster["sites"]["bank-a"]
    run.write("roster.json", roster)


def say_a_thing_twice(run: Run) -> None:
    """One reader takes the first of two keys, another the last."""
    path = run.path / "summary.json"
    path.write_text(path.read_text().replace('{"rounds"', '{"epsilon": {"record": 0.1}, "rounds"'))


def keep_an_older_head_of_the_last_round(run: Run) -> None:
    """Nobody signs the heads of the last round: a server that keeps the one before could let a site cut its ledger."""
    heads = run.lines("heads.jsonl")
    heads[2]["heads"]["bank-b"] = heads[1]["heads"]["bank-b"]
    run.write_lines("heads.jsonl", heads)


def ask_for_noise_of_the_server(run: Run) -> None:
    shutil.copy(run.ledger("bank-a"), run.ledger(SERVER))


def count_an_update_twice(run: Run) -> None:
    rounds = run.lines("metrics.jsonl")
    rounds[1]["contributors"].append("bank-b")
    run.write_lines("metrics.jsonl", rounds)


def strip_the_folder_of_everybody(run: Run) -> None:
    """A run in which nobody ever took part has nothing to show, and trained a model nevertheless."""
    shutil.rmtree(run.path / "ledgers")
    (run.path / "heads.jsonl").write_bytes(b"")
    rounds = run.lines("metrics.jsonl")
    run.write_lines("metrics.jsonl", [{**line, "contributors": [], "epsilon": {}} for line in rounds])
    run.conclude()


def forge_the_whole_ledger_under_a_new_key(run: Run) -> None:
    """Who can write the roster can make up a site's history; what the others signed does not fit it."""
    entries, key = run.entries(run.victim), IdentityKey.create(run.path / "forged.pem")
    run.ledger().unlink()
    forged = Ledger(run.ledger(), run.victim, key)
    for entry in entries:
        forged.append(entry.kind, {**entry.body, "public_key": key.public_hex} if entry.kind == "open" else entry.body)
    roster = run.read("roster.json")
    (roster if run.victim == SERVER else roster["sites"])[run.victim.strip("_")] = key.public_hex
    run.write("roster.json", roster)


def forge_it_and_the_heads_with_it(run: Run) -> None:
    forge_the_whole_ledger_under_a_new_key(run)
    entries, heads = run.entries(run.victim), run.lines("heads.jsonl")
    for line in heads:
        kept = line if run.victim == SERVER else line["heads"]
        kept[run.victim.strip("_")] = list(entries[kept[run.victim.strip("_")][0]].head)
    run.write_lines("heads.jsonl", heads)


def claim(site: str | None, change: Callable[[float], Any]) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        summary = run.read("summary.json")
        if site is None:
            summary["epsilon"]["record"] = change(summary["epsilon"]["record"])
        else:
            summary["sites"][site]["epsilon"] = change(summary["sites"][site]["epsilon"])
        run.write("summary.json", summary)

    return tamper


def forget_a_site_in_the_summary(run: Run) -> None:
    summary = run.read("summary.json")
    del summary["sites"]["bank-b"]
    run.write("summary.json", summary)


def claim_fewer_rounds(run: Run) -> None:
    run.write("summary.json", {**run.read("summary.json"), "rounds": 2})


def claim_in_the_last_round(run: Run) -> None:
    rounds = run.lines("metrics.jsonl")
    rounds[-1]["epsilon"]["bank-b"] *= 0.9
    run.write_lines("metrics.jsonl", rounds)


def change_the_job(run: Run) -> None:
    (run.path / "job.toml").write_text(run.kind.toml.replace("8.0", "9.0"))


def change_the_job_and_its_hash(run: Run) -> None:
    change_the_job(run)
    changed = hashlib.sha256((run.path / "job.toml").read_bytes()).hexdigest()
    run.write("summary.json", {**run.read("summary.json"), "job_hash": changed})


def count_an_update_of_a_stranger(run: Run) -> None:
    rounds = run.lines("metrics.jsonl")
    rounds[1]["contributors"].append("bank-x")
    run.write_lines("metrics.jsonl", rounds)


TAMPERINGS: list[tuple[Callable[[Run], None], str | None, int | None, str]] = [
    (flip_a_byte, "bank-b", 3, "changed after it was"),
    (capitalise_a_signature, "bank-b", 3, "its signature is not by"),
    (delete_an_entry, "bank-b", 4, "an entry was deleted, repeated or moved"),
    (swap_two_entries, "bank-b", 2, "an entry was deleted, repeated or moved"),
    (repeat_an_entry, "bank-b", 8, "an entry was deleted, repeated or moved"),
    (cut_inside_the_last_line, "bank-b", 7, "the last line is cut off"),
    (cut_the_last_newline, "bank-b", 7, "the last line is cut off"),
    (cut_whole_entries(1), "bank-b", 7, "missing: in round 3 the ledger reached entry 7; it was truncated"),
    (cut_whole_entries(1), "bank-b", None, "counted in round 3 without a committed entry"),
    (cut_whole_entries(2), "bank-b", 6, "missing: in round 3 the ledger reached entry 7; it was truncated"),
    (cut_whole_entries(5), "bank-b", 3, "missing: in round 1 the ledger reached entry 3; it was truncated"),
    (cut_whole_entries_and_what_the_server_kept_of_them, "bank-a", 6, "signed other heads for round 2"),
    (cut_whole_entries_and_what_the_server_kept_of_them, "bank-c", 6, "signed other heads for round 2"),
    (cut_the_last_round_everywhere_but_in_the_other_ledgers, "bank-b", 6, "missing: in round 3"),
    (empty_the_ledger, "bank-b", 0, "the ledger does not begin with an opening entry"),
    (empty_the_ledger, "bank-b", 0, "missing: in round 1"),
    (remove_the_ledger, "bank-b", None, "its ledger is missing"),
    (remove_the_ledger_and_its_heads, "bank-b", None, "its ledger is missing"),
    (remove_the_ledger_and_its_heads, "bank-c", 4, "signed other heads for round 1"),
    (put_a_folder_in_its_place, "bank-b", None, "cannot be read"),
    (put_another_site_s_ledger_in_its_place, "bank-b", 0, "its signature is not by"),
    (add_a_stray_ledger, "bank-x", None, "a ledger of a site that the roster does not name"),
    (change_a_kept_head, "bank-b", 3, "is not the entry that the server saw in round 1"),
    (change_a_kept_head, "bank-a", 4, "signed other heads for round 1 than heads.jsonl holds"),
    (change_a_kept_head, "bank-c", 4, "signed other heads for round 1 than heads.jsonl holds"),
    (remove_a_kept_head, "bank-a", 4, "signed other heads for round 1 than heads.jsonl holds"),
    (make_up_a_negative_head, "bank-b", 8, "missing: in round 3"),
    (remove_the_first_line_of_heads, "bank-a", 4, "signed other heads for round 1 than heads.jsonl holds"),
    (remove_the_last_line_of_heads, "bank-b", None, "counted in round 3, but heads.jsonl holds no head of it"),
    (empty("heads.jsonl"), "bank-a", 4, "signed other heads for round 1 than heads.jsonl holds"),
    (remove("heads.jsonl"), None, None, "heads.jsonl is missing"),
    (remove("metrics.jsonl"), None, None, "metrics.jsonl is missing"),
    (empty("metrics.jsonl"), None, None, "does not hold rounds 1 to 3"),
    (remove("summary.json"), None, None, "the run is not finished: it makes no claim yet"),
    (remove("roster.json"), None, None, "roster.json is missing, names no site"),
    (replace_the_key, "bank-b", 0, "its signature is not by"),
    (forge_the_whole_ledger_under_a_new_key, "bank-b", 3, "is not the entry that the server saw in round 1"),
    (forge_it_and_the_heads_with_it, "bank-a", 4, "signed other heads for round 1 than heads.jsonl holds"),
    (claim("bank-b", lambda eps: eps * 0.9), "bank-b", None, "claims epsilon"),
    (claim("bank-b", lambda eps: eps + 0.002), "bank-b", None, "claims epsilon"),
    (claim("bank-b", lambda eps: 0), "bank-b", None, "claims epsilon 0.0000, the events cost"),
    (claim("bank-b", lambda eps: None), "bank-b", None, "claims no epsilon, the events cost"),
    (claim("bank-b", lambda eps: "small"), "bank-b", None, "claims no epsilon"),
    (claim("bank-b", lambda eps: True), "bank-b", None, "claims no epsilon"),
    (claim("bank-b", lambda eps: math.nan), "bank-b", None, "claims no epsilon"),
    (claim("bank-b", lambda eps: 10**400), "bank-b", None, "claims no epsilon"),
    (claim(None, lambda eps: eps * 0.9), None, None, "the run claims epsilon"),
    (claim(None, lambda eps: eps * 1.1), None, None, "the run claims epsilon"),
    (claim(None, lambda eps: None), None, None, "the run claims no epsilon"),
    (forget_a_site_in_the_summary, "bank-b", None, "claims no epsilon"),
    (
        lambda run: say_epsilon_of_clients(0.5)(run),
        None,
        None,
        "claims a client-level epsilon; the job protects no client",
    ),
    (claim_fewer_rounds, None, None, "claims 2 rounds, its job has 3"),
    (claim_in_the_last_round, "bank-b", None, "metrics.jsonl claims epsilon"),
    (change_the_job, None, None, "job.toml is not the job that the run claims to have run"),
    (change_the_job_and_its_hash, "bank-b", None, "counted in round 1 without a committed entry"),
    (count_an_update_of_a_stranger, "bank-x", None, "is named in metrics.jsonl, but not in the roster"),
    (replace_the_key, "bank-b", None, "has the key of bank-a"),
    (say_a_thing_twice, None, None, "summary.json is not a JSON object"),
    (keep_an_older_head_of_the_last_round, "bank-b", None, "but the head that heads.jsonl holds of it is older"),
    (ask_for_noise_of_the_server, SERVER, None, "there is a ledger of the server, job.toml asks for no noise"),
    (count_an_update_twice, None, None, "round 2 counts an update twice"),
    (strip_the_folder_of_everybody, None, None, "round 1 counts 0 updates, its job needs 1"),
]


@pytest.mark.parametrize(("tamper", "site", "entry", "why"), TAMPERINGS)
def test_tampering_is_found_where_it_happened(
    run: Run, tamper: Callable[[Run], None], site: str | None, entry: int | None, why: str
) -> None:
    tamper(run)
    audit = audit_run(run.path)
    assert not audit.ok
    assert found(audit, site, entry, why), [str(finding) for finding in audit.findings]
    if site in audit.sites:
        assert not audit.sites[site].ok
    assert audit.as_dict()["ok"] is False


# The same to the server's ledger: "central" has no other.


def in_every_line(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        lines = run.lines(name)
        for line in lines:
            change(line)
        run.write_lines(name, lines)

    return tamper


def forget_the_server_in_the_roster(run: Run) -> None:
    roster = run.read("roster.json")
    del roster["server"]
    run.write("roster.json", roster)


def replace_the_server_s_key(run: Run) -> None:
    key = IdentityKey.create(run.path / "another.pem").public_hex
    run.write("roster.json", {**run.read("roster.json"), "server": key})


def claim_of_clients(key: str, value: object) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        summary = run.read("summary.json")
        run.write("summary.json", {**summary, "client": {**summary["client"], key: value}})

    return tamper


def claim_in_total(run: Run) -> None:
    summary = run.read("summary.json")
    run.write("summary.json", {**summary, "epsilon": {**summary["epsilon"], "client": 0.5}})


def forget_the_claim(run: Run) -> None:
    run.write("summary.json", {**run.read("summary.json"), "client": None})


def name_fewer_clients(run: Run) -> None:
    summary = run.read("summary.json")
    del summary["sites"]["bank-c"]
    run.write("summary.json", summary)


def remove_the_claim_of_clients(run: Run) -> None:
    summary = run.read("summary.json")
    run.write("summary.json", {**summary, "epsilon": {**summary["epsilon"], "client": None}})


def remove_the_ledger_and_every_trace(run: Run) -> None:
    run.ledger().unlink()
    in_every_line("heads.jsonl", lambda line: line.pop("server"))(run)
    in_every_line("metrics.jsonl", lambda line: line.pop("epsilon_client"))(run)
    remove_the_claim_of_clients(run)
    forget_the_claim(run)


def remove_the_ledger_and_every_round(run: Run) -> None:
    """A site that was never asked owes no ledger. The server that adds the noise always has one."""
    remove_the_ledger_and_every_trace(run)
    empty("heads.jsonl")(run)
    empty("metrics.jsonl")(run)


def say_epsilon_of_clients(value: object) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        rounds = run.lines("metrics.jsonl")
        rounds[-1]["epsilon_client"] = value
        run.write_lines("metrics.jsonl", rounds)

    return tamper


SERVER_TAMPERINGS: list[tuple[Callable[[Run], None], str | None, int | None, str]] = [
    (flip_a_byte, SERVER, 3, "changed after it was"),
    (capitalise_a_signature, SERVER, 3, "its signature is not by"),
    (delete_an_entry, SERVER, 4, "an entry was deleted, repeated or moved"),
    (swap_two_entries, SERVER, 2, "an entry was deleted, repeated or moved"),
    (repeat_an_entry, SERVER, 8, "an entry was deleted, repeated or moved"),
    (cut_inside_the_last_line, SERVER, 7, "the last line is cut off"),
    (cut_whole_entries(1), SERVER, 7, "missing: in round 3 the ledger reached entry 7; it was truncated"),
    (cut_whole_entries(1), SERVER, None, "round 3 was released without a committed entry"),
    (cut_whole_entries(2), SERVER, 6, "missing: in round 3 the ledger reached entry 7; it was truncated"),
    (cut_whole_entries(7), SERVER, None, "its ledger holds no plan for the job in job.toml"),
    (empty_the_ledger, SERVER, 0, "the ledger does not begin with an opening entry"),
    (remove_the_ledger, SERVER, None, "its ledger is missing"),
    (remove_the_ledger_and_every_trace, SERVER, None, "its ledger is missing"),
    (remove_the_claim_of_clients, None, None, "the run claims for whole clients no epsilon"),
    (remove_the_ledger_and_every_round, SERVER, None, "its ledger is missing"),
    (forget_the_server_in_the_roster, SERVER, None, "roster.json has no key of the server"),
    (replace_the_server_s_key, SERVER, 0, "its signature is not by"),
    (forge_the_whole_ledger_under_a_new_key, SERVER, 3, "is not the entry that the server saw in round 1"),
    (in_every_line("heads.jsonl", lambda line: line.pop("server")), SERVER, None, "heads.jsonl holds no head of it"),
    (change_the_job, None, None, "job.toml is not the job that the run claims to have run"),
    (change_the_job_and_its_hash, SERVER, None, "its ledger holds no plan for the job in job.toml"),
    (in_every_line("metrics.jsonl", lambda line: line.update(round=1)), SERVER, 5, "commits round 2, of which"),
    (say_epsilon_of_clients(0.5), SERVER, None, "metrics.jsonl claims epsilon 0.5000, the events cost"),
    (claim_of_clients("epsilon", 0.5), SERVER, None, "claims for whole clients epsilon 0.5000"),
    (claim_of_clients("epsilon", None), SERVER, None, "claims for whole clients no epsilon"),
    (claim_of_clients("epsilon_rdp", 0.5), SERVER, None, "claims by RDP"),
    (claim_of_clients("delta", 1e-9), SERVER, None, "claims delta 1e-09"),
    (claim_of_clients("noise_multiplier", 50.0), SERVER, None, "claims noise_multiplier 50.0"),
    (claim_of_clients("clip_norm", 0.1), SERVER, None, "claims clip_norm 0.1"),
    (claim_of_clients("sampling_rate", 0.01), SERVER, None, "claims sampling_rate 0.01"),
    (claim_of_clients("clients", 10**6), SERVER, None, "claims clients 1000000"),
    (claim_in_total, None, None, "the run claims for whole clients epsilon 0.5000"),
    (forget_the_claim, SERVER, None, "claims for whole clients no epsilon"),
    (name_fewer_clients, SERVER, 0, "is of 3 clients, summary.json names 2"),
    (name_fewer_clients, "bank-c", None, "is named in metrics.jsonl, but not in summary.json"),
]


@pytest.mark.parametrize(("tamper", "site", "entry", "why"), SERVER_TAMPERINGS)
def test_tampering_with_the_server_s_ledger_is_found_where_it_happened(
    copy: Copies, tamper: Callable[[Run], None], site: str | None, entry: int | None, why: str
) -> None:
    run = copy("central", SERVER)
    tamper(run)
    audit = audit_run(run.path)
    assert found(audit, site, entry, why), [str(finding) for finding in audit.findings]
    assert audit.server is not None
    assert audit.server.ok == (site != SERVER and not any(f.site == SERVER for f in audit.findings))
    assert audit.as_dict()["ok"] is False


@pytest.mark.parametrize("tamper", [remove_the_ledger_and_every_trace, forge_it_and_the_heads_with_it])
def test_the_sites_vouch_for_the_server_where_they_keep_ledgers(copy: Copies, tamper: Callable[[Run], None]) -> None:
    run = copy("both", SERVER)
    tamper(run)
    assert found(audit_run(run.path), "bank-a", 4, "signed other heads for round 1 than heads.jsonl holds")


def sign_no_heads(run: Run) -> None:
    run.budget().reserve(job=run.job, round_number=2, model="1" * 64, witness=None)


def test_a_site_that_was_kept_from_vouching_for_the_others_shows(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.play(1)
    sign_no_heads(run)
    assert found(audit_run(run.path), "bank-b", 4, "signed other heads for round 1 than heads.jsonl holds")


def test_both_units_are_held_to_their_claims_side_by_side(copy: Copies) -> None:
    run = copy("both", SERVER)
    audit = audit_run(run.path)
    assert audit.largest("record") == run.cost("bank-b", "record")
    assert audit.largest("client") == run.cost(SERVER, "client")
    claim_in_total(run)
    claim("bank-b", lambda eps: eps / 2)(run)
    audit = audit_run(run.path)
    assert found(audit, None, None, "the run claims for whole clients epsilon 0.5000")
    assert found(audit, "bank-b", None, "claims epsilon")
    assert found(copy_without_sites(run), None, None, "roster.json is missing, names no site")


def copy_without_sites(run: Run) -> Audit:
    """What is left where records were to be protected and the folder has no site's ledger."""
    shutil.rmtree(run.path / "ledgers")
    run.write("roster.json", {**run.read("roster.json"), "sites": {}})
    return audit_run(run.path)


def claim_of_a_client(key: str, value: object) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        summary = run.read("summary.json")
        summary["sites"]["bank-b"]["client"][key] = value
        run.write("summary.json", summary)

    return tamper


def forget_a_client_s_claim(run: Run) -> None:
    summary = run.read("summary.json")
    summary["sites"]["bank-b"]["client"] = None
    run.write("summary.json", summary)


@pytest.mark.parametrize("kind", ["local", "both, local", "shares", "both, shares"])
@pytest.mark.parametrize(
    ("tamper", "site", "why"),
    [
        (claim_of_a_client("epsilon", 0.5), "bank-b", "claims for whole clients epsilon 0.5000"),
        (claim_of_a_client("delta", 1e-9), "bank-b", "claims delta 1e-09"),
        (forget_a_client_s_claim, "bank-b", "claims for whole clients no epsilon"),
        (claim_in_total, None, "the run claims for whole clients epsilon 0.5000"),
        (say_epsilon_of_clients(0.5), None, "metrics.jsonl claims for whole clients epsilon 0.5000"),
        (remove_the_ledger, "bank-b", "its ledger is missing"),
        (cut_whole_entries(1), "bank-b", "counted in round 3 without a committed entry"),
        (lambda run: run.write("summary.json", {**run.read("summary.json"), "client": {"epsilon": 0.5}}), None,
         "claims noise that the server added; job.toml asks for none"),
    ],
)  # fmt: skip
def test_where_clients_add_their_noise_the_sites_answer_for_it(
    copy: Copies, kind: str, tamper: Callable[[Run], None], site: str | None, why: str
) -> None:
    run = copy(kind)
    tamper(run)
    audit = audit_run(run.path)
    assert any(f.site == site and why in f.why for f in audit.findings), [str(f) for f in audit.findings]


def test_a_client_that_was_never_asked_owes_no_ledger_and_spent_nothing_of_its_unit(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", LOCAL)
    run.play_all(("bank-a", "bank-b"))
    run.ledger("bank-c").unlink()
    run.conclude()
    audit = audit_run(run.path)
    assert [str(finding) for finding in audit.findings] == []
    assert audit.as_dict()["epsilon"]["sites"]["bank-c"]["client"]["pld"] == 0.0


def test_a_finding_reads_as_a_sentence_with_its_place(run: Run) -> None:
    flip_a_byte(run)
    claim(None, lambda eps: None)(run)
    texts = [str(finding) for finding in audit_run(run.path).findings]
    assert any(text.startswith("bank-b, entry 3: ") for text in texts)
    change_the_job(run)
    assert "job.toml is not the job that the run claims to have run" in map(str, audit_run(run.path).findings)


def test_an_epsilon_that_cannot_be_trusted_is_not_reported(run: Run) -> None:
    flip_a_byte(run)
    report = audit_run(run.path).as_dict()["epsilon"]
    assert report["sites"]["bank-b"]["pld"] is None
    assert report["record"] is None
    assert report["sites"]["bank-a"]["pld"] > 0


# What a site that breaks its own rules can sign: the chain holds, the content does not.


def reservation(run: Run, **changes: Any) -> dict[str, Any]:
    events = [event.as_dict() for event in run.events(run.victim)]
    witness = None if run.victim == SERVER else digest_of(run.lines("heads.jsonl")[-1])
    return {"job": run.job, "round": 4, "model": "1" * 64, "witness": witness, "events": events, **changes}


def a_plan(run: Run, **changes: Any) -> dict[str, Any]:
    events = [event.as_dict() for event in run.events(run.victim)]
    limits = [{"unit": event["unit"], "epsilon": LIMIT, "delta": DELTA} for event in events]
    own = {"job": "f" * 64, "purpose": "training", "events": events, "rounds": 1, "filter": None, "limits": limits}
    return {**own, **changes}


def a_commit(run: Run, **changes: Any) -> dict[str, Any]:
    return {"job": run.job, "round": 3, "reserve": 6, "output": "3" * 64, **changes}


def quieter(run: Run) -> list[dict[str, Any]]:
    return [{**event.as_dict(), "noise_multiplier": 200.0} for event in run.events(run.victim)]


def little(run: Run) -> list[dict[str, Any]]:
    return [{"unit": event.unit, "epsilon": 0.01, "delta": DELTA} for event in run.events(run.victim)]


Body = Callable[[Run], dict[str, Any]]
OPEN: dict[str, Any] = {"public_key": "", "rows": 1, "simulation": True, "dataset": "records"}
SIGNED: list[tuple[str, Body, int, str]] = [
    ("reserve", reservation, 8, "reserves more than the plan's 3 rounds"),
    ("reserve", lambda r: reservation(r, job="f" * 64), 8, "reserves a round of a job that was never planned"),
    ("reserve", lambda r: reservation(r, clip_norm=2.0), 8, "reserves more than the plan's 3 rounds"),
    ("commit", a_commit, 8, "commits entry 6 a second time: two releases, one charge"),
    ("commit", lambda r: a_commit(r, round=3.0), 8, "commits entry 6 a second time: two releases, one charge"),
    ("commit", lambda r: a_commit(r, reserve=99), 8, "commits a release that was never reserved"),
    ("commit", lambda r: a_commit(r, reserve=8), 8, "commits a release that was never reserved"),
    ("commit", lambda r: a_commit(r, reserve=-2), 8, "commits a release that was never reserved"),
    ("commit", lambda r: a_commit(r, reserve="6"), 8, "commits a release that was never reserved"),
    ("commit", lambda r: a_commit(r, reserve=None), 8, "commits a release that was never reserved"),
    ("commit", lambda r: a_commit(r, reserve=7), 8, "commits a release that was never reserved"),
    ("commit", lambda r: a_commit(r, reserve=4), 8, "commits another round than entry 4 reserved"),
    ("commit", lambda r: a_commit(r, job="f" * 64), 8, "commits another round than entry 6 reserved"),
    ("open", lambda r: OPEN, 8, "a second opening entry"),
    ("plan", lambda r: a_plan(r, limits=little(r)), 8, "admits a job over its budget"),
    ("plan", lambda r: a_plan(r, job=r.job), 8, "plans a job a second time"),
    ("settle", lambda r: {"job": "f" * 64}, 8, "settles a job that is not under way"),
    ("settle", lambda r: {}, 8, "malformed"),
    ("plan", lambda r: a_plan(r, limits=5), 8, "malformed"),
]


@pytest.mark.parametrize("victim", ["bank-b", SERVER])
@pytest.mark.parametrize(("kind", "body", "entry", "why"), SIGNED)
def test_a_ledger_s_own_signature_excuses_nothing(
    copy: Copies, victim: str, kind: str, body: Body, entry: int, why: str
) -> None:
    run = copy("both", victim)
    run.sign(kind, body(run))
    audit = audit_run(run.path)
    assert found(audit, victim, entry, why), [str(finding) for finding in audit.findings]
    assert [ledger.site for ledger in audit.ledgers if not ledger.ok] == [victim]


@pytest.mark.parametrize("kind", ["record", "central", "local"])
def test_a_holder_s_budget_binds_every_plan_behind_it_and_no_reservation_follows_a_settlement(
    kind: str, tmp_path: Path
) -> None:
    run = begin(tmp_path / "run", KINDS[kind])
    unit = run.events(run.victim)[0].unit
    run.play(1)
    run.sign("budget", {"purpose": None, "unit": unit, "epsilon": 0.01, "delta": DELTA})
    run.play(2)  # What was admitted goes on.
    assert not any(f.entry is not None for f in audit_run(run.path).findings)
    at = len(run.entries(run.victim))
    run.sign("plan", a_plan(run))
    run.sign("budget", {"purpose": "research", "unit": unit, "epsilon": 0.01, "delta": DELTA})
    run.sign("budget", {"purpose": None, "unit": unit, "epsilon": None, "delta": DELTA})
    run.sign("plan", a_plan(run, job="e" * 64))
    run.sign("plan", a_plan(run, job="d" * 64, purpose="research"))
    run.sign("settle", {"job": run.job})
    run.sign("reserve", reservation(run, round=3))
    audit = audit_run(run.path)
    assert found(audit, run.victim, at, "admits a job over its budget: ")
    assert found(audit, run.victim, at, "the data holder's budget for all purposes is 0.01")
    assert not any(f.entry == at + 3 for f in audit.findings)
    assert found(audit, run.victim, at + 4, "the data holder's budget for purpose 'research' is 0.01")
    assert found(audit, run.victim, at + 6, "reserves a round of a job that was settled")


def test_events_chosen_on_the_way_stop_at_their_filter_and_cost_its_order(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.play_all()
    budget, order = run.budget(), 16
    bound = Filter(order=order, rdp=2.5 * rdp_at([EVENT], order))
    budget.plan_adaptive(job="f" * 64, rounds=9, bound=bound, limits=[Limit(epsilon=None, delta=DELTA)])
    for number in (1, 2):
        budget.reserve(job="f" * 64, round_number=number, model="1" * 64, witness=None, events=[EVENT])
    run.conclude()
    audit = audit_run(run.path)
    assert [f for f in audit.findings if "metrics.jsonl" not in f.why] == []
    (spending,) = audit.sites["bank-b"].spent
    assert spending.epsilon is not None
    assert spending.epsilon.pld == run.cost("bank-b")
    assert spending.epsilon.pld > epsilon_pld([EVENT] * 5, DELTA)
    assert spending.within is None
    body = reservation(run, job="f" * 64, round=3, witness=None)
    at = run.sign("reserve", body).seq
    assert found(audit_run(run.path), "bank-b", at, "reserves more than its filter holds")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "commits entry 2 a second time: two releases, one charge"),
        ({"round": 4}, "commits round 4 of a training whose noise is for 3"),
        ({"round": 0}, "commits round 0 of a training whose noise is for 3"),
        ({"round": "3"}, "commits round 3 of a training whose noise is for 3"),
        ({"round": 1.5}, "commits round 1.5 of a training whose noise is for 3"),
        ({"round": 3.0}, "commits entry 2 a second time: two releases, one charge"),
    ],
)
def test_correlated_noise_takes_one_reservation_and_one_commit_a_round(
    copy: Copies, changes: dict[str, Any], why: str
) -> None:
    run = copy("banded")
    assert [entry.kind for entry in run.entries(SERVER)] == ["open", "plan", "reserve", "commit", "commit", "commit"]
    run.sign("commit", a_commit(run, reserve=2, **changes))
    assert found(audit_run(run.path), SERVER, 6, why)
    run.sign("reserve", reservation(run))
    assert found(audit_run(run.path), SERVER, 7, "reserves more than the plan's 1 rounds")


@pytest.mark.parametrize(
    ("contributors", "why"),
    [
        ([["bank-a"], ["bank-a"], ["bank-b"]], "was counted in rounds 1 and 2, its noise is for 2 apart"),
        ([["bank-a"], ["bank-b"], ["bank-b", "bank-a"]], None),
        ([["bank-a"], ["bank-a"], ["bank-a"]], "was counted 3 times, its noise is for 2"),
    ],
)
def test_correlated_noise_is_for_clients_that_return_as_planned(
    copy: Copies, contributors: list[list[str]], why: str | None
) -> None:
    run = copy("banded")
    rounds = run.lines("metrics.jsonl")
    run.write_lines("metrics.jsonl", [{**r, "contributors": c} for r, c in zip(rounds, contributors, strict=True)])
    audit = audit_run(run.path)
    assert any(f.site == "bank-a" and why in f.why for f in audit.findings) if why else "bank-a" not in str(audit)


@pytest.mark.parametrize("clip_norm", [None, 0, -1.0, True, "1"])
def test_a_clip_norm_that_moves_is_said_in_each_reservation_and_no_other_is(tmp_path: Path, clip_norm: object) -> None:
    adaptive = begin(tmp_path / "adaptive", ADAPTIVE)
    adaptive.sign("reserve", reservation(adaptive, clip_norm=clip_norm))
    assert found(audit_run(adaptive.path), SERVER, 2, "reserves a round of an adaptive clip norm with the clip norm")
    fixed = begin(tmp_path / "fixed", CENTRAL)
    fixed.sign("reserve", reservation(fixed, clip_norm=2.0))
    assert found(audit_run(fixed.path), SERVER, 2, "reserves another clip norm than its event states")


def resigned(path: Path, kind: Kind, victim: str, change: Callable[[dict[str, Any]], Any], rows: int = 0) -> Run:
    """A run whose victim planned something else than the job from the beginning, and says so under its signature."""
    run = Run(begin(path, kind).path, kind, victim)
    opening, plan = ({**entry.body} for entry in run.entries(victim))
    run.ledger().unlink()
    body = {"open": opening, "plan": json.loads(json.dumps(plan))}
    change(body)
    run.sign("open", {**opening, "rows": rows or opening["rows"]})
    run.sign("plan", body["plan"])
    return run


def event(key: str, value: object, which: int = 0) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["plan"]["events"][which].update({key: value})


def planned(key: str, value: object) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["plan"].update({key: value})


def limit(key: str, value: object) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["plan"]["limits"][0].update({key: value})


def opened(key: str, value: object) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["open"].update({key: value})


FILTER = {"unit": "record", "order": 8, "rdp": 0.1}
RATE = {"scheme": "poisson", "rate": 0.1}
# A plan that is not the job's: fewer rounds, another sampling, another purpose (and so another budget).
PLANNED: list[tuple[str, str, Callable[[dict[str, Any]], Any], int, str]] = [
    ("record", "bank-b", planned("rounds", 2), 1, "plans rounds 2, job.toml says 3"),
    ("record", "bank-b", planned("purpose", "research"), 1, "plans purpose 'research', job.toml says 'training'"),
    ("record", "bank-b", planned("filter", FILTER), 1, "releases other events than job.toml says"),
    ("record", "bank-b", planned("events", []), 1, "releases other events than job.toml says"),
    ("record", "bank-b", planned("limits", []), 1, "protects other units than job.toml says"),
    ("record", "bank-b", limit("epsilon", 9.0), 1, "plans epsilon 9.0, job.toml says 8.0"),
    ("record", "bank-b", limit("delta", 1e-6), 1, "plans delta 1e-06, job.toml says 1e-05"),
    ("record", "bank-b", event("sampling", RATE), 1, "plans sampling rate 0.1 for a record, job.toml says 1.0"),
    ("record", "bank-b", event("count", 1), 1, "plans count 1 for a record, job.toml says 4"),
    ("record", "bank-b", event("clip_norm", 0.1), 1, "plans clip_norm 0.1 for a record, job.toml says 1.0"),
    ("record", "bank-b", event("unit", "client"), 1, "releases other events than job.toml says"),
    ("record", "bank-b", event("rng", "seeded-simulation"), 1, "plans rng seeded-simulation"),
    ("record", "bank-b", opened("dataset", "others"), 0, "is the ledger of data set 'others', job.toml says 'records'"),
    ("both", SERVER, planned("rounds", 2), 1, "plans rounds 2, job.toml says 3"),
    ("both", SERVER, planned("purpose", "research"), 1, "plans purpose 'research', job.toml says 'training'"),
    ("both", SERVER, limit("epsilon", None), 1, "plans epsilon None, job.toml says 8.0"),
    ("both", SERVER, event("sampling", RATE), 1, "plans sampling rate 0.1 for a client, job.toml says 1.0"),
    ("both", SERVER, event("clip_norm", 0.1), 1, "plans clip_norm 0.1 for a client, job.toml says 1.0"),
    ("both", SERVER, event("quantile_noise", 9.0), 1, "plans quantile_noise 9.0 for a client, job.toml says None"),
    ("both", SERVER, opened("dataset", "others"), 0, "is the ledger of data set 'others', job.toml says 'clients'"),
    ("adaptive", SERVER, event("quantile_noise", 9.0), 1, "plans quantile_noise 9.0 for a client, job.toml says 4.0"),
    ("central", SERVER, event("sampling", RATE), 1, "plans sampling rate 0.1 for a client, job.toml says 0.5"),
    ("banded", SERVER, event("separation", 3), 1, "plans separation 3 for a client, job.toml says 2"),
    ("banded", SERVER, event("participations", 1), 1, "plans participations 1 for a client, job.toml says 2"),
    ("banded", SERVER, event("rounds", 2), 1, "plans rounds 2 for a client, job.toml says 3"),
    ("local", "bank-b", event("sampling", RATE), 1, "plans sampling rate 0.1 for a client, job.toml says 1.0"),
    ("both, local", "bank-b", event("clip_norm", 0.1, 1), 1, "plans clip_norm 0.1 for a client, job.toml says 1.0"),
    ("shares", "bank-b", event("clients", 4), 1, "plans clients 4 for a client, job.toml says 3"),
    ("shares", "bank-b", event("clients", 2), 1, "plans clients 2 for a client, job.toml says 3"),
    ("shares", "bank-b", event("clip_norm", 0.1), 1, "plans clip_norm 0.1 for a client, job.toml says 1.0"),
    ("shares", "bank-b", event("beta", 0.9), 1, "plans beta 0.9 for a client"),
    ("shares", "bank-b", event("count", 2), 1, "plans count 2 for a client, job.toml says 1"),
    ("shares", "bank-b", event("rng", "seeded-simulation"), 1, "plans rng seeded-simulation"),
    ("shares", "bank-b", event("mechanism", "distributed_skellam"), 1, "plans mechanism distributed_skellam"),
    ("shares", "bank-b", event("adjacency", "add_or_remove_one"), 1, "plans adjacency add_or_remove_one"),
    ("shares", "bank-b", planned("events", [WHOLE.as_dict()]), 1, "plans mechanism gaussian for a client"),
    ("shares", "bank-b", event("granularity", SHARES.granularity / 2), 1, "plans granularity"),
    ("shares", "bank-b", event("dimension", 12), 1, "plans dimension 12 for a client, job.toml and 3 sites make it 16"),
    ("shares", "bank-b", event("local_scale", SHARES.local_scale / 8), 1, "admits a job over its budget"),
    ("shares", "bank-b", event("local_scale", SHARES.local_scale * 2), 1, "plans granularity"),
    ("both, shares", "bank-b", event("clients", 4, 1), 1, "plans clients 4 for a client, job.toml says 3"),
    ("both, shares", "bank-b", event("clip_norm", 0.1), 1, "plans clip_norm 0.1 for a record, job.toml says 1.0"),
]


@pytest.mark.parametrize(("kind", "victim", "change", "entry", "why"), PLANNED)
def test_a_ledger_plans_what_the_job_says(
    tmp_path: Path, kind: str, victim: str, change: Callable[[dict[str, Any]], Any], entry: int, why: str
) -> None:
    run = resigned(tmp_path / "run", KINDS[kind], victim, change)
    audit = audit_run(run.path)
    assert found(audit, victim, entry, why), [str(finding) for finding in audit.findings]
    assert not any(f.site not in (victim, None) for f in audit.findings)


def promising(job: str, sites: int = 3) -> SecurePromise:
    return SecurePromise(tomllib.loads(job), sites)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_noise_that_the_job_gives_by_hand_is_the_noise_of_the_shares(tmp_path: Path, factor: float) -> None:
    given = SHARED.toml.replace("epsilon = 8.0", "noise_multiplier = 5.0")
    kind = Kind(given, SHARED.at_sites)
    run = begin(tmp_path / "run", kind, limit=None)
    run.play_all()
    run.conclude()
    audit = audit_run(run.path)
    assert not any("plans" in f.why for f in audit.findings), [str(f) for f in audit.findings]
    other = resigned(tmp_path / "other", kind, "bank-b", event("local_scale", SHARES.local_scale * factor))
    assert found(audit_run(other.path), "bank-b", 1, "plans local_scale")


# n sites, the most dropouts that the threshold floor(2 (n - 1) / 3) + 1 leaves, n_C colluders: the fewest honest
# survivors are n - D - n_C. Complete graphs; the last has 10 sites in three groups, of which two must be summed.
@pytest.mark.parametrize(
    ("sites", "secure", "cohort", "honest", "least"),
    [
        (5, {"colluders = 0": "colluders = 1"}, "", 3, 4),
        (20, {"colluders = 0": "colluders = 4"}, "", 10, 14),
        (20, {"colluders = 0": "colluders = 4\ndropouts = 1"}, "", 15, 19),
        (20, {}, "size = 5", 4, 4),
        (20, {}, "size = 5\nminimum = 5", 5, 5),
        (10, {"groups = 1": "groups = 3", '"sum"': '"median"'}, "", 3, 6),
    ],
)
def test_the_fewest_that_a_job_allows_by_hand(
    sites: int, secure: dict[str, str], cohort: str, honest: int, least: int
) -> None:
    job = SHARED.toml + (f"\n[cohort]\n{cohort}\n" if cohort else "")
    for before, after in secure.items():
        job = job.replace(before, after)
    promise = promising(job, sites)
    assert (promise.honest, promise.least_answers) == (honest, least)


def test_the_promise_is_what_the_sites_of_a_job_work_out_themselves() -> None:
    for overrides in (
        ["secure_aggregation={bits=20}"],
        ["secure_aggregation={groups=3,colluders=0,bits=20}", "robust.reduce=median"],
        ["secure_aggregation={dropouts=3,bits=20}", "cohort.size=12"],
        ["secure_aggregation={dropouts=3,graph='regular',colluders=2,bits=20}", "cohort.minimum=40"],
    ):
        shares = "placement='distributed',shares='skellam',noise_multiplier=3.0,delta=1e-3,clip_norm=0.5"
        rest = ["privacy.record=none", "strategy.weighting=equal", f"privacy.client={{{shares}}}"]
        job = load_job(scenario_path("hospitals"), [*overrides, *rest])
        sums = SecureSum.make(job, sites=50, layout=Layout(31))
        assert sums.distributed is not None
        planned = sums.distributed.event(count=1, rng="os").as_dict()
        promise = promising(job.toml.decode(), 50)
        assert {**planned, **promise.event()} == planned
        assert list(promise.differences(planned)) == []
        assert promise.shape == sums.shape


def state(key: str, value: object, site: str | None = "bank-b") -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        summary = run.read("summary.json")
        (summary if site is None else summary["sites"][site])[key] = value
        run.write("summary.json", summary)

    return tamper


def claim_of_sums(key: str, value: object) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        run.write("summary.json", {**run.read("summary.json"), "secure_aggregation": {**SUMS, key: value}})

    return tamper


def change_participants(change: Callable[[dict[str, Any]], Any]) -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        record = run.read("participants.json")
        change(record)
        run.write("participants.json", record)

    return tamper


def leave_one_out_of_the_participants(run: Run) -> None:
    run.convene({site: key for site, key in run.read("roster.json")["sites"].items() if site != "bank-b"})


def add_a_participant_of_ones_own(run: Run) -> None:
    key = IdentityKey.create(run.path / "private" / "ghost" / "identity.pem").public_hex
    run.convene({**run.read("roster.json")["sites"], "ghost": key})


def give_a_participant_another_key(run: Run) -> None:
    (run.path / "private" / "bank-b" / "identity.pem").unlink()
    key = IdentityKey.create(run.path / "private" / "bank-b" / "identity.pem").public_hex
    run.convene({**run.read("roster.json")["sites"], "bank-b": key})


@pytest.mark.parametrize("kind", ["record, securely", "shares", "both, shares"])
@pytest.mark.parametrize(
    ("tamper", "site", "why"),
    [
        (claim_of_sums("hidden_among", 4), None, "claims hidden_among 4 of its secure sums, job.toml makes it 3"),
        (claim_of_sums("colluders", 1), None, "claims colluders 1 of its secure sums"),
        (claim_of_sums("threshold", 3), None, "claims threshold 3"),
        (claim_of_sums("reduce", "median"), None, "claims reduce 'median'"),
        (state("secure_aggregation", [], None), None, ""),
        (remove("participants.json"), None, "the roster cannot be read"),
        (change_participants(lambda record: record["signatures"].pop("bank-b")), None, "bank-b has not signed it"),
        (change_participants(lambda record: record["body"].update(version=2)), None, "signature is not over this"),
        (leave_one_out_of_the_participants, "bank-b", "keeps a ledger, but participants.json leaves it out"),
        (add_a_participant_of_ones_own, "ghost", "is in participants.json, but not in the roster"),
        (give_a_participant_another_key, "bank-b", "has another key in participants.json than in the roster"),
        (in_every_line("metrics.jsonl", lambda line: line["contributors"].remove("bank-b")), None,
         "round 1 counts 2 updates, its job needs 3"),
    ],
)  # fmt: skip
def test_what_a_run_says_of_its_secure_sums_is_held_against_its_job_and_its_participants(
    copy: Copies, kind: str, tamper: Callable[[Run], None], site: str | None, why: str
) -> None:
    run = copy(kind)
    tamper(run)
    audit = audit_run(run.path)
    strictly_json(audit)
    assert not why or found(audit, site, None, why), [str(finding) for finding in audit.findings]


@pytest.mark.parametrize(("kind", "claimed"), [("shares", "add_or_remove_one"), ("both, shares", "zero_out")])
def test_the_adjacency_is_the_records_or_else_that_of_the_shares(copy: Copies, kind: str, claimed: str) -> None:
    run = copy(kind)
    state("adjacency", claimed, None)(run)
    assert found(audit_run(run.path), None, None, f"claims adjacency '{claimed}', the events say")


def test_a_run_without_secure_aggregation_claims_none(copy: Copies) -> None:
    run = copy("record")
    state("secure_aggregation", SUMS, None)(run)
    assert found(audit_run(run.path), None, None, "claims secure aggregation; job.toml asks for none")


def test_sums_that_no_site_would_have_agreed_to_are_a_finding(tmp_path: Path) -> None:
    kind = Kind(SHARED.toml.replace("colluders = 0", "colluders = 1"), SHARED.at_sites)
    audit = audit_run(begin(tmp_path / "run", kind).path)
    assert any("at least 4 sites are needed" in finding.why for finding in audit.findings)
    broken = Kind(SHARED.toml.replace("groups = 1", "groups = 0"), SHARED.at_sites)
    audit = audit_run(begin(tmp_path / "broken", broken).path)
    assert any("groups must be 1 or more" in finding.why for finding in audit.findings)


@pytest.mark.parametrize(("kind", "victim"), [("record", "bank-b"), ("central", SERVER)])
def test_a_delta_that_allows_to_publish_somebody_outright_is_a_finding(tmp_path: Path, kind: str, victim: str) -> None:
    run = resigned(tmp_path / "run", KINDS[kind], victim, lambda body: None, rows=10**5)
    assert found(audit_run(run.path), victim, 1, "delta 1e-05 is not below 1/100000")


def test_a_site_that_plans_what_its_job_leaves_to_the_server_shows(copy: Copies) -> None:
    run = copy("central")
    key = IdentityKey.create(run.path / "private" / "bank-b" / "identity.pem")
    run.write("roster.json", {**run.read("roster.json"), "sites": {"bank-b": key.public_hex}})
    site = Run(run.path, CENTRAL, "bank-b")
    site.open()
    site.sign("plan", a_plan(run, job=run.job))
    assert found(audit_run(run.path), "bank-b", 1, "plans a job that protects nothing here")


def test_a_model_made_for_one_site_shows_in_that_site_s_ledger(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.play(1)
    run.budget().reserve(job=run.job, round_number=1, model="9" * 64, witness=None)
    assert found(audit_run(run.path), "bank-b", 4, "was given another model than the others in round 1")


def test_an_opening_that_names_another_key_was_copied_from_another_ledger(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.ledger().unlink()
    run.sign("open", {"public_key": run.pinned("bank-a"), "rows": 100, "simulation": False, "dataset": "records"})
    assert found(audit_run(run.path), "bank-b", 0, "names another key than the roster")


@pytest.mark.parametrize(("method", "low"), [("PLD", 0.9), ("RDP", 1e3)])
def test_a_figure_below_the_proven_interval_is_a_finding(
    run: Run, method: str, low: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No honest run shows it: a fault of one of the accountants has to be put in.
    cost = run.cost("bank-b")
    lower = (cost + 0.01) if method == "PLD" else low
    monkeypatch.setattr(privacy.audit, "bounds", lambda events, delta: Bounds(lower, lower, lower))
    assert found(audit_run(run.path), "bank-b", None, f"{method} (")
    monkeypatch.setattr(privacy.audit, "bounds", lambda events, delta: Bounds(cost, cost, cost))
    assert audit_run(run.path).ok
    monkeypatch.setattr(privacy.audit, "bounds", lambda events, delta: None)
    assert audit_run(run.path).ok


def test_a_plan_written_after_its_reservations_excuses_nothing(run: Run) -> None:
    run.sign("reserve", reservation(run, job="f" * 64))
    run.sign("plan", a_plan(run))
    run.conclude()
    assert found(audit_run(run.path), "bank-b", 8, "reserves a round of a job that was never planned")


def test_seeded_noise_outside_a_simulation_makes_epsilon_infinite(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", event=dataclasses.replace(EVENT, rng="seeded-simulation"))
    run.play(1)
    run.conclude()
    audit = audit_run(run.path)
    for site in SITES:
        assert found(audit, site, None, "noise was seeded outside a simulation: epsilon is infinite")
    assert audit.as_dict()["epsilon"]["record"] is None


def test_spending_without_a_stated_delta_cannot_be_recomputed_and_says_so(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.ledger().unlink()
    run.sign("open", OPEN)
    events = [EVENT.as_dict()]
    run.sign("reserve", {"job": JOB, "round": 1, "model": "1" * 64, "witness": None, "events": events})
    run.write("summary.json", {"rounds": 0, "job_hash": JOB, "sites": {}, "epsilon": {"record": None}})
    assert found(audit_run(run.path), "bank-b", None, "no plan or claim states a delta")


def cut_every_ledger_back_to_round_1(run: Run) -> None:
    """Without a key: what is left is a run that was honest up to there, under a job of three rounds."""
    for site in SITES:
        run.ledger(site).write_bytes(b"".join(lines_of(run.ledger(site))[:4]))
    for name in ("heads.jsonl", "metrics.jsonl"):
        run.write_lines(name, run.lines(name)[:1])
    run.conclude()


def promise_more_in_the_job(run: Run) -> None:
    toml = TOML.replace(b"epsilon = 8.0", b"epsilon = 0.01")
    (run.path / "job.toml").write_bytes(toml)
    summary = run.read("summary.json")
    run.write("summary.json", {**summary, "job_hash": hashlib.sha256(toml).hexdigest()})


def leave_out_a_site(run: Run) -> None:
    run.ledger().unlink()
    roster, summary = run.read("roster.json"), run.read("summary.json")
    del roster["sites"]["bank-b"], summary["sites"]["bank-b"]
    run.write("roster.json", roster)
    run.write("summary.json", summary)
    rounds = run.lines("metrics.jsonl")
    for line in rounds:
        line["contributors"].remove("bank-b")
        del line["epsilon"]["bank-b"]
    run.write_lines("metrics.jsonl", rounds)


def hide_a_round_of_a_site(run: Run) -> None:
    rounds = run.lines("metrics.jsonl")
    rounds[1]["contributors"].remove("bank-b")
    run.write_lines("metrics.jsonl", rounds)


def invent_a_site(run: Run) -> None:
    summary = run.read("summary.json")
    summary["sites"]["mayo"] = {"epsilon": 0.1, "delta": 1e-9}
    run.write("summary.json", summary)


@pytest.mark.parametrize(
    ("forge", "site", "why"),
    [
        (cut_every_ledger_back_to_round_1, None, "claims 1 rounds, its job has 3"),
        (promise_more_in_the_job, "bank-b", "no plan for the job in job.toml"),
        (leave_out_a_site, "bank-b", "named in heads.jsonl, but not in the roster"),
        (hide_a_round_of_a_site, "bank-b", "commits round 2, of which metrics.jsonl knows nothing"),
        (invent_a_site, "mayo", "not in the roster"),
        (state("delta", 1e-9), "bank-b", "claims delta"),
        (state("noise_multiplier", 50.0), "bank-b", "claims noise_multiplier"),
        (state("sampling_rate", 0.01), "bank-b", "claims sampling_rate"),
        (state("steps", 1), "bank-b", "claims steps"),
        (state("train_rows", 10**6), "bank-b", "claims train_rows"),
        (state("epsilon_rdp", 0.1), "bank-b", "claims by RDP"),
        (state("noise", "seeded-simulation", None), None, "claims noise"),
        (state("adjacency", "replace_one", None), None, "claims adjacency"),
        (state("epsilon", {"record": 1.0, "client": 0.5}, None), None, "client-level epsilon"),
    ],
)
def test_no_one_without_the_sites_keys_makes_a_run_look_more_private(
    forge: Callable[[Run], None], site: str | None, why: str, run: Run
) -> None:
    forge(run)
    audit = audit_run(run.path)
    assert not audit.ok
    assert any(f.site == site and why in f.why for f in audit.findings)


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "", "-x", "a" * 65])
def test_a_roster_never_leads_out_of_the_folder(name: str, run: Run) -> None:
    run.write("roster.json", {"v": 1, "sites": {name: "0" * 64}})
    assert found(audit_run(run.path), None, None, "one that is no name")


def test_a_run_s_claim_is_checked_also_when_a_site_released_nothing(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.play_all(("bank-a", "bank-b"))
    run.conclude()
    assert audit_run(run.path).ok
    claim(None, lambda eps: eps / 2)(run)
    assert found(audit_run(run.path), None, None, "the run claims epsilon")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([10**400, -(10**400), 1e-300, 1e300, 2**70, "bank-b", JOB, "", "../bank-a", "a\0b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["heads", "bank-b", "rate", "scheme", "epsilon"]), inner, max_size=3)
    ),
    max_leaves=4,
)
BODIES: dict[str, Body] = {
    "open": lambda run: OPEN,
    "budget": lambda run: {"purpose": None, "unit": "client", "epsilon": 1.0, "delta": DELTA},
    "plan": a_plan,
    "reserve": lambda run: reservation(run, round=3, witness=digest_of(run.lines("heads.jsonl")[1])),
    "commit": a_commit,
    "settle": lambda run: {"job": run.job},
}


def strictly_json(audit: Audit) -> None:
    """Whatever was found, it can be printed for people and for machines."""
    json.dumps(audit.as_dict(), allow_nan=False)
    assert all(str(finding) for finding in audit.findings)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(sorted(BODIES)), victim=st.sampled_from(["bank-b", SERVER]), data=st.data())
def test_a_signed_body_of_any_shape_is_a_finding_and_never_an_exception(
    pristine: Run, tmp_path_factory: pytest.TempPathFactory, kind: str, victim: str, data: st.DataObject
) -> None:
    run = Run(tmp_path_factory.mktemp("signed") / "run", pristine.kind, victim)
    shutil.copytree(pristine.path, run.path)
    body: Any = json.loads(json.dumps(BODIES[kind](run)))
    place, key = body, data.draw(st.sampled_from(sorted(body)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 3)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(json_values)
    run.sign(kind, body)
    audit = audit_run(run.path)
    strictly_json(audit)
    # A budget, a plan of a job that never ran and this job's settlement are not wrong; all else is one entry too many.
    assert not audit.ok or kind in ("budget", "plan", "settle")


UNSIGNED = ["job.toml", "roster.json", "summary.json", "metrics.jsonl", "heads.jsonl"]
FILES = [*UNSIGNED, "ledgers/bank-b.jsonl", "server.jsonl"]
JUNK = [
    b"",
    b"\n",
    b"\n\n",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"null",
    b"true",
    b"0",
    b"1e999",
    b"NaN",
    b'"x"',
    b"[]",
    b"[1]",
    b"{}",
    b"{}\n{}\n",
    b'{"sites": 5}',
    b'{"sites": []}',
    b'{"sites": {}}',
    b'{"sites": {"bank-b": 5}}',
    b'{"sites": {"bank-b": null}}',
    b'{"sites": {"bank-b": ""}}',
    b'{"sites": {"bank-b": "zz"}}',
    b'{"sites": {"a/b": "00"}}',
    b'{"sites": {"a\\u0000b": "00"}}',
    b'{"sites": {"' + b"n" * 5000 + b'": "00"}}',
    b'{"round": NaN, "heads": {"bank-b": [3, "x"]}, "contributors": ["bank-b"]}',
    b'{"round": [], "heads": [], "contributors": 5, "epsilon": 5}',
    b'{"round": 1, "heads": null, "contributors": null, "epsilon": "bank-b"}',
    b'{"round": 1, "heads": {"bank-b": 5}, "contributors": [5, null], "epsilon": ["bank-b"]}',
    b'{"round": 1, "heads": {"bank-b": [1.0, "x"]}, "contributors": [["bank-b"]]}',
    b'{"round": 1, "heads": {"bank-b": ["3", "x"]}, "contributors": {"bank-b": 1}}',
    b'{"round": 1, "heads": {"bank-b": [3]}, "epsilon": {"bank-b": {}}, "contributors": ["bank-b"]}',
    b'{"round": "1", "epsilon": {"bank-b": 1' + b"0" * 400 + b"}}",
    b'{"epsilon": [], "sites": {"bank-b": [], "bank-a": {"epsilon": {}, "delta": []}}, "rounds": {}}',
    b'{"epsilon": {"record": 1' + b"0" * 400 + b'}, "sites": [], "job_hash": 5}',
    b"[" * 100_000,
    b'{"sites":' * 100_000,
    b"9" * 5000,
    b"privacy = 5",
    b"privacy = []",
    b"[privacy.record]\nepsilon = " + b"9" * 5000,
    b"x = " + b"[" * 50_000,
    b"privacy.record = 1979-13-01",
    b"privacy.client = 5",
    b"[privacy.client]\nplacement = 5",
    b"cohort = 5\n[training]\nrounds = 3\n[privacy.client]\ndelta = 1e-5",
    b'{"server": 5}',
    b'{"sites": {}, "server": "zz"}',
    b'{"round": 1, "heads": {}, "server": 5, "contributors": []}',
    b'{"round": 1, "heads": {}, "server": ["3", null], "contributors": [], "epsilon_client": "x"}',
    b'{"epsilon": {"client": 5}, "sites": {"bank-b": {"client": 5}}, "client": 5}',
    b'{"epsilon": {}, "sites": {"bank-b": {"client": []}}, "client": {"epsilon": {}, "delta": "x"}}',
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_junk_is_a_finding_and_never_an_exception(copy: Copies, name: str) -> None:
    run = copy("both")
    for junk in JUNK if name in UNSIGNED else JUNK[::4]:  # To a ledger all of it is no entry.
        (run.path / name).write_bytes(junk)
        audit = audit_run(run.path)
        strictly_json(audit)
        assert not audit.ok, junk[:99]


@pytest.mark.parametrize("name", [name for name in FILES if name != "job.toml"])
def test_a_folder_in_the_place_of_a_file_is_a_finding(copy: Copies, name: str) -> None:
    run = copy("both")
    (run.path / name).unlink()
    (run.path / name).mkdir()
    assert not audit_run(run.path).ok


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(["roster.json", "summary.json", "metrics.jsonl", "heads.jsonl"]), data=st.data())
def test_any_value_anywhere_in_the_unsigned_files_never_raises(
    pristine: Run, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    run = Run(tmp_path_factory.mktemp("values") / "run", pristine.kind)
    shutil.copytree(pristine.path, run.path)
    jsonl = name.endswith("l")
    records: Any = run.lines(name) if jsonl else [run.read(name)]
    place: Any = records
    key: Any = data.draw(st.sampled_from(range(len(records))))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 3)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(json_values)
    if jsonl:
        run.write_lines(name, records)
    else:
        run.write(name, records[0])
    strictly_json(audit_run(run.path))


def vouched(files: Mapping[str, bytes]) -> object:
    """What the audit vouches for in the files that nobody signs, as far as their bytes still say it."""
    summary, rounds = json.loads(files["summary.json"]), [json.loads(x) for x in files["metrics.jsonl"].splitlines()]
    roster = json.loads(files["roster.json"])
    return (
        files["job.toml"],
        {site: key.lower() for site, key in {**roster["sites"], SERVER: roster["server"]}.items()},
        [json.loads(line) for line in files["heads.jsonl"].splitlines()],
        summary["rounds"],
        summary["job_hash"],
        {unit: round(figure, 2) for unit, figure in summary["epsilon"].items()},
        {site: round(summary["sites"][site]["epsilon"], 2) for site in SITES},
        round(summary["client"]["epsilon"], 2),
        len(rounds),
    )


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from([*FILES, "ledgers/bank-a.jsonl"]), position=st.integers(0), mask=st.integers(1, 255))
def test_a_flip_of_any_byte_of_any_file_is_found_or_changes_nothing_that_the_audit_vouches_for(
    pristine: Run, tmp_path_factory: pytest.TempPathFactory, name: str, position: int, mask: int
) -> None:
    run = Run(tmp_path_factory.mktemp("flip") / "run", pristine.kind)
    shutil.copytree(pristine.path, run.path, ignore=shutil.ignore_patterns("private"))
    content = bytearray((run.path / name).read_bytes())
    position %= len(content)
    content[position] ^= mask
    (run.path / name).write_bytes(content)
    audit = audit_run(run.path)
    strictly_json(audit)
    if name not in UNSIGNED:
        line = content[:position].count(b"\n")
        assert found(audit, SERVER if name == "server.jsonl" else Path(name).stem, line, ""), audit.findings
    if audit.ok:
        after, before = ({n: (r.path / n).read_bytes() for n in UNSIGNED} for r in (run, pristine))
        assert vouched(after) == vouched(before)
