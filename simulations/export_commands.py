"""`fedchorus export | predict`: what is done with a model once it is trained. Heavy imports come late."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from client.prediction import Prediction
    from client.trained import Trained

SHOWN = 10  # Predictions that are printed; a file has all of them.
WIDEST = 100  # Characters of one.
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the stack trace of an error.")]
Finished = Annotated[
    Path, typer.Argument(help="A finished run's folder, or one that `fedchorus fetch JOB --out` wrote.", metavar="RUN")
]


def add_to(app: typer.Typer) -> None:
    app.command(name="export", epilog="Example: fedchorus export runs/banks-text-20260101-120000 --out banks")(export)
    app.command(name="predict", epilog="Example: fedchorus predict runs/banks-text-20260101-120000 new.csv")(predict)


def export(
    run: Finished,
    out: Annotated[Path, typer.Option(help="The new folder.", metavar="FOLDER")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Also the base with the adapters multiplied out, in merged/.")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also a classifier as model.onnx, checked against torch.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a fine-tuned model as files that transformers and PEFT read: adapters or base, head, tokenizer, card."""
    from client.artifacts import export as write
    from client.trained import load_trained

    trained = load_trained(run, device="cpu")
    files = write(trained, out, card=_card(run, trained), merged=merged, onnx=onnx)
    if as_json:
        typer.echo(json.dumps({"run": str(run), "folder": str(out), "files": files}))
    else:
        typer.echo("\n".join(str(out / name) for name in files))


def predict(
    run: Finished,
    file: Annotated[
        Path, typer.Argument(help="Records as the job reads them; the target is not needed.", metavar="FILE")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write all predictions into this new CSV file.", metavar="predictions.csv")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Try a finished run's model on a file of records: classes with probabilities, tags, numbers, texts.

    Nothing leaves this machine. At most 10 predictions are printed; --out writes all.
    """
    from client.prediction import check_predicts
    from client.prediction import predict as predicted
    from client.trained import load_trained
    from privacy.errors import RunError

    if out is not None and out.exists():
        raise RunError(f"{out}: is there already; choose another --out")
    trained = load_trained(run, device="auto")
    check_predicts(trained.job)
    found = predicted(trained, file)
    if out is not None:
        _write(out, found.rows)
    if as_json:
        said = {"run": str(run), "records": len(found.rows), "cut": found.cut, "dropped": found.dropped}
        typer.echo(json.dumps({**said, "out": str(out) if out else None, "predictions": found.rows[:SHOWN]}))
        return
    _show(found.rows)
    if found.cut:
        typer.echo(f"{found.cut} texts are longer than the job reads, and were cut")
    if found.dropped:
        typer.echo(f"{found.dropped} records have missing values, and were left out")
    if out is not None:
        typer.echo(f"{len(found.rows)} predictions in {out}")
    elif len(found.rows) > SHOWN:
        typer.echo(f"{SHOWN} of {len(found.rows)} predictions; --out FILE.csv writes all")


def _card(run: Path, trained: Trained) -> str:
    """The run's model card; of a federation's job one of what its coordinator knows."""
    from simulations.model_card import deployed_card

    if (run / "MODEL_CARD.md").is_file():
        return (run / "MODEL_CARD.md").read_text(encoding="utf-8")
    return deployed_card(trained.job, trained.summary, trained.trainer.parameters)


def _write(path: Path, rows: Sequence[Prediction]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Predictions tell of the records: nobody else on this machine reads them.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _show(rows: Sequence[Prediction]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # A pipe has no edge to wrap at.
    named = [name for name in ("row", "prediction", "probability") if name in rows[0]]
    table = Table(*named, box=box.SIMPLE_HEAD)
    for row in rows[:SHOWN]:
        table.add_row(*(Text(_plain(row[name])) for name in named))
    console.print(table)


def _plain(value: str | int | float) -> str:
    """A value on one line; a model's text may hold what moves a terminal's cursor."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
