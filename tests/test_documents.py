"""What the documents say is held against the program."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from strategies.catalogue import STRATEGIES, resolve
from strategies.composition import matrix
from strategies.explain import known_keys
from strategies.job import Job, check_job

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_job_reference_names_every_key() -> None:
    text = (ROOT / "docs" / "jobs.md").read_text()
    sections = {
        "simulation",
        "privacy",
        "record",
        "partition",
        "faults",
        "data",
        "task",
        "strategy",
        "training",
        "cohort",
        "secure_aggregation",
        "schedule",
        "evaluation",
    }
    missing = {
        ".".join([*table, key]) for table, key in known_keys(Job) if key not in sections and f"`{key}" not in text
    }
    assert not missing


def test_the_table_of_what_goes_together_is_made_from_the_code() -> None:
    text = (ROOT / "docs" / "strategies.md").read_text()
    table = matrix(STRATEGIES)
    kinds = " | ".join(next(iter(table.values())))
    rows = [
        f"| `{name}` | {' | '.join('no' if why else 'yes' for why in row.values())} |" for name, row in table.items()
    ]
    assert "\n".join([f"| strategy | {kinds} |", f"|{'---|' * (len(kinds.split(' | ')) + 1)}", *rows]) in text


def test_every_strategy_and_its_settings_are_described() -> None:
    text = (ROOT / "docs" / "strategies.md").read_text().split("## What goes together")[0]
    for name in STRATEGIES:
        line = next(line for line in text.splitlines() if line.startswith("| `") and f"`{name}`" in line)
        own = {field.name for field in fields(resolve(name, STRATEGIES, key=""))} - {
            "weighting",
            "server_learning_rate",
        }
        assert {setting for setting in own if f"`{setting}`" not in line} == set()


def test_the_readme_names_only_commands_that_exist() -> None:
    import typer.main

    from fedchorus import app

    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(
        re.findall(r"fedchorus (simulate|audit|resume|report|scenarios|[a-z]+) ", (ROOT / "README.md").read_text())
    )
    assert named - {"trains"} <= known
    assert {"simulate", "audit", "resume", "scenarios"} <= named


def test_the_makefile_has_every_target_that_the_documents_name() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"\bmake ([a-z]+)\b(?= +#|`)", document.read_text())) <= targets, document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (ROOT / "docs" / "threat-model.md").read_text())
    assert len(named) > 30
    for file, test in named:
        found = [path.read_text() for path in (ROOT / "tests").glob(f"**/{file}")]
        assert found, file
        assert not test or any(f"def {test}(" in text for text in found), f"{file} has no {test}"


def test_the_example_job_is_valid() -> None:
    import tomllib

    job = check_job(tomllib.loads((ROOT / "examples" / "heart_disease.toml").read_text()), where="example")
    assert job.privacy.record is not None
    assert set(job.data.files or {}) == {"cleveland", "hungarian", "switzerland", "va"}
