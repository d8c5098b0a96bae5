"""A trainer without torch for small devices: a linear head on the features of a frozen encoder, in numpy.

It takes part in jobs of `task.name = "text-classification"` with `task.tuning.method = "head"`, beside sites that train
with torch: the same vector, the same loss, under record-level privacy the same batches and noise from the same source.
Features come from the export in the checkpoint's folder (`client.onnx_features`), once, when a job is opened. torch,
pandas and scikit-learn are never imported: a table is a CSV file or JSON lines.

Errors name the file, the column and how many rows are wrong; they never repeat a value, because a value is a record.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.onnx_features import features_of, lengths_of, open_export
from client.scores import f1, roc_auc
from client.tokens import tokens
from privacy.dpsgd import RecordLevelSgd
from privacy.errors import DataError, JobError
from privacy.noise import NoiseSource, poisson_sample
from strategies.checkpoint import configuration, locate
from strategies.job import Job, Training
from strategies.job_data import Data
from strategies.parameters import Parameters, Vector
from strategies.sections import Section

if TYPE_CHECKING:
    from client.adjustment import Adjustment

NUMBERS_AT_ONCE = 2**18  # Of per-example gradients: with their copy in float64, 3 MB.

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Training or test rows: `features` (n, width) float32, `targets` (n,) int64 class numbers, `lengths` (n,) int64,
    the tokens that each text had."""

    features: Floats
    targets: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: NDArray[np.int64]) -> Rows:
        return Rows(self.features[rows], self.targets[rows], self.lengths[rows])


@dataclass(frozen=True)
class EdgeData:
    """One device's training and test rows."""

    train: Rows
    test: Rows


