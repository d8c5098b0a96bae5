"""Break the secure sum in many ways, one at a time, and see that the tests notice each: `make mutants`.

Each mutant is a change of text in a copy of the sources. Most still give the right sum between honest parties: they
leave out what protects against the others, or hides from the server, and no functional test alone would see them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TESTS = Path("tests/privacy/secagg")
REFUSALS, SECRECY, TAMPERING, SLOW = "test_refusals", "test_secrecy", "test_tampering", "test_protocol -k slow"
PAIR = 'return _stream_secret(shared, root, b"fedchorus secagg 1 pair mask" + ids)'
SELF = 'return _stream_secret(b, root, b"fedchorus secagg 1 self mask")'


@dataclass(frozen=True)
class Mutant:
    """`changes` are (module, text, other text); `tests` the file that must fail, and what it is narrowed to."""

    what: str
    tests: str
    changes: tuple[tuple[str, str, str], ...]


def one(what: str, tests: str, module: str, text: str, other: str) -> Mutant:
    return Mutant(what, tests, ((module, text, other),))


def unchecked(what: str, tests: str, module: str, condition: str) -> Mutant:
    return one(what, tests, module, f"if {condition}:", "if False:")


MUTANTS = (
    one("pair masks from public data only", SECRECY, "masks", PAIR, PAIR.replace("shared,", "root,")),
    one("pair masks that forget the adverts", SLOW, "masks", PAIR, PAIR.replace("root,", "bytes(32),")),
    one("self masks that forget the session", SECRECY, "masks", SELF, SELF.replace("root,", "bytes(32),")),
    Mutant(
        "no self masks",
        SECRECY,
        (
            ("client", "streams = [(self_mask(secrets.blind, root), 1)]", "streams: list[tuple[bytes, int]] = []"),
            ("server", "streams.append((self_mask(self._secret(slot, self._is_blind), root), -1))", "pass"),
        ),
    ),
    Mutant(
        "no pair masks",
        SECRECY,
        (
            ("client", "for peer in secrets.sharers:", "for peer in ():"),
            ("server", "if peer in self._masked:", "if False:"),
        ),
    ),
    one("mask keys that forget the session", SLOW, "view", "derive(secret, salt=session,", "derive(secret, salt=b'',"),
    Mutant(
        "boxes that open in another view",
        f"{REFUSALS} -k different_adverts",
        (
            ("channel", 'salt=root, info=b"fedchorus secagg 1 box"', 'salt=b"", info=b"fedchorus secagg 1 box"'),
            ("client", "context=view.root,", 'context=b"",'),
            ("client", "open_sealed(key, box, context=view.root)", 'open_sealed(key, box, context=b"")'),
        ),
    ),
    Mutant(
        "both shares revealed",
        f"{SECRECY} -k revealed",
        (
            ("client", "peer: held[:SECRET] if peer in survivors else held[SECRET:]", "peer: held"),
            (
                "server",
                "shares = read.table(SECRET)",
                "shares = {p: s[:32] if p in self._masked else s[32:] for p, s in read.table(2 * SECRET).items()}",
            ),
        ),
    ),
    one("a share fewer is enough", f"{SECRECY} -k Shares", "shamir", "range(threshold - 1))", "range(threshold - 2))"),
    one(
        "thresholds of two",
        "test_session -k Shape",
        "graph",
        "return min(max(2 * holders // 3 + 1, least), most)",
        "return 2",
    ),
    one(
        "a threshold of one accepted",
        f"{REFUSALS} -k advertise",
        "session",
        "if getattr(self, field.name) != getattr(own, field.name):",
        'if field.name != "threshold" and getattr(self, field.name) != getattr(own, field.name):',
    ),
    one("terms unchecked", f"{REFUSALS} -k advertise", "client", "session.check(self._terms)", "pass"),
    unchecked(
        "members unchecked",
        REFUSALS,
        "session",
        "slots not in (self.cohorts(round_number) if callable(self.cohorts) else self.cohorts)",
    ),
    unchecked("rounds without end", "test_session", "session", "not 1 <= round_number <= self.rounds"),
    unchecked("a session it is no member of", REFUSALS, "client", "self._slot not in session.members"),
    unchecked(
        "a proposal in another form", "test_session", "session", "bytes(session) != text or session.v != VERSION"
    ),
    unchecked(
        "own advert unchecked",
        f"{REFUSALS} -k share",
        "client",
        'bytes(adverts.get(self._slot, b"")) != secrets.advert',
    ),
    unchecked(
        "advert signatures unchecked",
        f"{REFUSALS} -k share",
        "view",
        "not is_signed_by(roster.slot(advert.slot).key, advert.signature, advert.signed)",
    ),
    one("adverts not signed for a session", REFUSALS, "wire", 'digest("advert", self.session, ', 'digest("advert", '),
    unchecked("strangers advertise", f"{REFUSALS} -k share", "view", "advert.slot not in session.members"),
    unchecked("minimum unchecked at share", f"{REFUSALS} -k share", "client", "len(adverts) < session.minimum"),
    unchecked(
        "model unchecked",
        f"{REFUSALS} -k model",
        "client",
        "(round_number, model) != (session.round, session.model)",
    ),
    unchecked("too few boxes", f"{REFUSALS} -k mask", "client", "len(secrets.held) < session.threshold"),
    unchecked(
        "boxes of strangers", f"{REFUSALS} -k mask", "client", "not set(boxes) <= set(view.neighbours(self._slot))"
    ),
    unchecked("own survival unchecked", f"{REFUSALS} -k agree", "client", "self._slot not in survivors"),
    unchecked("survivors who never advertised", REFUSALS, "client", "not survivors <= set(view.adverts)"),
    unchecked("minimum unchecked at agree", f"{REFUSALS} -k agree", "client", "len(survivors) < session.minimum"),
    unchecked("survivors who never shared", f"{REFUSALS} -k Views", "client", "not alive <= set(secrets.sharers)"),
    unchecked("too few neighbours alive", f"{REFUSALS} -k sparse", "client", "len(alive) < session.threshold"),
    unchecked("agreement unchecked", f"{REFUSALS} -k reveal", "client", "agreeing < session.threshold"),
    one(
        "agreement counted from anyone",
        f"{REFUSALS} -k reveal",
        "client",
        "in survivors & neighbours & set(signatures)",
        "in set(signatures) & {m.slot for m in self._roster.members}",
    ),
    one("agreement to any view", f"{REFUSALS} -k reveal", "view", 'digest("survivors", root, ', 'digest("survivors", '),
    one("no claim of shares", f"{REFUSALS} -k Rollback", "client", 'self._claim("share", session.id)', "pass"),
    one(
        "no claim of the round's vector",
        f"{REFUSALS} -k Rollback",
        "client",
        'self._claim("vector", _round(session), most=self._per_round)',
        "pass",
    ),
    one("no claim of masks", f"{REFUSALS} -k Rollback", "client", 'self._claim("mask", root)', "pass"),
    one("no claim of the agreement", f"{REFUSALS} -k Rollback", "client", 'self._claim("agree", view.root)', "pass"),
    one("no claim of the reveal", f"{REFUSALS} -k Rollback", "client", 'self._claim("reveal", view.root)', "pass"),
    one("any round again", f"{REFUSALS} -k Rollback", "client", ">= self._per_round:", "> 10**6:"),
    one("rounds not told apart", "test_protocol -k after_the_other", "client", "session.round, ", ""),
    one(
        "secrets kept after the reveal",
        "test_protocol -k after_the_other",
        "client",
        "            if secrets.stage == OVER:\n                self.forget()\n",
        "            if secrets.stage == OVER:\n                pass\n",
    ),
    one(
        "secrets kept after a refusal",
        REFUSALS,
        "client",
        "except BaseException:\n            self.forget()\n",
        "except BaseException:\n",
    ),
    one(
        "stages unchecked",
        f"{REFUSALS} -k Order",
        "client",
        "secrets is None or secrets.stage != stage",
        "secrets is None",
    ),
    one(
        "masked words unchecked",
        f"{TAMPERING} -k server",
        "server",
        "check_vouched(self._keys[slot], words, proof, context=context)",
        "pass",
    ),
    one(
        "masked words for any sharers",
        f"{TAMPERING} -k box",
        "view",
        'digest("masked", root, write_slots(sharers))',
        'digest("masked", root)',
    ),
    one(
        "commitments unchecked",
        f"{REFUSALS} -k Server",
        "server",
        "return commitment(self.session.id, slot, secret) == self._adverts[slot].commitment",
        "return True",
    ),
    one(
        "recovered keys unchecked",
        f"{REFUSALS} -k Server",
        "server",
        "return public.public_bytes_raw() == self._adverts[slot].mask",
        "return True",
    ),
    unchecked("late answers taken", "test_protocol -k late", "server", "self._stage != stage"),
    unchecked("second answers taken", f"{REFUSALS} -k Server", "server", "slot in had"),
    unchecked(
        "a signature over another set taken",
        f"{TAMPERING} -k server",
        "server",
        "not is_signed_by(self._roster.slot(slot).key, signature, agreement(self._view.root, self._masked))",
    ),
    unchecked("trailing bytes taken", "test_wire", "wire", "self._rest"),
    unchecked("sites named twice", "test_wire", "wire", "slots != sorted(set(slots))"),
)


def pytest(scratch: Path, *arguments: str) -> int:
    """Run tests of the copy, with the copy's sources; return pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(scratch)}
    result = subprocess.run([*command, *arguments], cwd=scratch, env=environment, capture_output=True, check=False)
    return result.returncode


