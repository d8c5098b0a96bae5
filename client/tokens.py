"""Texts as tokens, by the tokenizer that the model's checkpoint carries: public, so nothing is measured on a record.

Pure functions of texts; `client.data` checks the columns and says in which file something is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.encodings import PADDING
from privacy.errors import JobError
from strategies.checkpoint import locate

Tokens = NDArray[np.float32]
"""(n, length) float32 token numbers, `PADDING` behind the end of a text. Numbers below 2^24 are exact."""


def tokens(texts: Sequence[str], tokenizer: str, length: int) -> Tokens:
    """The first `length` tokens of each text, the model's special ones among them."""
    return _rows([encoding.ids for encoding in _encode(texts, tokenizer, length)], length)


def too_long(texts: Sequence[str], tokenizer: str, length: int) -> int:
    """How many texts have more than `length` tokens, and are cut."""
    reader, _ = reader_of(tokenizer)
    reader.no_truncation()
    reader.no_padding()
    return sum(len(encoding.ids) > length for encoding in reader.encode_batch(list(texts)))


def answers(texts: Sequence[str], tokenizer: str, length: int) -> Tokens:
    """The tokens of texts that a model is to write, each closed by its end token where it has one and there is room."""
    _, end = reader_of(tokenizer)
    ids = [encoding.ids for encoding in _encode(texts, tokenizer, length)]
    if end is not None:
        ids = [one if one[-1:] == [end] else [*one, end][:length] for one in ids]
    return _rows(ids, length)


def tagged(
    texts: Sequence[str], tags: Sequence[Sequence[int]], tokenizer: str, length: int
) -> tuple[Tokens, NDArray[np.int64]]:
    """Texts of words between spaces, and the class number of each word: their tokens, and for each token its word's
    class where it is the word's first, else `PADDING`: (n, length) int64. A text and its tags are equally long."""
    reader, _ = reader_of(tokenizer)
    reader.enable_truncation(length)
    reader.no_padding()
    encodings = reader.encode_batch([text.split() for text in texts], is_pretokenized=True)
    targets = np.full((len(texts), length), PADDING, dtype=np.int64)
    for row, (encoding, own) in enumerate(zip(encodings, tags, strict=True)):
        before = None
        for place, word in enumerate(encoding.word_ids):
            if word is not None and word != before:
                targets[row, place] = own[word]
            before = word
    return _rows([encoding.ids for encoding in encodings], length), targets


def _encode(texts: Sequence[str], tokenizer: str, length: int) -> Any:
    reader, _ = reader_of(tokenizer)
    reader.enable_truncation(length)
    reader.no_padding()
    return reader.encode_batch(list(texts))


def _rows(ids: Sequence[Sequence[int]], length: int) -> Tokens:
    rows = np.full((len(ids), length), PADDING, dtype=np.float32)
    for row, one in enumerate(ids):
        rows[row, : len(one)] = one
    return rows


def reader_of(reference: str) -> tuple[Any, int | None]:
    return _read(locate(reference, key="data.columns.tokenizer"))


@lru_cache(maxsize=4)
def _read(folder: Path) -> tuple[Any, int | None]:
    """The tokenizer in a folder, and the number of the token that ends a text."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise JobError('data.columns: type = "tokens" needs the extra: pip install fedchorus[llm]') from None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise JobError(
            f"task.checkpoint: {folder} has no tokenizer.json; save it once with AutoTokenizer(...).save_pretrained()"
        )
    try:
        reader = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  # The library raises its plain Exception.
        raise JobError(f"task.checkpoint: {path} cannot be read ({type(error).__name__})") from None
    settings = folder / "tokenizer_config.json"
    try:
        said = json.loads(settings.read_text(encoding="utf-8"))["eos_token"] if settings.is_file() else None
    except KeyError:
        said = None
    except (OSError, ValueError, TypeError, RecursionError):
        raise JobError(f"task.checkpoint: {settings} is not valid") from None
    name = said.get("content") if isinstance(said, dict) else said
    return reader, reader.token_to_id(name) if isinstance(name, str) else None