class EdgeTrainer:
    """What `client.training.Trainer` is, for a linear head on rows of `width` numbers: two classes make one logit.

    `device` is what the site says it trains on.
    """

    def __init__(self, training: Training, *, width: int, classes: int, device: str = "cpu") -> None:
        self.device, self._training = device, training
        self._width, self._outputs = width, 1 if classes == 2 else classes
        self.parameters = Parameters({"head.weight": (self._outputs, width), "head.bias": (self._outputs,)})
        self._flat = np.zeros(self.parameters.size, dtype=np.float32)

    def read(self) -> Vector:
        """The parameters as (P,) float32, a view: copy it before the next `load`."""
        return self._flat

    def load(self, model: Vector) -> None:
        self._flat[:] = model

    def place(self, rows: Rows) -> Rows:
        """The rows themselves: they are where they are trained on."""
        return rows

    def by_length(self, rows: Rows) -> Rows:
        """The shortest texts first, as the torch trainer has them: which rows a batch takes goes by their places."""
        return rows.take(np.argsort(rows.lengths, kind="stable"))

    def train(
        self,
        rows: Rows,
        *,
        seed: int,
        adjust: Adjustment | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Plain SGD in place, until `enough`, asked after each step, says so; returns the sums over all examples seen
        of `loss` and of `examples`.

        Batches are cut from fresh permutations of the rows, drawn from `seed`: of the same law as the torch trainer's,
        but not the same ones, as numpy cannot draw what torch.randperm does. Only private training is equal in numbers.
        """
        batch = max(1, round(self._training.rate_for(len(rows)) * len(rows)))
        rate = self._training.learning_rate if learning_rate is None else learning_rate
        change, batches = self._adjusted(adjust), _batches(len(rows), batch, seed)
        loss_sum, examples = 0.0, 0
        for _ in range(self._training.steps_for(len(rows)) if steps is None else steps):
            chosen = rows.take(next(batches))
            outputs = self.outputs(chosen.features)
            loss_sum += float(_losses(outputs, chosen.targets).sum(dtype=np.float64))
            slopes = _slopes(outputs, chosen.targets) / np.float32(len(chosen))
            self._step(np.concatenate([(slopes.T @ chosen.features).ravel(), slopes.sum(axis=0)]), change, rate)
            examples += len(chosen)
            if enough():
                break
        return {"loss": loss_sum, "examples": float(examples)}

    def train_privately(
        self,
        rows: Rows,
        sgd: RecordLevelSgd,
        source: NoiseSource,
        *,
        adjust: Adjustment | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """DP-SGD in place, as `RecordLevelSgd.train` does it and under the same event. Returns nothing: a training loss
        would be one more release."""
        source.words(1)  # Of which the torch trainer seeds its layers: the words that follow are the same.
        rate = self._training.learning_rate if learning_rate is None else learning_rate
        change, expected_batch = self._adjusted(adjust), sgd.sampling_rate * len(rows)
        for _ in range(sgd.steps):
            chosen = poisson_sample(source, len(rows), sgd.sampling_rate)
            total = np.zeros(self.parameters.size, dtype=np.int64)
            for gradients in self._per_example(rows, chosen):
                total += sgd.mechanism.quantised_sum(gradients)
            noisy = sgd.mechanism.release(total, source)
            self._step((noisy / expected_batch).astype(np.float32), change, rate)

    def _per_example(self, rows: Rows, chosen: NDArray[np.int64]) -> Iterator[Floats]:
        """(B, P) float32: the gradient of each example's loss alone, of a few at once. The outer product of what the
        logits and the features are, so that it takes no way back through a model."""
        at_once = max(1, NUMBERS_AT_ONCE // self.parameters.size)
        for start in range(0, len(chosen), at_once):
            piece = rows.take(chosen[start : start + at_once])
            slopes = _slopes(self.outputs(piece.features), piece.targets)
            outer = slopes[:, :, None] * piece.features[:, None, :]
            yield np.concatenate([outer.reshape(len(piece), -1), slopes], axis=1)

    def _step(self, gradient: Floats, change: Callable[[Floats], None], rate: float) -> None:
        change(gradient)
        self._flat -= np.float32(rate) * gradient

    def _adjusted(self, adjust: Adjustment | None) -> Callable[[Floats], None]:
        """What happens to each gradient before it is a step, in the order of `client.training.Trainer`."""
        decay, w = np.float32(self._training.weight_decay), self._flat
        adam = Adam(np.zeros_like(w), np.zeros_like(w)) if self._training.optimizer == "adam" else None

        def change(gradient: Floats) -> None:
            if adam is None:
                gradient += decay * w
            if adjust is not None and adjust.pull:
                assert adjust.towards is not None
                gradient += np.float32(adjust.pull) * (w - adjust.towards)
            if adjust is not None and adjust.drift is not None:
                gradient += adjust.drift
            if adam is not None:
                adam.direct(gradient)
                gradient += decay * w
            if adjust is not None and adjust.frozen is not None:
                gradient[adjust.frozen] = 0.0

        return change

    def loss(self, rows: Rows) -> float:
        """The mean loss of the loaded model over `rows`."""
        return float(_losses(self.outputs(rows.features), rows.targets).mean(dtype=np.float64))

    def try_out(self, rows: Rows) -> None:
        """Raise `JobError` where the export made features that are no numbers."""
        if not np.isfinite(rows.features).all():
            raise JobError("task.checkpoint: the ONNX export makes features that are not finite; export it again")

    def figures(self, outputs: Floats, targets: NDArray[np.int64]) -> dict[str, float | None]:
        """Loss and accuracy, and of two classes the area under the ROC curve and F1; None where these rows do not
        define one."""
        found = {
            name: float(values.mean(dtype=np.float64)) if len(targets) else math.nan
            for name, values in _metrics(outputs, targets).items()
        }
        if self._outputs == 1 and len(targets):
            found |= {"auc": roc_auc(outputs[:, 0], targets == 1), "f1": f1(outputs[:, 0] > 0, targets == 1)}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def evaluate(self, features: Floats, targets: NDArray[np.int64]) -> Mapping[str, Floats]:
        """Per-example metrics of the loaded model, each (B,)."""
        return _metrics(self.outputs(features), targets)

    def outputs(self, features: Floats) -> Floats:
        """The logits of each row, (B, 1) or (B, classes)."""
        ends = self._outputs * self._width
        logits: Floats = features @ self._flat[:ends].reshape(self._outputs, self._width).T + self._flat[ends:]
        return logits


@dataclass
class Adam:
    """`client.training.Adam`, on arrays."""

    first: Floats
    second: Floats
    steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def direct(self, gradient: Floats) -> None:
        """Replace `gradient` ((P,) float32) by the direction of the next step."""
        self.steps += 1
        (one, other), steps = self.betas, self.steps
        self.first += np.float32(1 - one) * (gradient - self.first)
        self.second += np.float32(1 - other) * (gradient * gradient - self.second)
        size = np.sqrt(self.second / np.float32(1 - other**steps)) + np.float32(self.epsilon)
        gradient[:] = self.first / size / np.float32(1 - one**steps)


def _batches(rows: int, batch: int, seed: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(rows)
        yield from (order[start : start + batch] for start in range(0, rows, batch))


def _losses(outputs: Floats, targets: NDArray[np.int64]) -> Floats:
    if outputs.shape[1] == 1:
        logits = outputs[:, 0]
        logistic: Floats = np.maximum(logits, 0) - logits * targets.astype(np.float32)
        return logistic + np.log1p(np.exp(-np.abs(logits)))
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    losses: Floats = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]
    return losses


def _slopes(outputs: Floats, targets: NDArray[np.int64]) -> Floats:
    """What each example's loss changes by with its logits: the probabilities, less 1 at the class that it is."""
    if outputs.shape[1] == 1:
        chances: Floats = np.tanh(outputs * np.float32(0.5)) * np.float32(0.5) + np.float32(0.5)
        return chances - targets[:, None].astype(np.float32)
    shares: Floats = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(len(targets)), targets] -= 1
    return shares


