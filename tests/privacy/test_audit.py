"""The audit believes no number that a run wrote down, names the site and the entry, and survives whatever it reads."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accountant import epsilon, epsilon_pld
from privacy.audit import Audit, audit_run
from privacy.budget import SiteBudget, charged
from privacy.errors import RunError
from privacy.events import GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import Entry, Ledger, LedgerView, digest_of

SITES = ("bank-a", "bank-b", "bank-c")
DELTA, LIMIT, ROUNDS = 1e-5, 8.0, 3
TOML = b'name = "small"\n\n[training]\nrounds = 3\n\n[privacy.record]\nepsilon = 8.0\ndelta = 1e-05\n'
JOB = hashlib.sha256(TOML).hexdigest()
EVENT = GaussianEvent(
    noise_multiplier=20.0, clip_norm=1.0, sampling_rate=1.0, count=4, rng="os", discretisation_tv=1e-30
)
# Entries of each ledger: 0 open, 1 plan, then reserve and commit of each round: 2 and 3, 4 and 5, 6 and 7.


@dataclass(frozen=True)
class Run:
    """A run folder as a simulation leaves it, and the hands to tamper with it."""

    path: Path

    def ledger(self, site: str = "bank-b") -> Path:
        return self.path / "ledgers" / f"{site}.jsonl"

    def key(self, site: str = "bank-b") -> IdentityKey:
        return IdentityKey.load(self.path / "private" / site / "identity.pem")

    def budget(self, site: str = "bank-b") -> SiteBudget:
        return SiteBudget(Ledger(self.ledger(site), site, self.key(site)))

    def sign(self, kind: str, body: Mapping[str, Any], site: str = "bank-b") -> Entry:
        """What a site that does not keep to its budget's rules can sign itself."""
        return Ledger(self.ledger(site), site, self.key(site)).append(kind, body)

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_bytes())

    def write(self, name: str, record: object) -> None:
        (self.path / name).write_text(json.dumps(record))

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / name).read_bytes().splitlines()]

    def write_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        (self.path / name).write_text("".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records))

    def play(self, round_number: int, sites: tuple[str, ...] = SITES) -> None:
        """One round with everything that the server keeps of it."""
        before = self.lines("heads.jsonl")
        heads: dict[str, Any] = {**before[-1]["heads"]} if before else {}
        witness = digest_of(before[-1]) if before else None
        for site in sites:
            budget = self.budget(site)
            reservation = budget.reserve(job=JOB, round_number=round_number, model="1" * 64, witness=witness)
            heads[site] = list(budget.commit(reservation, output="2" * 64))
        line = {"round": round_number, "heads": {site: heads[site] for site in sorted(heads)}}
        self.write_lines("heads.jsonl", [*before, line])
        claims = {site: self.cost(site) for site in SITES}
        rounds = self.lines("metrics.jsonl")
        metrics = {"round": round_number, "loss": 0.25, "epsilon": claims, "contributors": list(sites), "failures": {}}
        self.write_lines("metrics.jsonl", [*rounds, metrics])

    def play_all(self, sites: tuple[str, ...] = SITES) -> None:
        for round_number in range(1, ROUNDS + 1):
            self.play(round_number, sites)

    def cost(self, site: str) -> float:
        view = LedgerView(self.ledger(site), site, self.read("roster.json")["sites"][site])
        view.refresh()
        return epsilon_pld(charged(view.entries), DELTA)

    def conclude(self) -> None:
        """Write down what the ledgers say."""
        costs = {site: self.cost(site) for site in SITES}
        self.write(
            "summary.json",
            {
                "rounds": len(self.lines("metrics.jsonl")),
                "job_hash": JOB,
                "sites": {site: {"epsilon": cost, "delta": DELTA, "rows": 100} for site, cost in costs.items()},
                "epsilon": {"record": max(costs.values()), "client": None},
            },
        )


