"""A job is checked whole before anything happens, and every mistake is one line that says how to mend it."""

import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from privacy.errors import JobError
from strategies.explain import known_keys
from strategies.job import Job, Schedule, Training, check_job, load_job
from tests.strategies.jobs import make_job, raw_job

JOB = """
name = "two-clinics"

[data]
path = "records.csv"
client = "hospital"
target = "ill"

[data.columns]
age = { range = [0, 120] }
blood = { type = "category", values = ["A", "B", "O"] }

[training]
rounds = 5
learning_rate = 0.5
local_steps = 3
batch_size = 16
"""

PRIVATE = "privacy.record={delta=1e-5, noise_multiplier=1}"
MIX = ["data.client=none", "simulation.partition.mix={north={rows=10, positive=0.5}}"]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def mistake(path: Path, *overrides: str) -> str:
    """The one line that `load_job` answers; fails when it accepts the job or says more than a line."""
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert "http" not in message
    assert "pydantic" not in message
    return message


MISTAKES: list[tuple[list[str], list[str]]] = [
    # Unknown keys, at every level and in the wrong section: the nearest known one is named in full.
    (["sede=3"], ["unknown key sede", "did you mean seed?"]),
    (["learning_rate=0.1"], ["unknown key learning_rate", "did you mean training.learning_rate?"]),
    (["rounds=3"], ["unknown key rounds", "did you mean training.rounds?"]),
    (["privacy.epsilon=1"], ["unknown key privacy.epsilon", "did you mean privacy.record.epsilon?"]),
    (["simulation.alpha=1"], ["unknown key simulation.alpha", "did you mean simulation.partition.alpha?"]),
    (["training.learning_rat=0.1"], ["unknown key training.learning_rat", "did you mean training.learning_rate?"]),
    (["data.columns.age.rnage=[0, 1]"], ["unknown key data.columns.age.rnage", "mean data.columns.age.range?"]),
    ([PRIVATE, "privacy.record.clipnorm=1"], ["privacy.record.clipnorm", "did you mean privacy.record.clip_norm?"]),
    (
        [*MIX, "simulation.partition.mix.north.row=9"],
        ["mix.north.row;", "did you mean simulation.partition.mix.north.rows?"],
    ),
    (["cohort.zzz=1"], ["unknown key cohort.zzz", "known here: size, rate, separation, minimum"]),
    # Wrong types: nothing is converted silently.
    (["training.rounds=5.0"], ["training.rounds: should be a valid integer", "got 5.0"]),
    (["training.rounds=true"], ["training.rounds: should be a valid integer", "got True"]),
    (["training.rounds='5'"], ["training.rounds: should be a valid integer", "got '5'"]),
    (["training.rounds='5\\n6'"], ["training.rounds", "got '5"]),
    (["training=3"], ["training: should be a table", "got 3"]),
    (["data.columns=[1, 2]"], ["data.columns: should be a table", "got [1, 2]"]),
    (["data.columns.age=3"], ["data.columns.age: should be a table", "got 3"]),
    (["data.missing='?'"], ["data.missing: should be a valid list", "got '?'"]),
    (["data.columns.age.range=['0', '1']"], ["data.columns.age.range.0: should be a valid number", "got '0'"]),
    (["data.columns.age.range=[0]"], ["data.columns.age.range"]),
    (["data.columns.age.range=[0, 1, 2]"], ["data.columns.age.range", "at most 2", "got [0, 1, 2]"]),
    # Values out of their range.
    (["training.rounds=0"], ["training.rounds: should be greater than 0", "got 0"]),
    (["training.learning_rate=nan"], ["training.learning_rate: should be a finite number", "got nan"]),
    (["training.learning_rate=0"], ["training.learning_rate: should be greater than 0", "got 0"]),
    (["training.learning_rate=1e300"], ["training.learning_rate: should be less than or equal to 3", "got 1e+300"]),
    (["training.weight_decay=1e300"], ["training.weight_decay: should be less than or equal to 3", "got 1e+300"]),
    (["strategy={name='fedprox', mu=1e300}"], ["strategy.mu: should be less than or equal to 3", "got 1e+300"]),
    (["strategy={name='pfedme', lam=1e300}"], ["strategy.lam: should be less than or equal to 3", "got 1e+300"]),
    (
        ["strategy={name='feddyn', weighting='equal', alpha=1e300}"],
        ["strategy.alpha: should be less than or equal to 3", "got 1e+300"],
    ),
    (["training.budget_s=1e308"], ["training.budget_s: should be less than or equal to 3", "got 1e+308"]),
    (["training.rounds=1" + "0" * 400], ["training.rounds: should be less than or equal to 9007199254740992"]),
    (
        ["training={rounds=1, learning_rate=0.1, local_epochs=1, sampling_rate=1e-310}"],
        ["training: local_epochs = 1 with sampling_rate = 1e-310 are inf steps", "raise sampling_rate, or give"],
    ),
    (["training.weight_decay=-1e-9"], ["training.weight_decay: should be greater than or equal to 0", "got -1e-09"]),
    (["training.batch_size=none", "training.sampling_rate=1.5"], ["training.sampling_rate", "equal to 1", "got 1.5"]),
    ([PRIVATE, "privacy.record.epsilon=0"], ["privacy.record.epsilon: should be greater than 0", "got 0"]),
    ([PRIVATE, "privacy.record.epsilon=-1"], ["privacy.record.epsilon: should be greater than 0", "got -1"]),
    ([PRIVATE, "privacy.record.epsilon=nan"], ["privacy.record.epsilon: should be a finite number", "got nan"]),
    ([PRIVATE, "privacy.record.epsilon=inf"], ["privacy.record.epsilon: should be a finite number", "got inf"]),
    ([PRIVATE, "privacy.record.delta=0"], ["privacy.record.delta: should be greater than 0", "got 0"]),
    ([PRIVATE, "privacy.record.delta=1"], ["privacy.record.delta: should be less than 1", "got 1"]),
    ([PRIVATE, "privacy.record.delta=nan"], ["privacy.record.delta", "got nan"]),
    ([PRIVATE, "privacy.record.clip_norm=0"], ["privacy.record.clip_norm: should be greater than 0", "got 0"]),
    ([PRIVATE, "privacy.record.noise_multiplier=0.06"], ["privacy.record.noise_multiplier", "0.0625", "got 0.06"]),
    (["privacy.record={delta=1e-5}"], ["privacy.record: give epsilon (a target), noise_multiplier, or both"]),
    (["privacy.record={epsilon=1}"], ["privacy.record.delta is missing"]),
    (["data.test_fraction=1"], ["data.test_fraction: should be less than 1", "got 1"]),
    (["data.split_seed=-1"], ["data.split_seed: should be greater than or equal to 0", "got -1"]),
    (["data.split_seed=4294967296"], ["data.split_seed: should be less than 4294967296", "got 4294967296"]),
    (["seed=9223372036854775808"], ["seed: should be less than 9223372036854775808", "got 9223372036854775808"]),
    (["task.hidden=[8, 0]"], ["task.hidden.1: should be greater than 0", "got 0"]),
    (["simulation.faults={dropout=0.6, malformed=0.5}"], ["simulation.faults", "dropout", "malformed", "1.1"]),
    # Names: a typing error is answered with the nearest choice.
    (["strategy.weighting=row"], ["strategy.weighting: should be 'rows' or 'equal'", "got 'row'", "mean 'rows'?"]),
    (
        ["task.model=logistic-regresion"],
        ["task.model", "got 'logistic-regresion'", "did you mean 'logistic-regression'?"],
    ),
    (["training.device=gpu"], ["training.device: should be 'auto', 'cpu', 'cuda' or 'mps'", "got 'gpu'"]),
    (["name=two/clinics"], ["name: 'two/clinics' is not a name (letters, digits, dot, dash, underscore; at most 64)"]),
    (["name=" + "a" * 65], ["name: 'aaa", "at most 64"]),
    (["data.path=none", "data.client=none", "data.files={'a/b'='a.csv'}"], ["data.files.a/b", "is not a name"]),
    ([*MIX, "simulation.partition.mix.-x={rows=1, positive=0}"], ["simulation.partition.mix.-x", "is not a name"]),
    # Columns.
    (
        ["data.columns.age.range=[120, 0]"],
        ["data.columns.age: range must be [low, high] with low < high", "[120.0, 0.0]"],
    ),
    (["data.columns.age.range=[1, 1]"], ["data.columns.age: range must be [low, high] with low < high"]),
    (["data.columns.age.range=[0, inf]"], ["data.columns.age.range.1: should be a finite number", "got inf"]),
    (["data.columns.age.range=[-inf, 0]"], ["data.columns.age.range.0: should be a finite number", "got -inf"]),
    (["data.columns.age.range=[nan, 1]"], ["data.columns.age.range.0: should be a finite number", "got nan"]),
    (
        ["data.columns.age.range=[0, 1.7e308]"],
        ["data.columns.age.range.1: should be less than or equal to 1", "1.7e+308"],
    ),
    (["data.columns.age.range=none"], ["columns.age needs a `range`", 'data.scaling = "site"']),
    (["data.columns.age.values=[1, 2]"], ["data.columns.age: a number has a `range`, not `values`"]),
    (["data.columns.blood.values=none"], ["data.columns.blood: a category needs its `values`"]),
    (["data.columns.blood.values=[]"], ["data.columns.blood: a category needs its `values`"]),
    (["data.columns.blood.values=['A']"], ["data.columns.blood: a category needs its `values`, two or more"]),
    (["data.columns.blood.values=['A', 'B', 'A']"], ["data.columns.blood: `values`", "'A' is listed twice"]),
    (["data.columns.blood.range=[0, 1]"], ["data.columns.blood: a category has `values`, not a `range`"]),
    (["data.columns.blood.type=categry"], ["data.columns.blood.type", "got 'categry'", "did you mean 'category'?"]),
    (["data.columns={}"], ["data.columns", "at least 1"]),
    # What does not go together.
    (["training.local_epochs=1"], ["training: give exactly one of local_steps and local_epochs"]),
    (["training.local_steps=none"], ["training: give exactly one of local_steps and local_epochs"]),
    (["training.sampling_rate=0.5"], ["training: give exactly one of batch_size and sampling_rate"]),
    (["training.batch_size=none"], ["training: give exactly one of batch_size and sampling_rate"]),
    (["data.target=age"], ["data: the target 'age' is also listed in `columns`"]),
    (["data.client=age"], ["data: the client key 'age' is also listed in `columns`"]),
    (["data.files={a='a.csv'}"], ["data: give at most one of bundled, path and files; got path and files"]),
    (["data.path=none", "data.files={a='a.csv'}"], ["data: `client` names a column of `path`"]),
    (["data.client=none"], ["data.path needs data.client", "[simulation.partition]"]),
    (["data.positive=[1]", "data.classes=[0, 1]"], ["data: give at most one of positive and classes"]),
    (["data.positive=[]"], ["data.positive", "at least 1", "got []"]),
    (["data.classes=[1]"], ["data.classes", "at least 2", "got [1]"]),
    (["data.classes=[0, 1, 1]"], ["data: `classes`: 1 is listed twice"]),
    (["data.header=false"], ["data: header = false needs `names`"]),
    (["data.names=['age', 'blood', 'ill', 'hospital']"], ["data: `names`", "set header = false"]),
    (["data.scaling=site", PRIVATE], ['data.scaling = "site"', "give every number a `range`"]),
    (["simulation.partition.clients=3"], ["simulation.partition splits one table"]),
    ([*MIX, "simulation.partition.clients=3"], ["simulation.partition: give exactly one of mix and clients"]),
    (["simulation.partition={}"], ["simulation.partition: give exactly one of mix and clients"]),
    (
        ["data.path=none", "data.client=none", "data.bundled=breast-cancer"],
        ["data.bundled needs a [simulation.partition]"],
    ),
    (["cohort={size=2, minimum=3}"], ["cohort.minimum (3) is larger than cohort.size (2)"]),
    (["name=none"], ["name is missing"]),
    (["data=none"], ["data is missing"]),
    (["name=none", "training.rounds=0"], ["name is missing", "(and 1 more)"]),
]


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=lambda value: "; ".join(value))
def test_a_mistake_is_one_line_that_names_the_key_what_was_expected_and_what_came(
    job_file: Path, overrides: list[str], said: list[str]
) -> None:
    message = mistake(job_file, *overrides)
    assert message.startswith(f"{job_file}: ")
    assert [part for part in said if part not in message] == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.rounds", "expected key=value"),
        ("", "expected key=value"),
        ("=3", "expected key=value"),
        ("training..rounds=3", "expected key=value"),
        (".rounds=3", "expected key=value"),
        ("training.rounds.first=3", "rounds is a value, not a table"),
        ("name.first.second=3", "name is a value, not a table"),
        ("training.rounds=1\nseed=2", "expected key=value"),
        ("training.rounds\nseed", "expected key=value"),
    ],
)
def test_an_override_that_is_not_key_and_value_is_refused_as_it_was_typed(
    job_file: Path, override: str, said: str
) -> None:
    message = mistake(job_file, override)
    assert message.startswith("--set ")
    assert said in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name = [", "not valid TOML"),
        (b"name = 'a'\nname = 'b'\n", "not valid TOML: Cannot overwrite a value (at line 2"),
        (b"name\n= 3", "not valid TOML"),
        (b"\x00\x01", "not valid TOML"),
        ("name = 'clinique-é'".encode("latin-1"), "not a text file in UTF-8"),
        (b"", "name is missing (and 2 more)"),
        (b'"na\\nme" = 1\n' + JOB.encode(), "unknown key na"),
        (JOB.replace("age", '"a\\nge"').replace("[0, 120]", "[1, 0]").encode(), "range must be [low, high]"),
    ],
)
def test_a_file_that_is_not_a_job_is_refused_in_one_line(job_file: Path, content: bytes, said: str) -> None:
    job_file.write_bytes(content)
    message = mistake(job_file)
    assert message.startswith(f"{job_file}: ")
    assert said in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.toml", "no such job file"),
        ("", "a folder, not a job file"),
        ("job.toml/inside.toml", "cannot be read"),
        ("a" * 300 + ".toml", "cannot be read"),
    ],
)
def test_a_path_that_is_not_a_file_is_refused_in_one_line(job_file: Path, name: str, said: str) -> None:
    path = job_file.parent / name
    message = mistake(path)
    assert message.startswith(f"{path}: ")
    assert said in message


