"""`fedchorus budget` shows what a verified ledger's own rules say, and writes only under the ledger's own key."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

import privacy.commands
from privacy.accountant import epsilon_pld
from privacy.budget import Filter, Limit, SiteBudget
from privacy.errors import FedchorusError, LedgerError, RunError, UnsupportedEvent
from privacy.events import UNIT_CLIENT, UNIT_RECORD, Event, GaussianEvent, repeated
from privacy.keys import IdentityKey
from privacy.ledger import SERVER, Ledger, read_ledger

DELTA, JOB, OTHER_JOB = 1e-5, "ab" * 32, "ac" * 32
EVENT = GaussianEvent(noise_multiplier=20.0, clip_norm=1.0, sampling_rate=1.0, count=4, rng="os")
CLIENT = GaussianEvent(unit=UNIT_CLIENT, noise_multiplier=10.0, clip_norm=1.0, sampling_rate=1.0, count=1, rng="os")
ONE_EVENT = "20,1,4"  # EVENT, as --planned has it.

app = typer.Typer()
privacy.commands.add_to(app)


def cost(rounds: int, event: Event = EVENT, delta: float = DELTA) -> float:
    return epsilon_pld(repeated(event, rounds), delta)


class Run:
    """A run's folder: two sites and a server, each with a ledger and a key of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = {
            **{site: path / "ledgers" / f"{site}.jsonl" for site in ("east", "west")},
            SERVER: path / "server.jsonl",
        }
        self.pem = {name: path / "private" / name / "identity.pem" for name in self.files}
        self.keys = {name: IdentityKey.create(pem) for name, pem in self.pem.items()}
        public = {name: key.public_hex for name, key in self.keys.items()}
        server = public.pop(SERVER)
        (path / "roster.json").write_text(json.dumps({"v": 1, "sites": public, "server": server}))

    def budget(self, name: str = "east") -> SiteBudget:
        budget = SiteBudget(Ledger(self.files[name], name, self.keys[name]))
        budget.open(rows=100, simulation=False)
        return budget

    def kinds(self, name: str = "east") -> list[str]:
        return [entry.kind for entry in read_ledger(self.files[name], name, self.keys[name].public_hex)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """East plans 5 rounds and reserved 2; the server releases for clients; west was never asked."""
    run = Run(tmp_path)
    east = run.budget()
    east.plan(job=JOB, events=[EVENT], rounds=5, limits=[Limit(epsilon=9.0, delta=DELTA)])
    for number in (1, 2):
        east.reserve(job=JOB, round_number=number, model="1" * 64, witness=None)
    server = run.budget(SERVER)
    server.plan(job=JOB, events=[CLIENT], rounds=3, limits=[Limit(unit=UNIT_CLIENT, epsilon=None, delta=1e-6)])
    return run


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["budget", *map(str, arguments)])


def ledgers(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The machine-readable statements, by ledger."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    parsed = json.loads(result.stdout)
    assert parsed["ok"] is (code == 0)
    return {statement["site"]: statement for statement in parsed["ledgers"]}


def error(kind: type[FedchorusError], *arguments: object) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, kind), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def line(statement: dict[str, Any], purpose: str | None = None, unit: str = UNIT_RECORD) -> dict[str, Any]:
    (found,) = [each for each in statement["budgets"] if (each["purpose"], each["unit"]) == (purpose, unit)]
    return dict(found)