def begin(path: Path, *, simulation: bool = False, event: GaussianEvent = EVENT, epsilon: float | None = LIMIT) -> Run:
    run = Run(path)
    path.mkdir(parents=True)
    (path / "job.toml").write_bytes(TOML)
    (path / "heads.jsonl").touch()
    (path / "metrics.jsonl").touch()
    keys = {site: IdentityKey.create(path / "private" / site / "identity.pem").public_hex for site in SITES}
    run.write("roster.json", {"v": 1, "sites": keys})
    for site in SITES:
        budget = run.budget(site)
        budget.open(rows=100, simulation=simulation)
        budget.plan(job=JOB, event=event, rounds=ROUNDS, epsilon=epsilon, delta=DELTA)
    return run


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An honest run, made once. Never changed: tests take a copy."""
    run = begin(tmp_path_factory.mktemp("audit") / "pristine")
    for round_number in range(1, ROUNDS + 1):
        run.play(round_number)
    run.conclude()
    return run


@pytest.fixture
def run(pristine: Run, tmp_path: Path) -> Run:
    shutil.copytree(pristine.path, tmp_path / "run")
    return Run(tmp_path / "run")


def found(audit: Audit, site: str | None, entry: int | None, why: str) -> bool:
    return any(f.site == site and f.entry == entry and why in f.why for f in audit.findings)


class TestAnHonestRun:
    def test_is_ok_and_its_figures_are_recomputed(self, run: Run) -> None:
        audit = audit_run(run.path)
        assert audit.findings == []
        assert audit.notices == []
        assert audit.ok
        spent = epsilon([EVENT] * ROUNDS, DELTA)
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
                        "claimed": spent.pld,
                    }
                    for site in SITES
                },
            },
        }

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
        budget.plan(job=earlier, event=EVENT, rounds=2, epsilon=epsilon_pld([EVENT] * 2, DELTA), delta=DELTA)
        for round_number in (1, 2):
            budget.reserve(job=earlier, round_number=round_number, model="1" * 64, witness=None)
        budget.plan(job=JOB, event=EVENT, rounds=ROUNDS, epsilon=LIMIT, delta=DELTA)
        run.play_all()
        run.conclude()
        audit = audit_run(run.path)
        assert audit.findings == []
        assert audit.sites["bank-b"].releases == 5 * EVENT.count  # What was spent before counts all the same.

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


def forge_the_whole_ledger_under_a_new_key(run: Run) -> None:
    """Who can write the roster can make up a site's history; what the others signed does not fit it."""
    entries = LedgerView(run.ledger(), "bank-b", run.key().public_hex)
    entries.refresh()
    key = IdentityKey.create(run.path / "forged.pem")
    run.ledger().unlink()
    forged = Ledger(run.ledger(), "bank-b", key)
    for entry in entries.entries:
        forged.append(entry.kind, entry.body)
    roster = run.read("roster.json")
    roster["sites"]["bank-b"] = key.public_hex
    run.write("roster.json", roster)


def forge_it_and_the_heads_with_it(run: Run) -> None:
    forge_the_whole_ledger_under_a_new_key(run)
    forged = LedgerView(run.ledger(), "bank-b", run.read("roster.json")["sites"]["bank-b"])
    forged.refresh()
    heads = run.lines("heads.jsonl")
    for line in heads:
        line["heads"]["bank-b"] = list(forged.entries[line["heads"]["bank-b"][0]].head)
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
    (run.path / "job.toml").write_bytes(TOML.replace(b"8.0", b"9.0"))


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
    (claim_fewer_rounds, None, None, "claims 2 rounds, its job has 3"),
    (claim_in_the_last_round, "bank-b", None, "metrics.jsonl claims epsilon"),
    (change_the_job, None, None, "job.toml is not the job that the run claims to have run"),
    (change_the_job_and_its_hash, "bank-b", None, "counted in round 1 without a committed entry"),
    (count_an_update_of_a_stranger, "bank-x", None, "is named in metrics.jsonl, but not in the roster"),
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

EVENT_FORM = EVENT.as_dict()


def reservation(**changes: Any) -> dict[str, Any]:
    return {"job": JOB, "round": 4, "model": "1" * 64, "witness": None, "event": EVENT_FORM, **changes}


def a_plan(**changes: Any) -> dict[str, Any]:
    return {"job": "f" * 64, "event": EVENT_FORM, "rounds": 1, "epsilon": LIMIT, "delta": DELTA, **changes}


def a_commit(**changes: Any) -> dict[str, Any]:
    return {"job": JOB, "round": 3, "reserve": 6, "output": "3" * 64, **changes}


SIGNED: list[tuple[str, dict[str, Any], int, str]] = [
    ("reserve", reservation(), 8, "reserves more than the plan's 3 rounds"),
    ("reserve", reservation(job="f" * 64), 8, "reserves a round of a job that was never planned"),
    ("reserve", reservation(event={**EVENT_FORM, "noise_multiplier": 200.0}), 8, "another event than its plan states"),
    ("commit", a_commit(), 8, "commits entry 6 a second time: two releases, one charge"),
    ("commit", a_commit(reserve=99), 8, "commits a release that was never reserved"),
    ("commit", a_commit(reserve=8), 8, "commits a release that was never reserved"),
    ("commit", a_commit(reserve=-2), 8, "commits a release that was never reserved"),
    ("commit", a_commit(reserve="6"), 8, "commits a release that was never reserved"),
    ("commit", a_commit(reserve=None), 8, "commits a release that was never reserved"),
    ("commit", a_commit(reserve=7), 8, "commits a release that was never reserved"),
    ("commit", a_commit(reserve=4), 8, "commits another round than entry 4 reserved"),
    ("commit", a_commit(job="f" * 64), 8, "commits another round than entry 6 reserved"),
    ("open", {"public_key": "", "rows": 1, "simulation": True}, 8, "a second opening entry"),
    ("plan", a_plan(epsilon=0.1), 8, "over its budget of 0.1"),
]