EVERY_SECTION: dict[str, Any] = raw_job(
    data={"client": None, "held_out": {"path": "test.csv"}},
    task={},
    strategy={"weighting": "equal"},
    training={"schedule": {}},
    cohort={},
    privacy={
        "record": {"delta": 1e-5, "epsilon": 1.0},
        "client": {"delta": 1e-5, "epsilon": 1.0, "adaptive_clip": {}},
    },
    secure_aggregation={},
    simulation={
        "partition": {"mix": {"north": {"rows": 9, "positive": 0.5}}},
        "faults": {},
        "devices": {"phone": {"share": 1.0}},
    },
)


# Whose rows are of several periods, which nothing protects one by one.
FORECASTING: dict[str, Any] = raw_job(
    data={"target_type": "number", "target_log": True, "forecast": {"time": "week", "horizon": 1}}
)


# A job that measures a model, by groups of both kinds.
EVALUATING: dict[str, Any] = {
    **raw_job(),
    "training": {"rounds": 1, "local_steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
    "data": {**raw_job()["data"], "stratify": False},
    "evaluation": {"of": "a" * 64, "model_hash": "a" * 64, "groups": {"sex": {"values": ["F", "M"]}}},
}


# A job that fine-tunes a checkpoint, which need not be here to read the job.
TUNING: dict[str, Any] = {
    **raw_job(),
    "data": {"path": "p.csv", "client": "ward", "target": "ill", "columns": {"x": {"type": "tokens", "length": 8}}},
    "task": {"name": "text-classification", "model": "pretrained", "checkpoint": "models:m", "tuning": {}},
}


@pytest.mark.parametrize(("table", "key"), sorted(set(known_keys(Job))), ids=lambda value: str(value))
def test_every_key_is_the_nearest_one_to_itself_misspelt(table: tuple[str, ...], key: str) -> None:
    chosen = {"columns": "x", "mix": "north", "devices": "phone", "groups": "sex"}
    parent = [chosen[table[i - 1]] if name == "*" else name for i, name in enumerate(table)]
    job = FORECASTING if "forecast" in table else EVALUATING if "evaluation" in table else EVERY_SECTION
    job = TUNING if "tuning" in table else job
    raw = check_job(job, where="a test").model_dump(mode="json", exclude_none=True)
    inner = raw
    for name in parent:
        inner = inner[name]
    inner[f"{key}z"] = 1
    with pytest.raises(JobError) as caught:
        check_job(raw, where="a test")
    full = ".".join([*parent, key])
    assert str(caught.value) == f"a test: unknown key {full}z; did you mean {full}?"


KEYS = sorted({".".join([*table, key]).replace("*", "age") for table, key in known_keys(Job)})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)


