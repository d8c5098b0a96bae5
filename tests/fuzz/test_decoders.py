"""Whatever comes over the network or in another party's file: a value, or the documented error in one line.

No crash, no hang, no memory that a header merely claims, and nothing of the input in the words. What is broken and
how is seeded, the keys and certificates that it is done to are new each time: a failure shows its decoder and input.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import random
import re
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from privacy.errors import FedchorusError
from strategies.job import MOST_TEXT
from tests.fuzz.decoder import Decoder, NoResponse
from tests.fuzz.decoders import registry
from tests.fuzz.mutation import CANARY, mutants

# Some broken certificates are read with a warning that a later release will refuse them: that is no error of ours.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")

IN_THE_SUITE, IN_ALL = 10_000, 110_000
MOST_SECONDS = 1.0  # Of processor time, so that a busy machine is no hang.
LONGEST_TEXT = 600

# What reads, in the modules that face others. A new function here is registered below its decoder, or exempt with why.
MODULES = (
    *("strategies.messages", "strategies.envelope", "strategies.job", "strategies.parameters", "privacy.enrolment"),
    *("privacy.authority", "privacy.ledger", "privacy.secagg.session", "privacy.secagg.wire", "privacy.secagg.view"),
    *("privacy.secagg.roster", "client.fleet", "client.pipe", "server.api", "server.guard", "server.jobs"),
    *("server.sealed", "server.operators"),
)
READS = re.compile(r"_?(parse|load|read|receive|opened|unflat|unpack|peer_of|key_of|authority_of|json|body|number)")
EXEMPT = {
    "client.pipe.Pipe._read": "bytes into memory that is there; `receive` says how many",
    "client.pipe.Pipe.receive_any": "the child reads from the parent alone; headers go through what `receive` uses",
    "privacy.authority.Authority.load": "the coordinator's own files",
    "privacy.authority.Revocations.readmit": "writes; what it reads is the coordinator's own file",
    "privacy.enrolment._Document._body": "writes",
    "privacy.ledger.LedgerView._read_from": "goes through `parse`",
    "privacy.secagg.roster.Roster.body": "writes",
    "server.guard.Operators._read": "the coordinator's own file",
    "server.guard._Exchange.receive": "counts, and reads nothing",
    "server.jobs._parsed": "the coordinator's own file",
    "strategies.job.load_job": "a person's own file",
    "strategies.messages._body": "one field of a header, which goes through `_parse`",
}


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Decoder]]:
    with registry(tmp_path_factory.mktemp("fuzz")) as found:
        yield found


def held(name: str, decoder: Decoder, data: bytes) -> float:
    """Give `data` to the decoder and hold what comes out to its promise; the seconds it took."""
    began = time.process_time()
    try:
        decoder.call(data)
    except decoder.raises as error:
        said = str(error)
        seconds = time.process_time() - began
        if isinstance(error, FedchorusError | NoResponse):
            shown = f"{name}: {said[:300]!r} for {data[:300]!r}"
            assert said, shown
            assert said.isprintable(), shown  # And so one line.
            assert len(said) <= LONGEST_TEXT + (len(data) if decoder.quotes else 0), shown
            assert decoder.quotes or CANARY not in said, shown
    except BaseException as error:
        error.add_note(f"{name} let this out, for {len(data)} bytes: {data[:4000]!r}")
        raise
    else:
        seconds = time.process_time() - began
    assert seconds < MOST_SECONDS, f"{name} took {seconds:.2f} s for {len(data)} bytes: {data[:300]!r}"
    return seconds


def fuzz(decoders: dict[str, Decoder], *, inputs: int, seed: str) -> tuple[int, float]:
    """Give every decoder its share of `inputs`; how many there were and the slowest of them."""
    whole, done, slowest = sum(decoder.share for decoder in decoders.values()), 0, 0.0
    for name, decoder in decoders.items():
        rng = random.Random(f"{seed} {name}")
        for data in mutants(decoder.corpus, decoder.mutate, rng, round(inputs * decoder.share / whole)):
            slowest, done = max(slowest, held(name, decoder, data)), done + 1
    return done, slowest


def test_ten_thousand_broken_inputs_end_in_the_documented_error(decoders: dict[str, Decoder]) -> None:
    done, _ = fuzz(decoders, inputs=IN_THE_SUITE, seed="suite")
    assert done > 0.99 * IN_THE_SUITE


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_broken_inputs_end_in_the_documented_error(decoders: dict[str, Decoder]) -> None:
    done, slowest = fuzz(decoders, inputs=IN_ALL, seed="slow run")
    print(f"{done} inputs on {len(decoders)} decoders, the slowest took {slowest * 1000:.0f} ms")
    assert done >= 100_000


def test_every_valid_input_is_decoded_or_refused_as_documented(decoders: dict[str, Decoder]) -> None:
    for name, decoder in decoders.items():
        for data in decoder.corpus:
            held(name, decoder, data)
        if name != "an address":  # Where no job is.
            decoder.call(decoder.corpus[0])  # The first is a good one: else only the surface would be fuzzed.


# -- inputs made to hurt -----------------------------------------------------------------------------------------------


def npy(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


def safetensors(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


HUGE = 2**40
TENSOR = {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}
HURTS: list[tuple[str, bytes]] = [
    ("array", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + str(HUGE) + ",), }\n")),
    ("array", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3L,)}".ljust(9000))),  # 23 s in numpy's reader.
    ("array", npy("{'descr': (), 'fortran_order': False, 'shape': (3,)}", bytes(12))),
    ("array", npy("(" * 60_000)),
    ("job", b"a" + b".a" * 300_000 + b" = 1"),  # Hours in tomllib, which takes n^2 steps.
    ("job", b"[" + b"a." * 300_000 + b"a]\n" + b"k = 1\n" * 9),
    ("job", b"\n".join(b"k%d = 1" % number for number in range(5_000))),  # Each once had its nearest key looked up.
    ("job", b"seed = " + b"9" * 5000),
    ("job", b"seed = 0x" + b"f" * 100_000),
    ("job", b"seed = " + b"[" * 500_000),
    ("job", b"x" * (MOST_TEXT + 1)),
    ("session", b'{"members": [' + b"1," * 100_000 + b"1]}"),
    ("request", b'{"v":' * 200_000),
    ("answer", b"[" * 1_000_000),
    ("seal", b"[" * 1_000_000),
    ("tables", bytes([1, 4, 255, 255]) + bytes(100)),
    ("cohort", bytes([1, 2, 255, 255]) + bytes(100)),
    ("survivors", bytes([1, 6, 255, 255]) + bytes(100)),
    ("model", safetensors({"w": TENSOR, "__metadata__": {"fedchorus": '{"order": ["w"]}'}})),
    ("model", safetensors({"__metadata__": {"fedchorus": '{"order":' + "[" * 100_000}})),
    ("model", HUGE.to_bytes(8, "little") + b"{}"),
    ("the trainer's frames", b"fct1" + b"\xff" * 4 + HUGE.to_bytes(8, "little")),
    ("the trainer's frames", b"fct1" + (2).to_bytes(4, "little") + HUGE.to_bytes(8, "little") + b"{}"),
    ("roster", b"[" * 1_000_000),
    ("invitation", b'{"body":' * 5_000),
    ("kit", b'{"a":1,' * 1_000_000),
    ("certificate of a call", b"\x30\x84\x7f\xff\xff\xff" + bytes(1000)),
    ("certificate in a file", b"-----BEGIN CERTIFICATE-----\n" * 500),
    ("a submission", b'{"toml": ' + b"[" * 100_000),
    ("a submission", json.dumps({"toml": "", "model": "../" * 400, "approvals": []}).encode()),
    ("a submission", b'"' + b"a" * 5_000_000 + b'"'),
    ("the door", b'{"since": 1e999, "timeout_s": NaN}'),
    ("an address", b"GET /v1/fedchorus/jobs/" + b"a" * 30_000),
]


@pytest.mark.parametrize(("name", "data"), HURTS, ids=[f"{name} {number}" for number, (name, _) in enumerate(HURTS)])
def test_what_is_made_to_hurt_is_refused_at_once(decoders: dict[str, Decoder], name: str, data: bytes) -> None:
    assert held(name, decoders[name], data) < MOST_SECONDS
    tracemalloc.start()
    try:
        with pytest.raises(decoders[name].raises):
            decoders[name].call(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 * len(data) + 2**22, f"{peak} bytes for an input of {len(data)}"


def test_no_decoder_takes_more_memory_than_some_multiple_of_its_input(decoders: dict[str, Decoder]) -> None:
    tracemalloc.start()
    try:
        for name, decoder in decoders.items():
            rng = random.Random(f"memory {name}")
            for data in mutants(decoder.corpus, decoder.mutate, rng, 12):
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                held(name, decoder, data)
                peak = tracemalloc.get_traced_memory()[1] - before
                # Python's files set aside what is asked of them: 32 MiB, the most that a roster may have.
                assert peak < 40 * len(data) + 2**26, f"{name} took {peak} bytes for {len(data)}: {data[:200]!r}"
    finally:
        tracemalloc.stop()


# -- that nothing is left out ------------------------------------------------------------------------------------------


def readers(module: str) -> set[str]:
    """The functions and methods of a module whose names say that they read something."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    found = [("", node) for node in tree.body] + [
        (f"{one.name}.", node) for one in tree.body if isinstance(one, ast.ClassDef) for node in one.body
    ]
    functions = [(where, node) for where, node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{module}.{where}{node.name}" for where, node in functions if READS.match(node.name)}


def test_the_registry_has_every_function_that_reads_what_others_send(decoders: dict[str, Decoder]) -> None:
    covered = {name for decoder in decoders.values() for name in decoder.covers}
    known = {name for module in MODULES for name in readers(module)}
    assert known - covered - EXEMPT.keys() == set(), "register it in tests/fuzz/decoders.py, or exempt it with a reason"
    assert EXEMPT.keys() - known == set(), "this exemption is for nothing"
    for name in covered:
        module = next(one for one in (*MODULES, "client.node", "client.enrol") if name.startswith(f"{one}."))
        found = importlib.import_module(module)
        for part in name.removeprefix(f"{module}.").split("."):
            found = getattr(found, part)  # What is gone is covered by nothing.


def test_the_fuzzing_would_notice_a_decoder_that_breaks_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.test_decoders.MOST_SECONDS", 0.05)

    def decoder(call: object) -> Decoder:
        return Decoder(call, (b'{"a": [1]}',), (FedchorusError,), ())  # type: ignore[arg-type]

    def spill(data: bytes) -> None:
        raise FedchorusError(data.decode("latin-1"))

    def hang(data: bytes) -> None:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    def crash(data: bytes) -> None:
        json.loads(data)

    for broken, error in ((spill, AssertionError), (hang, AssertionError), (crash, ValueError)):
        with pytest.raises(error):
            fuzz({"broken": decoder(broken)}, inputs=300, seed="a test")
    assert held("sound", decoder(lambda data: None), b"") < 0.05