class TestShowing:
    def test_each_ledger_of_a_run_with_what_is_spent_and_set_aside_together(self, run: Run) -> None:
        shown = ledgers(run.path)
        assert set(shown) == {"east", SERVER}  # West has written nothing.
        for purpose in (None, "training"):
            assert line(shown["east"], purpose) == {
                "unit": "record",
                "purpose": purpose,
                "limit": None,
                "delta": DELTA,
                "spent": cost(2),
                "with_set_aside": cost(5),
                "left": None,
            }
        assert line(shown[SERVER], unit=UNIT_CLIENT)["spent"] == 0
        assert line(shown[SERVER], unit=UNIT_CLIENT)["with_set_aside"] == cost(3, CLIENT, 1e-6)

    def test_what_a_budget_leaves(self, run: Run) -> None:
        run.budget().set_budget(Limit(epsilon=4.0, delta=1e-6))
        run.budget().set_budget(Limit(epsilon=0.5, delta=DELTA), purpose="statistics")
        shown = ledgers(run.path)["east"]
        assert line(shown)["limit"] == 4.0
        assert line(shown)["delta"] == 1e-6
        assert line(shown)["spent"] == cost(2, delta=1e-6)
        assert line(shown)["left"] == pytest.approx(4.0 - cost(5, delta=1e-6))
        assert line(shown, "statistics")["left"] == 0.5
        run.budget().set_budget(Limit(epsilon=0.1, delta=DELTA))
        assert line(ledgers(run.path)["east"])["left"] == 0  # Lowered beneath what is spent.

    def test_jobs_and_their_state(self, run: Run) -> None:
        budget = run.budget()
        budget.plan_adaptive(
            job=OTHER_JOB, rounds=7, bound=Filter(order=8, rdp=1.0), limits=[Limit(epsilon=None, delta=DELTA)]
        )
        budget.settle(JOB)
        first, second = ledgers(run.path)["east"]["jobs"]
        assert (first["job"], first["state"], first["reserved"], first["rounds"]) == (JOB, "settled", 2, 5)
        assert first["limits"] == [{"unit": "record", "epsilon": 9.0, "delta": DELTA, "spent": cost(2)}]
        assert (second["job"], second["state"], second["reserved"]) == (OTHER_JOB, "under way", 0)

    def test_what_nobody_can_state_is_no_number(self, run: Run) -> None:
        run.budget().set_budget(Limit(unit=UNIT_CLIENT, epsilon=4.0, delta=DELTA))
        shown = line(ledgers(run.path)["east"], unit=UNIT_CLIENT)
        assert (shown["spent"], shown["with_set_aside"], shown["left"]) == (None, None, 0.0)
        assert "unbounded" in invoke(run.path).stdout

    def test_one_ledger_by_its_roster_or_by_a_key(self, run: Run, tmp_path: Path) -> None:
        assert ledgers(run.files["east"]) == {"east": ledgers(run.path)["east"]}
        assert ledgers(run.files[SERVER]) == {SERVER: ledgers(run.path)[SERVER]}
        alone = tmp_path / "a" / "b" / "copy.jsonl"
        alone.parent.mkdir(parents=True)
        alone.write_bytes(run.files["east"].read_bytes())
        assert ledgers(alone, "--key", run.keys["east"].public_hex) == ledgers(run.files["east"])
        assert "no roster beside it names east" in error(RunError, alone)

    def test_a_table_for_people_with_the_same_figures(self, run: Run) -> None:
        run.budget().set_budget(Limit(epsilon=4.0, delta=DELTA))
        text = invoke(run.path, "--planned", f"{ONE_EVENT},3").stdout
        assert "east: every entry verified (5)" in text
        for figure in (4.0 - cost(5), cost(2), cost(5), cost(8)):
            assert f"{figure:.4f}" in text
        for word in ("with set aside", "(all)", "training", JOB[:12], "under way", "2 of 5", "rounds that fit"):
            assert word in text

    def test_a_run_that_wrote_no_ledger_says_so(self, tmp_path: Path) -> None:
        Run(tmp_path)
        assert "no ledger has been written yet" in invoke(tmp_path).stdout


class TestPlanned:
    def test_a_job_is_composed_with_what_is_spent_and_not_added(self, run: Run) -> None:
        run.budget().set_budget(Limit(epsilon=cost(9), delta=DELTA))
        (planned,) = ledgers(run.path, "--planned", f"{ONE_EVENT},10")["east"]["planned"]
        assert planned["rounds_that_fit"] == 4
        overall = planned["together"][0]
        assert (overall["purpose"], overall["epsilon"], overall["limit"]) == (None, cost(15), cost(9))
        assert overall["epsilon"] < cost(5) + cost(10)
        assert run.kinds() == ["open", "plan", "reserve", "reserve", "budget"]  # Nothing was planned in earnest.

    def test_each_is_on_top_of_those_before_it(self, run: Run) -> None:
        run.budget().set_budget(Limit(epsilon=cost(9), delta=DELTA))
        options = ["--planned", f"{ONE_EVENT},3", "--planned", f"{ONE_EVENT},3"]
        first, second = ledgers(run.path, *options)["east"]["planned"]
        assert (first["rounds_that_fit"], first["together"][0]["epsilon"]) == (3, cost(8))
        assert (second["rounds_that_fit"], second["together"][0]["epsilon"]) == (1, cost(11))

    def test_only_the_budgets_of_its_purpose_and_of_all_bind_it(self, run: Run) -> None:
        run.budget().set_budget(Limit(epsilon=cost(5), delta=DELTA), purpose="training")
        for purpose, fits in (("training", 0), ("statistics", 10)):
            options = ["--planned", f"{ONE_EVENT},10", "--purpose", purpose]
            (planned,) = ledgers(run.path, *options)["east"]["planned"]
            assert planned["rounds_that_fit"] == fits
            assert [each["purpose"] for each in planned["together"]] == [None, purpose]

    def test_whole_clients_can_be_asked_about_too(self, run: Run) -> None:
        options = ["--planned", "10,1,1,2", "--unit", "client"]
        (planned,) = ledgers(run.path, *options)[SERVER]["planned"]
        (overall, _) = [each for each in planned["together"] if each["unit"] == UNIT_CLIENT]
        assert (planned["rounds_that_fit"], overall["epsilon"]) == (2, cost(5, CLIENT, 1e-6))

    @pytest.mark.parametrize(
        "text",
        [
            *["", "1", "1,2,3", "1,0.1,5,3,1", "a,0.1,5,3", "1,0.1,5.5,3", "1,0.1,5,0", "1,0.1,5,2.5"],
            *["nan,0.1,5,3", "-1,0.1,5,3", "1,0,5,3", "1,1.5,5,3", "1,0.1,0,3", "1,0.1,inf,3"],
        ],
    )
    def test_a_malformed_job_is_refused(self, run: Run, text: str) -> None:
        error(UnsupportedEvent, run.path, f"--planned={text}")