@pytest.mark.parametrize(("kind", "body", "entry", "why"), SIGNED)
def test_a_site_s_own_signature_excuses_nothing(
    run: Run, kind: str, body: dict[str, Any], entry: int, why: str
) -> None:
    run.sign(kind, body)
    run.conclude()
    audit = audit_run(run.path)
    assert found(audit, "bank-b", entry, why), [str(finding) for finding in audit.findings]
    assert not audit.sites["bank-b"].ok


def test_a_plan_written_after_its_reservations_excuses_nothing(run: Run) -> None:
    run.sign("reserve", reservation(job="f" * 64))
    run.sign("plan", a_plan())
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
    run.sign("open", {"simulation": False})
    run.sign("reserve", reservation())
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


def state(key: str, value: object, site: str | None = "bank-b") -> Callable[[Run], None]:
    def tamper(run: Run) -> None:
        summary = run.read("summary.json")
        (summary if site is None else summary["sites"][site])[key] = value
        run.write("summary.json", summary)

    return tamper


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
bodies = {"open": {"simulation": False}, "plan": a_plan(), "reserve": reservation(round=3), "commit": a_commit()}


def strictly_json(audit: Audit) -> None:
    """Whatever was found, it can be printed for people and for machines."""
    json.dumps(audit.as_dict(), allow_nan=False)
    assert all(str(finding) for finding in audit.findings)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(sorted(bodies)), data=st.data())
def test_a_signed_body_of_any_shape_is_a_finding_and_never_an_exception(
    pristine: Run, tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    run = Run(tmp_path_factory.mktemp("signed") / "run")
    shutil.copytree(pristine.path, run.path)
    body: Any = json.loads(json.dumps(bodies[kind]))
    place, key = body, data.draw(st.sampled_from(sorted(body)))
    while isinstance(place[key], dict) and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(json_values)
    run.sign(kind, body)
    audit = audit_run(run.path)
    strictly_json(audit)
    # One more plan of a job that never ran is not wrong; everything else is one entry too many.
    assert not audit.ok or kind == "plan"


FILES = ["job.toml", "roster.json", "summary.json", "metrics.jsonl", "heads.jsonl", "ledgers/bank-b.jsonl"]
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
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_junk_is_a_finding_and_never_an_exception(run: Run, name: str) -> None:
    for junk in JUNK:
        (run.path / name).write_bytes(junk)
        audit = audit_run(run.path)
        strictly_json(audit)
        assert not audit.ok, junk[:99]


@pytest.mark.parametrize("name", [name for name in FILES if name != "job.toml"])
def test_a_folder_in_the_place_of_a_file_is_a_finding(run: Run, name: str) -> None:
    (run.path / name).unlink()
    (run.path / name).mkdir()
    assert not audit_run(run.path).ok


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(["roster.json", "summary.json", "metrics.jsonl", "heads.jsonl"]), data=st.data())
def test_any_value_anywhere_in_the_unsigned_files_never_raises(
    pristine: Run, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    run = Run(tmp_path_factory.mktemp("values") / "run")
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
    sites = json.loads(files["roster.json"])["sites"]
    return (
        files["job.toml"],
        {site: key.lower() for site, key in sites.items()},
        [json.loads(line) for line in files["heads.jsonl"].splitlines()],
        summary["rounds"],
        summary["job_hash"],
        round(summary["epsilon"]["record"], 2),
        {site: round(summary["sites"][site]["epsilon"], 2) for site in SITES},
        len(rounds),
    )


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from([*FILES, "ledgers/bank-a.jsonl"]), position=st.integers(0), mask=st.integers(1, 255))
def test_a_flip_of_any_byte_of_any_file_is_found_or_changes_nothing_that_the_audit_vouches_for(
    pristine: Run, tmp_path_factory: pytest.TempPathFactory, name: str, position: int, mask: int
) -> None:
    run = Run(tmp_path_factory.mktemp("flip") / "run")
    shutil.copytree(pristine.path, run.path, ignore=shutil.ignore_patterns("private"))
    content = bytearray((run.path / name).read_bytes())
    position %= len(content)
    content[position] ^= mask
    (run.path / name).write_bytes(content)
    audit = audit_run(run.path)
    strictly_json(audit)
    if name.startswith("ledgers/"):
        line = content[:position].count(b"\n")
        assert found(audit, Path(name).stem, line, ""), audit.findings
    if audit.ok:
        assert not name.startswith("ledgers/")
        unsigned = [name for name in FILES if not name.startswith("ledgers/")]
        after, before = ({n: (r.path / n).read_bytes() for n in unsigned} for r in (run, pristine))
        assert vouched(after) == vouched(before)
