"""What a finished run's model makes of records that nobody has labelled yet. They stay on this machine.

| the job's target    | a prediction                                                                          |
|---------------------|---------------------------------------------------------------------------------------|
| a class             | the likeliest class, its probability, and that of each class                          |
| tags                | the likeliest class of each word that the model saw                                   |
| a number            | the number, in the target's own unit                                                  |
| a time              | the risk: higher for who is expected to have the event earlier                        |
| a text              | an answer of at most `data.target_length` tokens, each the likeliest                  |
| the next token      | how the text goes on, for at most 32 tokens                                           |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from client.data import Records, encode
from client.encodings import PADDING
from client.pretrained import Writer
from client.tables import joined, read_table, require_columns
from client.tokens import reader_of, too_long
from client.trained import Trained
from privacy.errors import JobError
from strategies.job import Job
from strategies.job_data import Data
from strategies.statistics import class_names

CONTINUED = 32  # Tokens that follow a text where the job says no length.
AT_ONCE = 32  # Texts that are written at once.

Prediction = dict[str, str | int | float]


@dataclass(frozen=True)
class Predictions:
    """One of each complete record, in the file's order: its `row` there, from 1, and what is `predicted` of it.

    `cut` says how many texts were longer than the job reads, `dropped` how many records had missing values.
    """

    rows: list[Prediction]
    cut: int
    dropped: int


def predict(trained: Trained, path: Path) -> Predictions:
    """Read `path` as the job reads its records, but for the target, and predict each.

    Raises `DataError` for records that are not as the job's schema says, and `JobError` for a job whose model predicts
    nothing of a record by itself. Neither repeats a value.
    """
    job = trained.job
    check_predicts(job)
    records, cut = unlabelled(path, job)
    kept = np.arange(len(records)) if records.kept is None else np.flatnonzero(records.kept)
    dropped = 0 if records.kept is None else int((~records.kept).sum())
    try:
        found = _predicted(trained, records)
    except JobError:
        raise
    except Exception as error:
        # Its text might show a record.
        raise JobError(f"task.name: the model failed on a record ({type(error).__name__})") from error
    rows = [{"row": int(row) + 1, **one} for row, one in zip(kept, found, strict=True)]
    return Predictions(rows, cut, dropped)


def check_predicts(job: Job) -> None:
    """Raise `JobError` unless the job's shared model predicts something of one record by itself."""
    data = job.data
    why = None
    if data.forecast is not None:
        why = "it predicts the next period of a series from the ones before; `fedchorus evaluate` measures it"
    elif any(column.type == "id" for column in data.columns.values()):
        why = "a rating needs its user's own parameters, which stay at that user's site"
    elif any(column.type == "characters" for column in data.columns.values()):
        why = "a model of characters is only measured; `fedchorus evaluate` does"
    elif data.scaling == "site":
        why = 'data.scaling = "site" standardises by each site\'s own rows, which are not here'
    elif job.strategy.name in ("fedper", "ifca"):
        why = f"{job.strategy.name} leaves a part of each site's model at the site; predict there"
    if why is not None:
        raise JobError(f"job {job.name}: {why}")


def unlabelled(path: Path, job: Job) -> tuple[Records, int]:
    """The records of a file, whatever it has in the target's column, and how many of its texts are cut."""
    data = job.data.model_copy(update={"client": None, "held_out": None})
    frame = joined(read_table(path, data), data).reset_index(drop=True)
    if data.target not in data.columns:  # One that is allowed stands for what is not known, and is not looked at.
        frame[data.target] = _any_target(frame, data)
    if data.event is not None:
        frame[data.event] = 1
    require_columns(frame, data, where=str(path))
    ((name, column), *_) = data.columns.items()
    cut = 0
    if column.type == "tokens" and column.tokenizer is not None and column.length is not None:
        cut = too_long(frame[name].dropna().astype(str).tolist(), column.tokenizer, column.length)
    return encode(frame, data, where=str(path)), cut


def _any_target(frame: pd.DataFrame, data: Data) -> Any:
    match data.target_type:
        case "number":
            return data.target_range[0] if data.target_range is not None else 1.0
        case "time":
            return 1.0
        case "text":
            return ""
        case "tags":
            ((name, _),) = data.columns.items()
            require_columns(frame.assign(**{data.target: ""}), data, where="the file")
            tag = str((data.classes or [""])[0])
            return [" ".join([tag] * len(str(text).split())) for text in frame[name]]
    return (data.classes or data.positive or [0])[0]