class TestWriting:
    @pytest.mark.parametrize("text", ["3", "none", "3,", "none,", "nonsense,1e-6", "3,1e-6,1"])
    def test_a_half_given_budget_is_shown_as_it_was_given(self, run: Run, text: str) -> None:
        said = error(UnsupportedEvent, run.path, "--set", text, "--identity", run.pem["east"])
        assert said.startswith("--set: expected EPSILON,DELTA, got '")
        assert run.kinds()[-1] != "budget"

    def test_sets_a_budget_under_the_ledger_s_own_key(self, run: Run) -> None:
        shown = ledgers(run.path, "--set", "3.5,1e-6", "--identity", run.pem["east"])
        assert line(shown["east"])["limit"] == 3.5
        assert run.kinds()[-1] == "budget"
        assert run.budget().accounts().budgets == {(None, UNIT_RECORD): Limit(epsilon=3.5, delta=1e-6)}
        assert run.kinds(SERVER) == ["open", "plan"]

    def test_for_one_unit_and_purpose_where_asked(self, run: Run) -> None:
        options = ["--set", "2,1e-6", "--unit", "client", "--purpose", "training", "--identity", run.pem[SERVER]]
        assert line(ledgers(run.path, *options)[SERVER], "training", UNIT_CLIENT)["limit"] == 2
        limit = Limit(unit=UNIT_CLIENT, epsilon=2.0, delta=1e-6)
        assert run.budget(SERVER).accounts().budgets == {("training", UNIT_CLIENT): limit}

    def test_lifts_a_budget(self, run: Run) -> None:
        run.budget().set_budget(Limit(epsilon=0.1, delta=DELTA))
        shown = ledgers(run.files["east"], "--set", "none,1e-5", "--identity", run.pem["east"])
        assert line(shown["east"])["limit"] is None

    def test_settles_a_job_by_the_beginning_of_its_hash(self, run: Run) -> None:
        shown = ledgers(run.path, "--settle", JOB[:2], "--identity", run.pem["east"])["east"]
        assert shown["jobs"][0]["state"] == "settled"
        assert line(shown)["with_set_aside"] == cost(2)
        assert run.kinds()[-1] == "settle"
        ledgers(run.path, "--settle", JOB, "--identity", run.pem["east"])  # Once more changes nothing.
        assert run.kinds().count("settle") == 1

    @pytest.mark.parametrize("prefix", ["a", "ff", JOB + "0", ""])
    def test_a_beginning_that_names_no_job_or_two_is_refused(self, run: Run, prefix: str) -> None:
        run.budget().plan(job=OTHER_JOB, events=[EVENT], rounds=1, limits=[Limit(epsilon=None, delta=DELTA)])
        before = run.files["east"].read_bytes()
        options = ["--settle", prefix, "--set", "1,1e-5", "--identity", run.pem["east"]]
        assert f"jobs begin with {prefix!r}" in error(LedgerError, run.path, *options)
        assert run.files["east"].read_bytes() == before

    @pytest.mark.parametrize("act", [["--set", "3,1e-5"], ["--settle", JOB]])
    def test_a_key_that_is_not_the_ledger_s_is_refused_by_name(self, run: Run, tmp_path: Path, act: list[str]) -> None:
        before = run.files["east"].read_bytes()
        stranger = IdentityKey.create(tmp_path / "stranger.pem")
        refused = error(LedgerError, run.path, *act, "--identity", tmp_path / "stranger.pem")
        assert str(tmp_path / "stranger.pem") in refused
        assert stranger.public_hex[:16] in refused
        for name in ("east", SERVER):
            assert f"{name}'s ({run.keys[name].public_hex[:16]}...)" in refused
        # Another's key, however honest, where one ledger was named.
        refused = error(LedgerError, run.files["east"], *act, "--identity", run.pem[SERVER])
        assert f"is not east's ({run.keys['east'].public_hex[:16]}...)" in refused
        assert "--identity" in error(LedgerError, run.path, *act)
        assert run.files["east"].read_bytes() == before

    def test_a_ledger_that_is_not_what_was_signed_is_never_continued(self, run: Run) -> None:
        damaged = run.files["east"].read_bytes().replace(b'"rows":100', b'"rows":101')
        run.files["east"].write_bytes(damaged)
        refused = error(LedgerError, run.path, "--set", "3,1e-5", "--identity", run.pem["east"])
        assert "entry 0: its hash does not match" in refused
        assert run.files["east"].read_bytes() == damaged

    def test_nor_one_that_has_not_begun(self, run: Run) -> None:
        run.files["west"].write_bytes(b"")
        refused = error(LedgerError, run.path, "--set", "3,1e-5", "--identity", run.pem["west"])
        assert "the site's first job opens it" in refused

    @pytest.mark.parametrize(
        "text",
        [
            *["", "3", "3,1e-5,1", "none", "none,none", "x,1e-5", "0,1e-5", "-1,1e-5", "inf,1e-5", "nan,1e-5"],
            *["3,0", "3,1", "3,-1e-5", "3,nan"],
        ],
    )
    def test_a_malformed_budget_is_refused_and_writes_nothing(self, run: Run, text: str) -> None:
        before = run.files["east"].read_bytes()
        error(UnsupportedEvent, run.path, f"--set={text}", "--identity", run.pem["east"])
        error(UnsupportedEvent, run.path, "--set=1,1e-5", "--unit", "user", "--identity", run.pem["east"])
        assert run.files["east"].read_bytes() == before