def without_none(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value if item is not None]
    return value


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=8), VALUES), min_size=1, max_size=2))
def test_whatever_a_job_says_it_is_accepted_whole_or_refused_in_one_line(changes: list[tuple[str, Any]]) -> None:
    raw: dict[str, Any] = raw_job()
    for key, value in changes:
        table, names = raw, key.split(".")
        for name in names[:-1]:
            below = table.setdefault(name, {})
            if not isinstance(below, dict):
                break
            table = below
        table[names[-1]] = without_none(value)
    try:
        job = check_job(raw, where="a test")
    except JobError as error:
        message = str(error)
        assert message.splitlines() == [message]
        assert "http" not in message
    else:
        assert re.fullmatch("[0-9a-f]{64}", job.hash)


class TestPrecedence:
    def test_defaults_then_the_file_then_each_override_in_turn(self, job_file: Path) -> None:
        assert Training(rounds=1, learning_rate=1, local_steps=1, batch_size=1).weight_decay == 0
        job_file.write_text(JOB + "weight_decay = 0.1\n")
        assert load_job(job_file).training.weight_decay == 0.1
        assert load_job(job_file, ["training.weight_decay=0.2"]).training.weight_decay == 0.2
        overrides = ["training.weight_decay=0.2", "training.weight_decay=0.3"]
        assert load_job(job_file, overrides).training.weight_decay == 0.3

    def test_none_gives_a_key_its_default_back(self, job_file: Path) -> None:
        job_file.write_text(JOB + "weight_decay = 0.1\n")
        assert load_job(job_file, ["training.weight_decay=none"]).training.weight_decay == 0
        job = load_job(job_file, ["training.batch_size=none", "training.sampling_rate=0.5"])
        assert (job.training.batch_size, job.training.sampling_rate) == (None, 0.5)

    @pytest.mark.parametrize(
        "key", ["privacy.record.noise_multiplier", "simulation.partition.alpha", "privacy.record", "seed"]
    )
    def test_none_for_an_absent_key_changes_nothing(self, job_file: Path, key: str) -> None:
        assert load_job(job_file, [f"{key}=none"]) == load_job(job_file)

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("name=plain-text", "plain-text"),
            ("name='quoted'", "quoted"),
            ('name="quoted"', "quoted"),
            ("name =  spaced ", "spaced"),
            ("name=a # a comment of TOML", None),
        ],
    )
    def test_a_value_is_toml_or_else_text(self, job_file: Path, override: str, value: str | None) -> None:
        if value is None:
            assert "is not a name" in mistake(job_file, override)
        else:
            assert load_job(job_file, [override]).name == value

    def test_an_override_says_what_the_same_line_in_the_file_says(self, tmp_path: Path, job_file: Path) -> None:
        edited = tmp_path / "edited.toml"
        edited.write_text(JOB.replace("rounds = 5", "rounds = 7").replace("[0, 120]", "[0.5, 99]"))
        overrides = ["training.rounds=7", "data.columns.age.range=[0.5, 99]"]
        assert load_job(job_file, overrides).hash == load_job(edited).hash

    def test_a_relative_data_folder_starts_at_the_job_file(self, tmp_path: Path, job_file: Path) -> None:
        assert load_job(job_file).data.folder == str(tmp_path.resolve())
        assert load_job(job_file, ["data.folder=../there"]).data.folder == str((tmp_path / "../there").resolve())
        assert load_job(job_file, ["data.folder=/elsewhere"]).data.folder == "/elsewhere"


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
FLOATS = st.floats(-1e300, 1e300, allow_nan=False)
LABELS = st.one_of(
    st.lists(st.text(max_size=5), min_size=2, max_size=4, unique=True),
    st.lists(st.integers(-9, 9), min_size=2, max_size=4, unique=True),
)
NUMBER = st.lists(FLOATS, min_size=2, max_size=2, unique=True).map(lambda ends: {"range": sorted(ends)})
CATEGORY = LABELS.map(lambda values: {"type": "category", "values": values})