def _metrics(outputs: Floats, targets: NDArray[np.int64]) -> dict[str, Floats]:
    predicted = outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    return {"loss": _losses(outputs, targets), "accuracy": (predicted == targets).astype(np.float32)}


def open_edge(job: Job, *, site: str, path: Path) -> tuple[EdgeTrainer, EdgeData]:
    """Read a device's records, make features of them, and what trains on these.

    Raises `JobError` for a job that a device without torch cannot take part in as a torch site would, or whose export
    is absent or of another model; `DataError` for records that are not what the schema says.
    """
    check_edge(job)
    choice, data = job.task, job.data
    assert choice.checkpoint is not None
    assert choice.tuning is not None
    folder = locate(choice.checkpoint)
    ((name, column),) = data.columns.items()
    assert column.tokenizer is not None
    assert column.length is not None
    most = configuration(folder).get("max_position_embeddings")
    if most is not None and column.length > most:
        raise JobError(
            f"data.columns: texts of {column.length} tokens are longer than the {most} that the model has places for; "
            "lower length"
        )
    wanted = {"checkpoint_hash": choice.checkpoint_hash, "tokenizer_hash": choice.tokenizer_hash}
    export = open_export(folder, wanted, depth=choice.tuning.depth)
    texts, targets, kept, held_out = _records(path, data, name)
    training, testing = _apart(targets, data, kept=kept, held_out=held_out, site=site)
    rows = tokens(texts, column.tokenizer, column.length)
    every = Rows(features_of(rows, export, scale=choice.tuning.scale), targets, lengths_of(rows))
    classes = len(data.classes) if data.classes is not None else 2
    device = f"cpu (numpy, features by ONNX {export.precision} {export.sha256})"
    trainer = EdgeTrainer(job.training, width=export.width, classes=classes, device=device)
    return trainer, EdgeData(every.take(training), every.take(testing))


def check_edge(job: Job) -> None:
    """Raise `JobError`, by name, for a job that a device without torch cannot take part in."""
    choice, data = job.task, job.data
    tuning, held = choice.tuning, data.held_out
    (column, *_) = data.columns.values()
    other = None
    if job.evaluation is not None:
        other = "the job is an evaluation"
    elif choice.name != "text-classification" or choice.model != "pretrained":
        other = f'the job has task.name = "{choice.name}" with task.model = "{choice.model}"'
    elif tuning is None or tuning.method != "head":
        other = f'the job has task.tuning.method = "{tuning.method if tuning is not None else "lora"}"'
    elif column.type != "tokens" or data.target_type not in (None, "class"):
        other = 'the job\'s data are not texts of type "tokens" with a class each'
    elif job.training.device in ("cuda", "mps"):
        other = f'the job has training.device = "{job.training.device}"'
    elif further := _unknown(choice, _TASK) or _unknown(tuning, _TUNING) or _unknown(job.training, _TRAINING):
        other = f"the job sets {further!r}, which it does not know"
    elif data.separator == " " or (held is not None and held.arrays is not None):
        other = "the job's files are neither CSV with a separator nor JSON lines"
    if other is not None:
        raise JobError(
            f'trainer.engine = "edge" trains the head of a frozen encoder of texts on a CPU, and {other}; '
            'set trainer.engine = "torch" at this site, or leave it out of the job'
        )
    if job.stratified and held is None:
        raise JobError(
            'trainer.engine = "edge" splits rows by their places alone, and this job by class too; set '
            "data.stratify = false"
        )


