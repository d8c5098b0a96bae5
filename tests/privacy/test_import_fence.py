"""An auditor installs neither torch nor Flower, and the five flat names mean this repository's folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "opacus", "flwr", "ray", "grpc", "sklearn", "pandas", "pyarrow", "pydantic", "tensorflow", "jax"]

# Refusing the import, rather than looking for the module afterwards, also shows a fallback that hides the attempt.
PRELUDE = f"""
import sys

class Fence:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise AssertionError("imported " + name)

sys.meta_path.insert(0, Fence())
"""

AUDIT_A_SMALL_RUN = """
import hashlib, json, tempfile
from pathlib import Path

import privacy.ledger, privacy.accountant, privacy.audit, privacy.budget
from privacy.accountant import epsilon
from privacy.audit import audit_run
from privacy.budget import Limit, SiteBudget, charged
from privacy.events import GaussianEvent
from privacy.keys import IdentityKey
from privacy.ledger import Ledger

run = Path(tempfile.mkdtemp())
toml = b"[training]\\nrounds = 1\\nlocal_steps = 3\\nsampling_rate = 0.1\\n"
toml += b"[privacy.record]\\nepsilon = 5.0\\ndelta = 1e-5\\n"
job = hashlib.sha256(toml).hexdigest()
key = IdentityKey.create(run / "key.pem")
budget = SiteBudget(Ledger(run / "ledgers" / "here.jsonl", "here", key))
budget.open(rows=100, simulation=False)
event = GaussianEvent(noise_multiplier=2.0, clip_norm=1.0, sampling_rate=0.1, count=3, rng="os")
budget.plan(job=job, events=[event], rounds=1, limits=[Limit(epsilon=5.0, delta=1e-5)])
head = budget.commit(budget.reserve(job=job, round_number=1, model="0" * 64, witness=None), output="1" * 64)
spent = epsilon(charged(budget.ledger.entries), 1e-5).pld
(run / "job.toml").write_bytes(toml)
(run / "roster.json").write_text(json.dumps({"v": 1, "sites": {"here": key.public_hex}}))
(run / "heads.jsonl").write_text(json.dumps({"round": 1, "heads": {"here": list(head)}}) + "\\n")
line = {"round": 1, "epsilon": {"here": spent}, "contributors": ["here"], "failures": {}}
(run / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
claims = {"here": {"epsilon": spent, "delta": 1e-5}}
summary = {"rounds": 1, "job_hash": job, "sites": claims, "epsilon": {"record": spent}}
(run / "summary.json").write_text(json.dumps(summary))
result = audit_run(run)
assert result.ok, result.findings
print(json.dumps(result.as_dict()["epsilon"]["record"]))
"""


def run_python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints, started outside the repository so that no import comes from the folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_ledger_is_verified_and_audited_without_a_training_framework_or_a_network(tmp_path: Path) -> None:
    spent = json.loads(run_python(PRELUDE + AUDIT_A_SMALL_RUN, tmp_path))
    assert 0 < spent < 5


@pytest.mark.parametrize("module", ["client.training", "pydantic"])
def test_the_fence_does_notice_an_import(tmp_path: Path, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\nimport {module}"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "AssertionError: imported" in done.stderr


def test_verifying_a_chain_does_not_even_load_the_accounting_library(tmp_path: Path) -> None:
    loaded = run_python(
        "import sys, privacy.ledger; print(*{name.partition('.')[0] for name in sys.modules})", tmp_path
    )
    assert not {"dp_accounting", "scipy", "numpy", "typer", "rich", *HEAVY} & set(loaded.split())


def test_the_five_names_and_the_command_resolve_inside_this_repository(tmp_path: Path) -> None:
    names = ["server", "client", "strategies", "privacy", "simulations", "fedchorus"]
    code = f"import importlib.util, json; print(json.dumps([importlib.util.find_spec(n).origin for n in {names}]))"
    origins = [Path(origin).resolve() for origin in json.loads(run_python(code, tmp_path))]
    assert origins == [REPOSITORY / name / "__init__.py" for name in names[:-1]] + [REPOSITORY / "fedchorus.py"]