@st.composite
def raw_jobs(draw: st.DrawFn) -> dict[str, Any]:
    """Valid jobs of many kinds, as a file would say them."""
    target = draw(st.text(min_size=1, max_size=8))
    columns = draw(
        st.dictionaries(st.text(max_size=8).filter(lambda name: name != target), NUMBER | CATEGORY, min_size=1)
    )
    source: dict[str, Any] = draw(
        st.sampled_from([{"path": "a b.csv"}, {"bundled": "breast-cancer"}])
        | st.dictionaries(NAMES, st.text(max_size=8), min_size=1, max_size=3).map(lambda files: {"files": files})
    )
    raw: dict[str, Any] = {
        "name": draw(NAMES),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "data": {**source, "target": target, "columns": columns, "missing": draw(st.lists(st.text(max_size=4)))},
        "training": {
            "rounds": draw(st.integers(1, 10**12)),
            "learning_rate": draw(st.floats(1e-300, 3e38)),
            **draw(st.sampled_from([{"local_steps": 3}, {"local_epochs": 2}])),
            **draw(st.sampled_from([{"batch_size": 8}, {"sampling_rate": 0.1}])),
        },
    }
    if "files" not in source:
        site = st.fixed_dictionaries({"rows": st.integers(1, 10**6), "positive": st.floats(0, 1)})
        raw["simulation"] = {"partition": {"mix": draw(st.dictionaries(NAMES, site, min_size=1, max_size=3))}}
    if draw(st.booleans()):
        raw["privacy"] = {"record": {"epsilon": draw(st.floats(1e-9, 1e9)), "delta": draw(st.floats(1e-300, 0.5))}}
    return raw