# What is followed here. A setting that is younger than this file is refused, not passed over.
_TASK = "name model checkpoint checkpoint_hash tokenizer_hash tuning precision checkpointing"
_TUNING = "method layers depth head_rounds scale"
_TRAINING = (
    "rounds learning_rate schedule local_steps local_epochs batch_size sampling_rate optimizer weight_decay budget_s "
    "work weak physical_batch device"
)


def _unknown(section: Section, known: str) -> str | None:
    """The first setting of a section that is not its default, and not known."""
    fields = type(section).model_fields.items()
    given = (name for name, field in fields if getattr(section, name) != field.get_default(call_default_factory=True))
    return next((name for name in given if name not in known.split()), None)


@dataclass(frozen=True)
class _Table:
    """Of each row the text, the target, and what says whether it is held out; None where one is missing."""

    texts: list[str | None]
    targets: list[Any]
    marks: list[Any]


def _records(
    path: Path, data: Data, name: str
) -> tuple[list[str], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_] | None]:
    """The complete rows' texts and class numbers, which rows of the table they are, and which of them are for testing,
    where that is laid down; as `client.data.encode` has it."""
    table, held, where = _read(path, data, name), data.held_out, str(path)
    testing: NDArray[np.bool_] | None = None
    if held is not None and held.path is not None:
        more = _read(path.parent / held.path, data, name, which=" (data.held_out)")
        testing = np.arange(len(table.texts) + len(more.texts)) >= len(table.texts)
        table = _Table(table.texts + more.texts, table.targets + more.targets, [])
    elif held is not None:
        wanted = {str(value) for value in held.values or []}
        testing = np.array([str(mark) in wanted for mark in table.marks], dtype=bool)
    targets, known = _class_numbers(table.targets, data, where)
    kept = known & np.array([text is not None for text in table.texts], dtype=bool)
    if not kept.all() and data.on_missing != "drop":
        missing = {name: table.texts.count(None), data.target: int((~known).sum())}
        raise DataError(
            f"{where}: {int((~kept).sum())} of {len(kept)} rows have missing values (most in column "
            f'{max(missing, key=lambda one: missing[one])!r}); mend them or set data.on_missing = "drop"'
        )
    texts = [text for text, there in zip(table.texts, kept, strict=True) if there and text is not None]
    if not texts:
        raise DataError(f"{where}: no rows" + (" left without missing values" if len(kept) else ""))
    return texts, targets[kept], kept, None if testing is None else testing[kept]


