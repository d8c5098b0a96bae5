"""Inputs for decoders: valid ones broken in every way that a careless, unlucky or hostile sender breaks them."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CANARY = "c4naryThatNoErrorMayShow"  # Planted in what comes; in no text that goes.
_HUGE = [2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
_SNIPPETS = [
    b"\x00",
    b"\xff\xfe",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\r\n",
    b"\n",
    b"\x1b[2J",
    b'"',
    b"\\u0000",
    b"{",
    b"[",
]
_SNIPPETS += [
    b"9" * 400,
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    CANARY.encode(),
    b"\xe2\x80\xa8",
    b"../",
    b"%s%n",
    b"a" * 5000,
]

Mutate = Callable[[bytes, random.Random], bytes]


def mutants(corpus: Sequence[bytes], more: Sequence[Mutate], rng: random.Random, count: int) -> Iterator[bytes]:
    """`count` inputs: most are a valid one that was changed one to three times, the rest are random bytes."""
    ways: list[Mutate] = [flip, truncate, insert, repeat, cut, claim, digits, *(2 * list(more))]
    for _ in range(count):
        dice = rng.random()
        if dice < 0.04:
            yield rng.randbytes(rng.randrange(200))
            continue
        data = rng.choice(corpus)
        if dice < 0.12:
            data = splice(data, rng.choice(corpus), rng)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = rng.choice(ways)(data, rng)
        yield data


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.choice(_SNIPPETS), rng.randbytes(rng.randrange(1, 20)))) + data[at:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:end] + data[start:end] * rng.choice((1, 1, 3)) + data[end:]


def cut(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:start] + data[end:]


def claim(data: bytes, rng: random.Random) -> bytes:
    """Overwrite some bytes by a huge binary number: a length, if it is one there."""
    size = rng.choice((2, 4, 8))
    at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 24) + 1)
    number = struct.pack("<>"[rng.randrange(2)] + {2: "H", 4: "I", 8: "Q"}[size], rng.choice(_HUGE) % 256**size)
    return data[:at] + number + data[at + size :]


def digits(data: bytes, rng: random.Random) -> bytes:
    """Replace a number that is written in digits."""
    found = list(re.finditer(rb"-?[0-9]{1,20}", data[:20_000]))
    if not found:
        return insert(data, rng)
    one = rng.choice(found)
    new = rng.choice((b"-1", b"0", b"1e999", b"1.5", b"true", b"9" * 5000, *(str(huge).encode() for huge in _HUGE)))
    return data[: one.start()] + new + data[one.end() :]


def splice(first: bytes, second: bytes, rng: random.Random) -> bytes:
    return first[: rng.randrange(len(first) + 1)] + second[rng.randrange(len(second) + 1) :]


def confuse_json(data: bytes, rng: random.Random) -> bytes:
    """Put a value of another type in one place of a JSON document, or take a key away, add one or give one twice."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return insert(data, rng)
    places = list(_places(record))
    if not places:
        return insert(data, rng)
    container, key = rng.choice(places)
    dice = rng.random()
    if dice < 0.1:
        del container[key]
    elif dice < 0.2 and isinstance(container, dict):
        container[CANARY] = container[key]
    elif dice < 0.3 and isinstance(container, dict):
        container["\0twice"] = container[key]
        return json.dumps(record).replace('"\\u0000twice"', json.dumps(key)).encode()
    else:
        container[key] = rng.choice(_OTHERS)(container[key])
    text = json.dumps(record)
    depth = rng.choice((30, 300, 900, 100_000))
    text = text.replace('"@deep list@"', "[" * depth + "]" * depth)
    text = text.replace('"@deep table@"', '{"a":' * depth + "0" + "}" * depth).replace('"@digits@"', "9" * 5000)
    return text.encode()


_OTHERS: list[Callable[[Any], Any]] = [
    lambda value: None,
    lambda value: True,
    lambda value: 0,
    lambda value: -1,
    lambda value: 2**63,
    lambda value: 10**400,
    lambda value: 1.5,
    lambda value: float("nan"),
    lambda value: float("inf"),
    lambda value: "",
    lambda value: CANARY,
    lambda value: "\ud800",
    lambda value: "\x00\n\x1b[2J\u2028",
    lambda value: "é" * 40,
    lambda value: "a" * 20_000,
    lambda value: [],
    lambda value: {},
    lambda value: [value],
    lambda value: {CANARY: value},
    lambda value: str(value),
    lambda value: value * 2 if isinstance(value, str | list) else value,
    lambda value: value.upper() if isinstance(value, str) else [value, value],
    lambda value: "@deep list@",
    lambda value: "@deep table@",
    lambda value: "@digits@",
]


def confuse_toml(data: bytes, rng: random.Random) -> bytes:
    """Put a value of another type, a table or a strange key in the place of one line of a TOML document."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    key = lines[at].partition(b"=")[0].strip() or b"name"
    value = rng.choice(_TOML_VALUES)
    lines[at] = rng.choice(
        (
            *(key + b" = " + value, b"unknown = " + value, b'"\\n' + key + b'" = ' + value),
            *(b"[" + key + b"]", b"[[" + key + b"]]", lines[at] + b"\n" + lines[at]),
            b".".join([key] * rng.choice((2, 9, 60, 3000))) + b" = 1",
        )
    )
    return b"\n".join(lines)


_TOML_VALUES = [b"nan", b"-inf", b"0xfff", b"0x" + b"f" * 4000, b"9" * 5000, b"1979-05-27", b"25:61:00", b"[]", b"{}"]
_TOML_VALUES += [
    b"true",
    b'"\\uD800"',
    b'"' + CANARY.encode() + b'"',
    b"'''a\nb'''",
    b"[" * 2000,
    b"[" * 50 + b"]" * 50,
]
_TOML_VALUES += [
    b"{a={a={a=1}}}",
    b'"\\u0000\\u001b[2J"',
    b"[1, 'a', nan]",
    b'"' + b"x" * 20_000 + b'"',
    b"-1",
    b"1e400",
]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(inner)