def selection(tests: str) -> list[str]:
    name, *narrowed = tests.split()
    return [str(TESTS / f"{name}.py"), *narrowed]


def copied(scratch: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "privacy", scratch / "privacy", ignore=ignored)
    shutil.copytree(ROOT / TESTS, scratch / TESTS, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", scratch)
    for package in (TESTS.parent, TESTS.parent.parent):
        (scratch / package / "__init__.py").touch()


def verdict(mutant: Mutant, scratch: Path) -> str:
    """Whether the tests notice `mutant`; the sources of the copy are as before when this returns."""
    originals: dict[Path, str] = {}
    try:
        for module, text, other in mutant.changes:
            path = scratch / "privacy" / "secagg" / f"{module}.py"
            content = path.read_text()
            originals.setdefault(path, content)
            if text not in content:
                return f"DOES NOT APPLY to {module}.py"
            path.write_text(content.replace(text, other))
        match pytest(scratch, *selection(mutant.tests)):
            case 0:
                return "SURVIVED"
            case 1:
                return "killed"
            case status:
                return f"NOT TESTED (pytest ended with {status})"
    finally:
        for path, content in originals.items():
            path.write_text(content)


def main() -> int:
    began, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        copied(scratch)
        if pytest(scratch, *sorted({selection(mutant.tests)[0] for mutant in MUTANTS})) != 0:
            print("the tests do not pass without a mutant")
            return 1
        for mutant in MUTANTS:
            said = verdict(mutant, scratch)
            bad += said != "killed"
            print(f"{said:10} {mutant.what} ({mutant.tests})", flush=True)
    print(f"{len(MUTANTS) - bad} of {len(MUTANTS)} mutants killed in {time.monotonic() - began:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