def _class_numbers(values: Sequence[Any], data: Data, where: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    classes = data.positive if data.positive is not None else data.classes if data.classes is not None else [0, 1]
    numeric = all(isinstance(value, int | float) for value in classes)
    parsed = [None if value is None else _number(value) if numeric else str(value) for value in values]
    keys = [float(value) if numeric else str(value) for value in classes]
    if numeric:
        unread = [value is not None and math.isnan(one) for value, one in zip(values, parsed, strict=True)]  # type: ignore[arg-type]
        _refuse(unread, data.target, "not a number (data.target)", where)
    if data.positive is not None:
        numbers: list[int | None] = [int(one in keys) for one in parsed]
    else:
        places = {key: number for number, key in enumerate(keys)}
        numbers = [None if one is None else places.get(one) for one in parsed]
        what = f"not among data.classes ({len(keys)})"
        if not data.classes:
            what = "neither 0 nor 1 (give data.positive or data.classes)"
        strange = [one is not None and found is None for one, found in zip(parsed, numbers, strict=True)]
        _refuse(strange, data.target, what, where)
    known = np.array([value is not None for value in values], dtype=bool)
    return np.array([number or 0 for number in numbers], dtype=np.int64), known


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _refuse(wrong: Sequence[bool], name: str, what: str, where: str) -> None:
    if any(wrong):
        first = wrong.index(True) + 1
        raise DataError(f"{where}: column {name!r}: {sum(wrong)} rows are {what} (the first is data row {first})")


def _read(path: Path, data: Data, name: str, which: str = "") -> _Table:
    """A table's columns that the job names. Raises `DataError` for a file of another kind, or an absent column."""
    mark = data.held_out.column if data.held_out is not None else None
    wanted = [name, data.target, *([mark] if mark is not None else [])]
    if path.suffix in (".parquet", ".pq", ".npz") or path.is_dir():
        raise DataError(f'{path}: trainer.engine = "edge" reads CSV files and JSON lines (.jsonl); convert it')
    lines = path.suffix in (".jsonl", ".ndjson")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            columns = _json_lines(file, wanted) if lines else _csv(file, data, path, wanted)
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file (data.folder says where relative names start)") from None
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        # The parser's text can quote the line it stumbled over, so only its kind is repeated.
        raise DataError(f"{path}: cannot be read as {path.suffix or 'CSV'} ({type(error).__name__})") from None
    for one in wanted:
        if one not in columns:
            close = difflib.get_close_matches(one, [str(other) for other in columns], n=1)
            # The names are not listed: without the header that data.header promises, they are a record's values.
            hint = f"did you mean {close[0]!r}?" if close else "is its first line a header? (else data.header = false)"
            what = "target column" if one == data.target else "column"
            raise DataError(f"{path}{which}: {what} {one!r} is absent; {hint}")
    if lines:
        wrong = [text is not None and not isinstance(text, str) for text in columns[name]]
        _refuse(wrong, name, "not a text", f"{path}{which}")
    return _Table(columns[name], columns[data.target], columns[mark] if mark is not None else [])


def _csv(file: Any, data: Data, path: Path, wanted: Sequence[str]) -> dict[str, list[Any]]:
    # Strict: what ends within a quoted field is half a file.
    lines = csv.reader(file, delimiter=data.separator or ",", skipinitialspace=True, strict=True)
    filled = (line for line in lines if line not in ([], [""]))
    names = next(filled, []) if data.header else list(data.names or [])
    missing, places = set(data.missing), {one: names.index(one) for one in wanted if one in names}
    columns: dict[str, list[Any]] = {one: [] for one in names}
    for line in filled:
        if len(line) > len(names):
            raise DataError(f"{path}: its rows have more fields than the {len(names)} names of the columns")
        for one, place in places.items():
            value = line[place] if place < len(line) else None
            columns[one].append(None if value in missing else value)
    return columns


def _json_lines(file: Any, wanted: Sequence[str]) -> dict[str, list[Any]]:
    found = [json.loads(line, parse_constant=_no_constant) for line in file if line.strip()]
    if not all(isinstance(row, dict) for row in found):
        raise ValueError("not an object on each line")
    columns: dict[str, list[Any]] = {str(one): [] for row in found for one in row}
    for one in (one for one in wanted if one in columns):
        columns[one] = [row.get(one) for row in found]
    return columns


def _no_constant(_name: str) -> Any:
    raise ValueError("NaN and Infinity are no JSON")


def _apart(
    targets: NDArray[np.int64],
    data: Data,
    *,
    kept: NDArray[np.bool_],
    held_out: NDArray[np.bool_] | None,
    site: str,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which rows are for training and which for testing, the same ones as `client.data.split` without `stratify`."""
    if held_out is not None:
        if held_out.all():
            raise DataError(f"site {site}: all its rows are held out for testing: none is left to train on")
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if len(targets) < 2:
        raise DataError(f"site {site}: {len(targets)} row is too few to train and test on")
    if len(np.unique(targets)) < 2 and not data.allow_one_class:
        raise DataError(
            f"site {site}: all its rows are of one class, so it cannot learn to tell two apart; check "
            f"data.target ({data.target!r}), leave the site out, or set data.allow_one_class = true"
        )
    testing = math.ceil(data.test_fraction * len(kept))
    if math.ceil(data.test_fraction * len(targets)) == len(targets):
        raise DataError(
            f"site {site}: {len(targets)} rows leave none to train on at data.test_fraction = {data.test_fraction:g}"
        )
    # As scikit-learn's ShuffleSplit draws them: over all rows of the table, so that a missing value moves no other row.
    order = np.random.RandomState(data.split_seed).permutation(len(kept))
    index = np.cumsum(kept) - 1
    test, train = (index[each[kept[each]]] for each in (np.sort(order[:testing]), np.sort(order[testing:])))
    if not len(train) or not len(test):
        raise DataError(f"site {site}: too few complete rows to train and test on")
    return train, test