class TestHash:
    @settings(max_examples=50, deadline=None)
    @given(raw=raw_jobs())
    def test_the_resolved_job_reads_back_as_itself_from_any_folder(self, raw: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder, "job.toml"), Path(folder, "run", "job.toml")
            first.write_bytes(tomli_w.dumps(raw).encode())
            job = load_job(first)
            second.parent.mkdir()
            second.write_bytes(job.toml)
            again = load_job(second)
        assert again == job
        assert again.toml == job.toml
        assert again.hash == job.hash

    def test_is_the_sha256_of_the_resolved_job_and_never_changes(self) -> None:
        # Pinned from the first release: it names the job in every message and ledger entry.
        job = make_job()
        assert job.toml.startswith(
            b'name = "smallest"\npurpose = "training"\nseed = 0\n\n[data]\ndataset = "records"\n'
        )
        assert job.hash == "d158fe1d0549c3e8d2a594bbf2f48e4dc094a0c77ceeb01c5375a909940af185"

    def test_does_not_depend_on_comments_or_on_the_order_of_the_tables(self, tmp_path: Path, job_file: Path) -> None:
        head, data, columns, training = re.split(r"\n(?=\[)", JOB)
        other = tmp_path / "other.toml"
        other.write_text("\n".join(["# Said in another order.", head, training, columns, data]))
        assert load_job(other).hash == load_job(job_file).hash

    def test_depends_on_the_order_of_the_columns_because_the_model_does(self, tmp_path: Path, job_file: Path) -> None:
        lines = JOB.splitlines()
        at = next(number for number, line in enumerate(lines) if line.startswith("age"))
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
        other = tmp_path / "other.toml"
        other.write_text("\n".join(lines))
        assert load_job(other).hash != load_job(job_file).hash

    def test_changes_with_every_value(self, job_file: Path) -> None:
        hashes = {load_job(job_file, overrides).hash for overrides in VARIANTS}
        assert len(hashes) == len(VARIANTS)

    def test_every_key_has_a_variant_here(self) -> None:
        changed = {
            re.sub(r"(columns|mix|devices|groups)\.\w+", r"\1.*", o.partition("=")[0])
            for variant in VARIANTS
            for o in variant
        }
        leaves = {".".join([*table, key]) for table, key in known_keys(Job)}
        tables = {leaf for leaf in leaves if any(other.startswith(f"{leaf}.") for other in leaves)}
        assert leaves - tables - changed == set()


