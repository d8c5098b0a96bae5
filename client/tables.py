"""A site's records as a table: CSV, Parquet, JSON lines, the arrays of a .npz or a folder of images, with the columns
that a job names.

Errors name the file and the column; they never repeat a value, because a value is a record.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np
import pandas as pd

from client.image_folders import image_table
from privacy.errors import DataError
from privacy.ledger import SITE_NAME
from strategies.job_data import Data

HELD_OUT = "\0held out"  # No file has a column of this name.


def read_frame(path: Path, data: Data) -> pd.DataFrame:
    """Read a file, or a folder of images, with the schema's columns, the target and the client key.

    Values are text, numbers, or images of a .npz. Rows that `data.held_out` finds elsewhere follow, marked in the
    column `HELD_OUT`. Raises `DataError` for a missing or unreadable file or an absent column.
    """
    frame = joined(read_table(path, data), data)
    require_columns(frame, data, where=str(path))
    held = data.held_out
    if held is None or held.column is not None:
        return frame
    other = path if held.path is None else path.parent / held.path
    testing = joined(read_table(other, data, names=held.arrays), data)
    require_columns(testing, data, where=f"{other} (data.held_out)")
    return pd.concat([frame.assign(**{HELD_OUT: False}), testing.assign(**{HELD_OUT: True})], ignore_index=True)


def read_table(path: Path, data: Data, *, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read a file whatever its columns are; of a .npz the arrays that the job names, or that `names` says for them, and
    of a folder the images.

    Raises `DataError` for one that is missing or unreadable.
    """
    try:
        if path.suffix == ".npz":
            frame = _arrays(path, {name: (names or {}).get(name, name) for name in _wanted(data)})
        elif path.suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        elif path.suffix in (".jsonl", ".ndjson"):
            frame = pd.read_json(path, lines=True, dtype=False, encoding="utf-8")
        elif path.is_dir() and [column.type for column in data.columns.values()] == ["image"]:
            frame = image_table(path, data)
        else:
            frame = pd.read_csv(
                path,
                header=0 if data.header else None,
                names=data.names,
                na_values=data.missing,
                keep_default_na=False,
                dtype=str,
                skipinitialspace=True,
                # Spaces align columns: any number of them is one.
                sep=r"\s+" if data.separator == " " else data.separator or ",",
            )
            # Of the first field of rows that have one more than the header pandas makes an index, and shifts the rest.
            if not isinstance(frame.index, pd.RangeIndex):
                raise DataError(f"{path}: its rows have more fields than the {len(frame.columns)} names of the columns")
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file (data.folder says where relative names start)") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, not a data file") from None
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        # The parser's text can quote the line it stumbled over, so only its kind is repeated.
        raise DataError(f"{path}: cannot be read as {path.suffix or 'CSV'} ({type(error).__name__})") from None
    return frame


def _arrays(path: Path, names: Mapping[str, str]) -> pd.DataFrame:
    """A table of arrays of a .npz file, from a column's name to its array's: a cell is one image, or one number."""
    with path.open("rb") as file:  # Opened here, as numpy leaves it open when it is no archive.
        if not is_zipfile(file):
            raise ValueError("not an archive")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return pd.DataFrame({name: list(arrays[own]) for name, own in names.items() if own in arrays.files})


def joined(frame: pd.DataFrame, data: Data) -> pd.DataFrame:
    """`frame` with the texts that the job puts together from several columns (`join`), ". " between them: those of a
    row that are there. A column that is absent makes none: `require_columns` says which."""
    made = {}
    for name, column in data.columns.items():
        if column.join is not None and set(column.join) <= set(frame.columns):
            parts = frame[column.join].astype(object)
            texts = [". ".join(str(part) for part in row if not pd.isna(part)) for row in parts.itertuples(index=False)]
            made[name] = pd.Series(texts, index=frame.index, dtype=object).where(parts.notna().any(axis=1))
    return frame.assign(**made)


def require_columns(frame: pd.DataFrame, data: Data, *, where: str) -> None:
    """Raise `DataError`, with the nearest name, unless the schema's columns, target and client key are all there."""
    for wanted in _wanted(data):
        if wanted not in frame.columns:
            close = difflib.get_close_matches(wanted, [str(name) for name in frame.columns], n=1)
            # The names are not listed: without the header that data.header promises, they are a record's values.
            hint = f"did you mean {close[0]!r}?" if close else "is its first line a header? (else data.header = false)"
            what = "target column" if wanted == data.target else "column"
            raise DataError(f"{where}: {what} {wanted!r} is absent; {hint}")


def _wanted(data: Data) -> list[str]:
    """The columns that the job names, each once."""
    held, series = data.held_out, data.forecast
    columns = [part for name, column in data.columns.items() for part in column.join or [name]]
    others = [held.column if held else None, *((series.time, series.series) if series else ())]
    return list(dict.fromkeys(n for n in [*columns, data.target, data.event, data.client, *others] if n is not None))


def site_frames(frame: pd.DataFrame, client: str, *, where: str, drop: bool = False) -> dict[str, pd.DataFrame]:
    """Split a table by its natural client key; keys become names that are safe in a path.

    Rows without a key are refused, or with `drop` left out.
    """
    if not drop and frame[client].isna().any():
        raise DataError(
            f"{where}: column {client!r} (the client key) is missing in {int(frame[client].isna().sum())} rows"
        )
    frames: dict[str, pd.DataFrame] = {}
    for key, rows in frame.groupby(client, sort=True):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(key)).strip("-._")[:64]
        if not SITE_NAME.fullmatch(name):
            raise DataError(f"{where}: a value of {client!r} has no letter or digit to make a site's name of")
        if name in frames:
            raise DataError(f"{where}: two values of {client!r} both become the site name {name!r}; rename one")
        frames[name] = rows
    return frames
