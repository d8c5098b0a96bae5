"""What a decoder is here: a function of bytes, valid inputs for it, and the errors that it documents.

Anything else that comes out of one ends a process, or shows a person a stack trace.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.fuzz.mutation import Mutate

MODEL = np.array([0.5, -2.0, 4.0], np.float32)
WORDS = np.arange(9, dtype=np.uint8)
DIGEST = "ab" * 32


@dataclass(frozen=True)
class Decoder:
    """`call` decodes one of `corpus`, or raises one of `raises`; `covers` are the functions that it goes through.

    `quotes`: its error may show the one name or value that is wrong, to the person who wrote or carries that file.
    """

    call: Callable[[bytes], object]
    corpus: tuple[bytes, ...]
    raises: tuple[type[Exception], ...]
    covers: tuple[str, ...]
    mutate: tuple[Mutate, ...] = ()
    share: float = 1.0
    quotes: bool = False


class NoResponse(Exception):
    """The API or the guard answered with an error of their own, as they should: no exception came out of it."""


def text_of(data: bytes) -> str:
    """As JSON and Flower give text: it may hold what UTF-8 cannot."""
    return data.decode("utf-8", "surrogateescape")


def der_of(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(pem.splitlines()[1:-1]))


_LITERALS = ["()", "[()]", "('<f4',)", "('<f4',-3)", "{}", "{[]:1}", "None", "'O'", "'<f8'", "'|u1'", "'<U9'", "1e9"]
_LITERALS += [
    "(1L,)",
    "(-1,)",
    "(True,)",
    "(1.5,)",
    "'\\d'",
    "b'x'",
    "[('a','<f4')]",
    "{'a':'<f4'}",
    "1+2j",
    "(2,3)",
    "...",
]
_LITERALS += [f"({2**40},)", f"({'9' * 400},)", "0x" + "f" * 99, "(" * 300]


def other_npy_header(data: bytes, rng: random.Random) -> bytes:
    """An .npy file with other Python literals in its header."""
    parts = {"descr": "'<f4'", "fortran_order": "False", "shape": "(3,)"}
    parts[rng.choice(list(parts))] = rng.choice(_LITERALS)
    text = "{" + ", ".join(f"'{name}': {value}" for name, value in parts.items()) + "}"
    text = rng.choice((text, text, text, rng.choice(_LITERALS))).ljust(rng.choice((0, 60, 9000)))
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data[-12:]