BUNDLED = ["data.path=none", "data.client=none", "data.bundled=breast-cancer"]
FILES = ["data.path=none", "data.client=none"]
CLIENT = ["strategy.weighting=equal", "privacy.client={epsilon=1, delta=1e-5}"]
SUMS = "secure_aggregation={}"
MEASURED = ["training=none", f"evaluation={{of='{'a' * 64}', model_hash='{'a' * 64}'}}", "data.stratify=false"]
PHONES = "simulation.devices={phone={share=1.0}}"
SERIES = [
    "data.target_type=number",
    "data.positive=none",
    "data.target_log=true",
    "data.forecast={time='week', horizon=3}",
]
WINDOW = [
    "data.target_type=next",
    "data.positive=none",
    "data.columns={ill={type='characters', alphabet='ab', window=4}}",
]
TUNED = [
    "data.columns={x={type='tokens', length=8}}",
    f"task={{model='pretrained', checkpoint='models:m', checkpoint_hash='{'a' * 64}', tokenizer_hash='{'a' * 64}'}}",
]
VARIANTS: list[list[str]] = [
    [],
    ["name=other"],
    ["purpose=research"],
    ["seed=1"],
    ["data.dataset=other"],
    ["data.folder=elsewhere"],
    ["data.path=other.csv"],
    ["data.client=ward"],
    ["data.target=dead"],
    ["data.positive=[1]"],
    ["data.positive=['1']"],
    ["data.classes=[0, 1]"],
    ["data.classes=[1, 0]"],
    ["data.allow_one_class=true"],
    ["data.header=false", "data.names=['age', 'blood', 'ill', 'hospital']"],
    ["data.header=false", "data.names=['blood', 'age', 'ill', 'hospital']"],
    ["data.missing=[]"],
    ["data.on_missing=drop"],
    ["data.columns.age.range=[0, 121]"],
    ["data.columns.age.range=[0, 120.00000000000001]"],
    ["data.columns.blood.values=['A', 'O', 'B']"],
    ["data.columns.age.mean=40.0", "data.columns.age.sd=9.0"],
    ["data.columns.age.mean=40.0", "data.columns.age.sd=8.0"],
    ["data.columns.age.fill=40"],
    ["task.name=statistics", "training=none"],
    ["task.name=statistics", "training=none", "task.bins=9"],
    ["task.name=statistics", "training=none", "task.statistics=['labels']"],
    ["data.columns.extra={type='category', values=['0', '1']}"],
    ["data.columns.extra={type='category', values=[0, 1]}"],
    ["data.columns.extra={range=[0, 1]}", "data.columns.extra.type=number"],
    ["data.scaling=site"],
    ["data.test_fraction=0.2"],
    ["data.stratify=false"],
    ["data.split_seed=1"],
    ["data.separator=;"],
    ["data.held_out={path='test.csv'}"],
    ["data.held_out={path='other.csv'}", "data.held_out.path=others.csv"],
    ["data.held_out={column='fold', values=['test']}"],
    ["data.held_out={column='part', values=['test']}", "data.held_out.column=parts"],
    ["data.held_out={column='fold', values=['test']}", "data.held_out.values=[2]"],
    ["data.held_out={arrays={age='test_age'}}", "data.held_out.arrays={age='other_age'}"],
    ["data.target_type=number", "data.positive=none"],
    ["data.target_type=number", "data.positive=none", "data.target_range=[0, 9]"],
    ["data.target_type=number", "data.positive=none", "data.target_log=true"],
    ["data.target_type=time", "data.positive=none", "data.event=died"],
    [*SERIES],
    [*SERIES, "data.forecast.time=day"],
    [*SERIES, "data.forecast.formats=['%Y']"],
    [*SERIES, "data.forecast.series=shelf"],
    [*SERIES, "data.forecast.lags=[1, 52]"],
    [*SERIES, "data.forecast.horizon=4"],
    [*SERIES, "data.forecast.harmonics=0"],
    [*SERIES, "data.forecast.spread=0.5"],
    ["data.columns.extra={type='text', buckets=8}"],
    ["data.columns.extra={type='text', buckets=8}", "data.columns.extra.buckets=9"],
    ["data.columns.extra={type='text', buckets=8}", "data.columns.extra.ngrams=[1, 2]"],
    ["data.columns.extra={type='text', buckets=8}", "data.columns.extra.analyzer=letters"],
    ["data.columns.extra={type='id', count=8}", "data.columns.extra.count=9"],
    ["data.columns={extra={type='image', shape=[2, 2]}}", "data.columns.extra.shape=[3, 3]"],
    [*WINDOW, "data.columns.ill.alphabet=ba"],
    [*WINDOW, "data.columns.ill.window=9"],
    TUNED,
    [*TUNED, "data.columns.x.length=9"],
    [*TUNED, "task.checkpoint='models:third'", "data.columns.x.tokenizer='models:third'"],
    [*TUNED, "data.columns.x.join=['age', 'blood']"],
    [*TUNED, "data.positive=none", "data.target_type=text", "data.target_length=4"],
    [*TUNED, "task.checkpoint='models:other'"],
    [*TUNED, f"task.checkpoint_hash='{'b' * 64}'"],
    [*TUNED, f"task.tokenizer_hash='{'b' * 64}'"],
    [*TUNED, "task.precision=bfloat16"],
    [*TUNED, "task.checkpointing=true"],
    [*TUNED, "task.tuning={}"],
    [*TUNED, "task.tuning={method='norms'}", "task.tuning.method=bias"],
    [*TUNED, "task.tuning.rank=4"],
    [*TUNED, "task.tuning.alpha=4.5"],
    [*TUNED, "task.tuning.targets=['q']"],
    [*TUNED, "task.tuning.factors=both"],
    [*TUNED, "task.tuning.ranks={a=2}"],
    [*TUNED, "task.tuning.refactor_every=2"],
    [*TUNED, "task.tuning.calibration='public.csv'", f"task.tuning.calibration_hash='{'b' * 64}'"],
    [*TUNED, "task.tuning.calibration='public.csv'", f"task.tuning.calibration_hash='{'c' * 64}'"],
    [*TUNED, "task.tuning.layers=2"],
    [*TUNED, "task.tuning.scale=2.5"],
    [*TUNED, "task.tuning.depth=3"],
    [*TUNED, "task.tuning.head_rounds=3"],
    [*BUNDLED, "simulation.partition={clients=2}"],
    [*BUNDLED, "simulation.partition.clients=3"],
    [*BUNDLED, "simulation.partition={clients=2, alpha=2}"],
    [*BUNDLED, "simulation.partition={clients=2, alpha=1}", "simulation.partition.alpha=3"],
    [*BUNDLED, "simulation.partition={clients=2}", "simulation.partition.least_rows=9"],
    [*BUNDLED, "simulation.partition.mix={a={rows=1, positive=0}}"],
    [*BUNDLED, "simulation.partition.mix={a={rows=1, positive=0}}", "simulation.partition.mix.a.rows=2"],
    [*BUNDLED, "simulation.partition.mix={a={rows=1, positive=0}}", "simulation.partition.mix.a.positive=1"],
    [*FILES, "data.files={a='a.csv'}"],
    [*FILES, "data.files={b='a.csv'}"],
    ["task.name=mine.tasks:Mine"],
    ["task.model=mlp"],
    ["task.hidden=[32]"],
    ["task.model=ft-transformer", "task.heads=2"],
    ["task.loss=squared"],
    ["task.loss=huber", "task.huber_delta=2"],
    ["task.loss=discrete-time", "task.intervals=[1, 2]"],
    ["strategy.name=mine.strategies:Mine"],
    ["strategy.weighting=equal"],
    ["cohort.deadline_s=60"],
    [*CLIENT, "cohort.rate=0.5"],
    CLIENT,
    [*CLIENT, "privacy.client.epsilon=2"],
    [*CLIENT, "privacy.client.delta=1e-4"],
    [*CLIENT, "privacy.client.noise_multiplier=3"],
    [*CLIENT, "privacy.client.clip_norm=2"],
    [*CLIENT, "privacy.client.spare_rounds=2"],
    [*CLIENT, "privacy.client.clipping=per-layer"],
    [*CLIENT, "privacy.client.placement=local"],
    [*CLIENT, "privacy.client.placement=distributed", "secure_aggregation={}"],
    [*CLIENT, "privacy.client.placement=distributed", "secure_aggregation={}", "privacy.client.shares=skellam"],
    [SUMS],
    [SUMS, "secure_aggregation.colluders=2"],
    [SUMS, "secure_aggregation.dropouts=2"],
    [SUMS, "secure_aggregation.graph=regular"],
    [SUMS, "secure_aggregation.reach=2"],
    [SUMS, "secure_aggregation.reach=2", "secure_aggregation.bits=16"],
    [SUMS, "secure_aggregation.groups=3", "robust.reduce=median"],
    [SUMS, "secure_aggregation.groups=4", "robust.reduce=median"],
    [SUMS, "secure_aggregation.groups=4", "robust.reduce=trimmed-mean"],
    [SUMS, "secure_aggregation.retries=1"],
    [*CLIENT, "privacy.client.noise=bsr", "cohort.separation=2"],
    [*CLIENT, "privacy.client.noise=blt", "cohort.separation=2"],
    [*CLIENT, "privacy.client.noise=blt", "cohort.separation=3"],
    [*CLIENT, "privacy.client.adaptive_clip={}"],
    [*CLIENT, "privacy.client.adaptive_clip={}", "privacy.client.adaptive_clip.quantile=0.25"],
    [*CLIENT, "privacy.client.adaptive_clip={}", "privacy.client.adaptive_clip.learning_rate=0.25"],
    [*CLIENT, "privacy.client.adaptive_clip={}", "privacy.client.adaptive_clip.bit_noise=2"],
    ["strategy.server_learning_rate=0.5"],
    ["task.model=matrix-factorisation", "task.penalty=0.1"],
    ["training.rounds=6"],
    ["training.learning_rate=0.25"],
    ["training.local_steps=4"],
    ["training.local_steps=none", "training.local_epochs=3"],
    ["training.batch_size=17"],
    ["training.batch_size=none", "training.sampling_rate=0.5"],
    ["training.weight_decay=1e-9"],
    ["training.schedule={}"],
    ["training.schedule={}", "training.schedule.kind=linear"],
    ["training.schedule={}", "training.schedule.warmup=2"],
    ["training.schedule={}", "training.schedule.last=0.1"],
    ["training.schedule={}", "training.schedule.factor=0.1"],
    ["training.schedule={}", "training.schedule.every=3"],
    ["strategy.server_learning_rate=1.0"],
    ["strategy.name=fedprox"],
    ["strategy.name=fedprox", "strategy.mu=0.5"],
    ["training.device=cpu"],
    ["training.budget_s=2.5"],
    ["training.work={north=3}"],
    ["training.work={north=4}"],
    ["training.weak={north=0.5}"],
    ["training.weak={north=0.25}"],
    ["training.physical_batch=4"],
    ["training.optimizer=adam"],
    ["regions={north=['a'], south=['b']}"],
    ["regions={north=['a', 'b']}"],
    [PHONES],
    ["simulation.devices={phone={share=0.5}, hub={share=0.5}}"],
    [PHONES, "simulation.devices.phone.share=0.9999999"],
    [PHONES, "simulation.devices.phone.speed=2"],
    [PHONES, "simulation.devices.phone.availability=0.9"],
    [PHONES, "simulation.devices.phone.trains=0.9"],
    [PHONES, "cohort.size=3", "cohort.over=0.5"],
    ["cohort.size=3"],
    ["cohort.minimum=2"],
    [PRIVATE],
    [PRIVATE, "privacy.record.epsilon=1"],
    [PRIVATE, "privacy.record.delta=1e-6"],
    [PRIVATE, "privacy.record.noise_multiplier=1.5"],
    [PRIVATE, "privacy.record.clip_norm=2"],
    [PRIVATE, "privacy.record.spare_rounds=2"],
    [PRIVATE, "privacy.record.clipping=per-layer"],
    ["simulation.engine=flower"],
    ["simulation.evaluate_every=3"],
    ["simulation.noise=seeded"],
    ["simulation.baselines=false"],
    ["simulation.faults.dropout=0.1"],
    ["simulation.faults.malformed=0.1"],
    ["simulation.faults.byzantine=0.2"],
    ["simulation.faults.byzantine=0.2", "simulation.faults.attack=noise"],
    ["simulation.faults.byzantine=0.2", "simulation.faults.scale=3"],
    ["robust.reduce=krum"],
    ["robust.reduce=krum", "robust.byzantine=2"],
    ["robust.max_norm=2"],
    ["robust.max_norm=median"],
    ["robust.memory_mib=9"],
    MEASURED,
    [*MEASURED, f"evaluation.of='{'b' * 64}'"],
    [*MEASURED, f"evaluation.model_hash='{'b' * 64}'"],
    [*MEASURED, "evaluation.run=elsewhere"],
    [*MEASURED, "evaluation.model=own"],
    [*MEASURED, "evaluation.bins=20"],
    [*MEASURED, "evaluation.largest_loss=3"],
    [*MEASURED, "evaluation.sites=20"],
    [*MEASURED, "evaluation.groups={sex={values=['F']}}"],
    [*MEASURED, "evaluation.groups={sex={}}", "evaluation.groups.sex.values=['M']"],
    [*MEASURED, "evaluation.groups={sex={}}", "evaluation.groups.sex.edges=[1.0]"],
    [*MEASURED, "evaluation.groups={sex={values=['F']}}", "evaluation.smallest=5"],
    [*MEASURED, "data.target_type=number", "data.positive=none", "evaluation.target_range=[0, 1]"],
    [*MEASURED, "data.target_type=time", "data.positive=none", "data.event=dead", "evaluation.times=[1.0]"],
]