def _predicted(trained: Trained, records: Records) -> list[Prediction]:
    task: Any = trained.task
    data = trained.job.data
    if isinstance(trained.model, Writer):
        return [{"prediction": text} for text in _written(trained, trained.model, records)]
    placed = trained.trainer.place(records)
    outputs = trained.trainer.outputs(placed.features).float().cpu()
    if not outputs.isfinite().all():
        raise JobError("task.name: the model answers with numbers that are not finite on some records")
    method = {"number": "natural", "time": "risk"}.get(data.target_type or "class")
    if method is not None and not hasattr(task, method):
        raise JobError(f"task.name: {trained.job.task.name} has no method {method} (docs/extending.md)")
    match data.target_type:
        case "number":
            return [{"prediction": float(value)} for value in task.natural(outputs, placed.targets.cpu())]
        case "time":
            return [{"prediction": float(value)} for value in task.risk(outputs)]
        case "tags":
            return _tags(outputs, records, class_names(data))
    return _classes(outputs, class_names(data))


def _classes(outputs: Tensor, names: Sequence[str]) -> list[Prediction]:
    logits = outputs.double()
    if logits.shape[-1] == 1:
        positive = logits.sigmoid()
        shares = torch.cat([1 - positive, positive], dim=-1)
    else:
        shares = logits.softmax(dim=-1)
    if shares.shape != (len(outputs), len(names)):
        raise JobError(f"task.name: the model does not answer with one logit of each of {len(names)} classes")
    found: list[Prediction] = []
    for row in shares.tolist():
        # Of two classes at one half the first: what evaluations count.
        best = max(range(len(row)), key=row.__getitem__)
        each = {f"p({name})": value for name, value in zip(names, row, strict=True)}
        found.append({"prediction": names[best], "probability": row[best], **each})
    return found


def _tags(outputs: Tensor, records: Records, names: Sequence[str]) -> list[Prediction]:
    best = outputs.argmax(dim=-1).numpy()
    there = records.target != PADDING
    return [{"prediction": " ".join(names[tag] for tag in tags[seen])} for tags, seen in zip(best, there, strict=True)]


def _written(trained: Trained, model: Writer, records: Records) -> list[str]:
    """What the model writes to each text, greedily."""
    data = trained.job.data
    ((_, column),) = data.columns.items()
    assert column.tokenizer is not None
    reader, end = reader_of(column.tokenizer)
    prompts = [row[row != PADDING].astype(int).tolist() for row in records.features[:, : column.length]]
    if data.target_length is None and end is not None:  # What goes on has not ended.
        prompts = [ids[:-1] if ids[-1:] == [end] else ids for ids in prompts]
    wanted = data.target_length or CONTINUED
    texts = [""] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(row)
    for length, rows in by_length.items():
        # Texts of one length together: without padding none depends on what is beside it.
        most = min(wanted, places_left(model, max(1, length)))
        for start in range(0, len(rows) if most else 0, AT_ONCE):
            piece = rows[start : start + AT_ONCE]
            ids = torch.tensor([prompts[row] or [0] for row in piece], device=trained.trainer.device)
            for row, new in zip(piece, generate(model, ids, most=most, end=end), strict=True):
                texts[row] = reader.decode(new, skip_special_tokens=True)
    return texts


def places_left(model: Writer, length: int) -> int:
    """How many tokens the model has places for behind `length` of them."""
    config = model.base.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return CONTINUED * 2**20 if model.kind == "seq2seq" or most is None else max(0, int(most) - length)


def generate(model: Writer, ids: Tensor, *, most: int, end: int | None) -> list[list[int]]:
    """The likeliest next token, again and again: of (n, t) prompts without padding at most `most` tokens each, up to
    and without `end`."""
    import transformers

    base = model.base
    answers = model.kind == "seq2seq"
    start = base.config.decoder_start_token_id if answers else None
    # All that a checkpoint may bring along of its own (sampling, penalties, forced tokens) stays out.
    kind: Any = transformers.GenerationConfig
    base.generation_config = kind(
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end if end is not None else 0,
        decoder_start_token_id=start,
        bos_token_id=None,
    )
    low = base.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=low):
        found = base.generate(inputs=ids, attention_mask=torch.ones_like(ids))
    new = found[:, 1 if answers else ids.shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in new]