class TestVerifying:
    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda data: data.replace(b'"rounds":5', b'"rounds":6'), "entry 1: its hash does not match"),
            (lambda data: b"".join(data.splitlines(keepends=True)[1:]), "entry 0: it carries number 1"),
            (lambda data: b"".join(data.splitlines(keepends=True)[:2]) + b"{}\n", "entry 2"),
        ],
    )
    def test_a_ledger_that_was_changed_is_named_and_the_others_are_shown(self, run: Run, damage: Any, why: str) -> None:
        run.files["east"].write_bytes(damage(run.files["east"].read_bytes()))
        shown = ledgers(run.path, code=1)
        assert shown[SERVER]["ok"]
        assert (shown["east"]["ok"], set(shown["east"])) == (False, {"site", "ok", "why"})  # No figure to believe.
        assert f"ledger of east, {why}" in shown["east"]["why"]
        result = invoke(run.path)
        assert result.exit_code == 1
        assert f"NOT OK: ledger of east, {why}" in result.stdout
        assert f"{SERVER}: every entry verified" in result.stdout

    def test_a_ledger_signed_by_another_than_the_pinned_key_is_refused(self, run: Run) -> None:
        shown = ledgers(run.files["east"], "--key", run.keys["west"].public_hex, code=1)
        assert "its signature is not by east's key" in shown["east"]["why"]

    @pytest.mark.parametrize(
        "body",
        [
            {"job": JOB, "round": 3},
            {"job": JOB, "round": 3, "events": [{**EVENT.as_dict(), "sensitivity": 0.1}]},
            {"job": JOB, "round": 3, "events": 7},
        ],
    )
    def test_what_the_site_signed_and_nobody_can_bound_is_not_shown_as_a_figure(
        self, run: Run, body: dict[str, Any]
    ) -> None:
        run.budget().ledger.append("reserve", body)
        assert not ledgers(run.path, code=1)["east"]["ok"]

    @pytest.mark.parametrize("content", [b"", b"{}\n", b"[]\n", b"not json\n", b'{"site":"../x"}\n', b'{"site":7}\n'])
    def test_a_file_that_is_no_ledger_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "file").write_bytes(content)
        assert "not a ledger" in error(LedgerError, tmp_path / "file", "--key", "00" * 32)

    @pytest.mark.parametrize(
        "roster", ["", "[]", "{}", '{"sites": {"../x": "00"}}', '{"sites": {"east": 7}}', '{"sites": ["east"]}']
    )
    def test_a_roster_that_is_none_is_refused(self, run: Run, roster: str) -> None:
        (run.path / "roster.json").write_text(roster)
        assert "roster.json" in error(RunError, run.path)

    def test_a_folder_that_is_no_run_is_refused(self, tmp_path: Path) -> None:
        assert "expected a run folder" in error(RunError, tmp_path)
        assert "expected a run folder" in error(RunError, tmp_path / "missing")
        Run(tmp_path)
        assert "--key" in error(RunError, tmp_path, "--key", "00" * 32)