def sections_of(section: BaseModel) -> Iterator[BaseModel]:
    yield section
    for name in type(section).model_fields:
        value = getattr(section, name)
        inner = list(value.values()) if isinstance(value, dict) else [value]
        for below in inner:
            if isinstance(below, BaseModel):
                yield from sections_of(below)


def test_no_key_of_a_job_can_be_assigned_or_removed() -> None:
    job = check_job(EVERY_SECTION, where="a test")
    forecast = check_job(FORECASTING, where="a test").data.forecast
    tuning = check_job(TUNING, where="a test").task.tuning
    assert tuning is not None
    evaluation = check_job(EVALUATING, where="a test").evaluation
    assert forecast is not None
    assert evaluation is not None
    before, seen = job.hash, 0
    for section in [*sections_of(job), forecast, tuning, *sections_of(evaluation)]:
        for name in type(section).model_fields:
            seen += 1
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, name, getattr(section, name))
            with pytest.raises(ValidationError, match="frozen"):
                delattr(section, name)
    assert seen == len(list(known_keys(Job)))
    assert job.hash == before
    assert Job.model_validate(EVERY_SECTION).hash == before


class TestSecureAggregation:
    """Every combination that is refused is explained."""

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"privacy": {"client": {"placement": "distributed"}}, "secure_aggregation": None}, "needs [secure_agg"),
            ({"cohort": {"rate": 0.5}, "privacy": {"client": {}}}, "counts on nobody seeing"),
            ({"cohort": {"separation": 2}, "privacy": {"client": {"noise": "blt"}}}, "correlated over rounds is not"),
            ({"privacy": {"client": {}}, "secure_aggregation": {"bits": 16, "reach": 1.0}}, "leave out bits, groups"),
            (
                {"privacy": {"client": {}}, "secure_aggregation": {"groups": 3}, "robust": {"reduce": "median"}},
                "leave out bits, groups",
            ),
            (
                {"cohort": {"size": 9}, "secure_aggregation": {"groups": 3}, "robust": {"reduce": "median"}},
                "leave out cohort.size",
            ),
            ({"secure_aggregation": {"groups": 3}}, "groups and robust.reduce go together"),
            ({"robust": {"reduce": "median"}}, "nobody sees one update; set secure_aggregation.groups = 5"),
            ({"secure_aggregation": {"groups": 2}, "robust": {"reduce": "median"}}, "two groups have no majority"),
            ({"privacy": {"record": {}}, "secure_aggregation": {"retries": 1}}, "each retry is a new release"),
            ({"secure_aggregation": {"bits": 16}}, "give reach"),
            ({"secure_aggregation": {"bits": 24}}, "secure_aggregation.bits"),
            ({"secure_aggregation": {"colluders": -1}}, "greater than or equal to 0"),
            ({"secure_aggregation": True}, "secure_aggregation: should be a table, got True"),
            (
                {"privacy": {"client": {"placement": "distributed"}}, "secure_aggregation": {"reach": 1.0}},
                "leave it out",
            ),
            (
                {"privacy": {"client": {"placement": "distributed", "clipping": "per-layer"}}},
                "rotates the whole vector",
            ),
            ({"privacy": {"client": {"placement": "distributed", "noise": "blt"}}}, "one place must remember it"),
            ({"privacy": {"client": {"placement": "distributed", "adaptive_clip": {}}}}, "adaptive_clip needs"),
            ({"privacy": {"client": {"placement": "local", "shares": "skellam"}}}, "added up from shares"),
            ({"strategy": {"weighting": "rows"}, "privacy": {"client": {"placement": "distributed"}}}, "alike"),
        ],
    )
    def test_what_cannot_work_is_refused_with_the_reason(self, changes: dict[str, Any], said: str) -> None:
        spent = {"delta": 1e-5, "epsilon": 1.0}
        privacy = {unit: {**spent, **own} for unit, own in changes.get("privacy", {}).items()}
        base = {"strategy": {"weighting": "equal"}, "secure_aggregation": {}}
        with pytest.raises(JobError) as caught:
            make_job(**{**base, **changes, "privacy": privacy})
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "changes",
        [
            {"privacy": {"record": {"delta": 1e-5, "epsilon": 1.0}}},
            {"privacy": {"client": {"delta": 1e-5, "epsilon": 1.0, "placement": "distributed"}}},
            {"privacy": {"client": {"delta": 1e-5, "noise_multiplier": 1.0, "placement": "local"}}},
            {"cohort": {"size": 9, "minimum": 7}},
            {"privacy": {"client": {"delta": 1e-5, "epsilon": 1.0, "adaptive_clip": {}, "clipping": "per-layer"}}},
            {"secure_aggregation": {"groups": 5}, "robust": {"reduce": "trimmed-mean"}},
        ],
    )
    def test_what_can_work_is_taken(self, changes: dict[str, Any]) -> None:
        job = make_job(**{"strategy": {"weighting": "equal"}, "secure_aggregation": {}, **changes})
        assert job.secure_aggregation is not None


class TestTraining:
    @given(rows=st.integers(1, 10**6), size=st.integers(1, 10**6))
    def test_a_batch_is_never_more_than_all_rows(self, rows: int, size: int) -> None:
        training = make_job(training={"batch_size": size}).training
        assert 0 < training.rate_for(rows) <= 1
        assert training.rate_for(rows) * rows == pytest.approx(min(size, rows))

    @pytest.mark.parametrize(
        ("lengths", "rows", "steps"),
        [
            ({"local_steps": 7}, 3, 7),
            ({"local_steps": None, "local_epochs": 1, "batch_size": 4}, 12, 3),
            ({"local_steps": None, "local_epochs": 5, "batch_size": 4}, 12, 15),
            ({"local_steps": None, "local_epochs": 2, "batch_size": 4}, 3, 2),
            ({"local_steps": None, "local_epochs": 1, "batch_size": None, "sampling_rate": 0.01}, 3, 100),
            ({"local_steps": None, "local_epochs": 1, "batch_size": None, "sampling_rate": 1.0}, 3, 1),
        ],
    )
    def test_an_epoch_is_as_many_steps_as_see_each_row_once_on_average(
        self, lengths: dict[str, Any], rows: int, steps: int
    ) -> None:
        assert make_job(training=lengths).training.steps_for(rows) == steps


def test_a_job_file_that_may_not_be_read_is_refused_in_one_line(job_file: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    job_file.chmod(0)
    assert "cannot be read" in mistake(job_file)


def test_an_override_reaches_a_column_whose_name_has_spaces_dots_and_equal_signs(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    raw = raw_job()
    raw["data"]["columns"]["mean radius, v1.0 = new"] = {"range": [0.0, 1.0]}
    path.write_text(tomli_w.dumps(raw))
    job = load_job(path, ['data.columns."mean radius, v1.0 = new".range=[0.0, 2.0]'])
    assert job.data.columns["mean radius, v1.0 = new"].range == (0.0, 2.0)


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbf" + tomli_w.dumps(raw_job()).encode())
    assert load_job(path).name == raw_job()["name"]


class TestSchedule:
    @pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "step"])
    @pytest.mark.parametrize("warmup", [0, 3])
    def test_a_share_rises_while_it_warms_up_then_never_rises_again(self, kind: Any, warmup: int) -> None:
        schedule = Schedule(kind=kind, warmup=warmup, every=4)
        shares = [schedule.share(number, 20) for number in range(1, 21)]
        assert all(0 < share <= 1 for share in shares)
        assert shares[warmup] == 1.0
        assert shares[:warmup] == sorted(set(shares[:warmup]))
        assert shares[warmup:] == sorted(shares[warmup:], reverse=True)

    def test_the_shares_are_those_that_the_kinds_name(self) -> None:
        # Rounds 1, 6 and 10 of ten: none, half and nine tenths of the way done.
        for kind, last, expected in [
            ("linear", 0.0, [1, 0.5, 0.1]),
            ("linear", 0.2, [1, 0.6, 0.28]),
            ("cosine", 0.0, [1, 0.5, (1 + math.cos(0.9 * math.pi)) / 2]),
            ("constant", 0.0, [1, 1, 1]),
        ]:
            schedule = Schedule(kind=kind, last=last)  # type: ignore[arg-type]
            assert [schedule.share(number, 10) for number in (1, 6, 10)] == pytest.approx(expected)
        steps = Schedule(kind="step", factor=0.1, every=3)
        assert [steps.share(number, 10) for number in (1, 3, 4, 10)] == pytest.approx([1, 1, 0.1, 0.001])

    def test_the_local_learning_rate_is_the_rounds_share_of_it(self) -> None:
        job = make_job(training={"rounds": 2, "schedule": {"kind": "linear"}})
        assert [job.training.learning_rate_in(number) for number in (1, 2)] == [0.5, 0.25]
