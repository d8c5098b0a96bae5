"""Every decoder that reads what came over the network or in another party's file: valid inputs, and what may come out.

A decoder here is a function of bytes. `raises` are the errors it documents: anything else that comes out of it ends a
process, or shows a person a stack trace.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate
from flwr.app import Array

from privacy.authority import authority_of, key_of_csr, make_csr, peer_of, peer_of_pem
from privacy.enrolment import EnrolmentRequest, Invitation, Kit, split_address, with_signatures
from privacy.errors import JobError, LedgerCorrupt, Refused, RunError
from privacy.keys import IdentityKey, TlsKey
from privacy.ledger import Head, Ledger, digest_of
from privacy.ledger import parse as parse_ledger
from privacy.secagg.ring import Ring
from privacy.secagg.roster import Roster
from privacy.secagg.server import STAGES
from privacy.secagg.session import Session
from privacy.secagg.view import parse_cohort, read_survivors
from privacy.secagg.wire import ADVERT, Advert, Kind, Reader
from server.commands import _approval
from server.jobs import check_submission
from server.operators import Operator
from strategies.envelope import COORDINATOR, Seal, array_digest
from strategies.job import parse_job
from strategies.messages import (
    NOTHING,
    Agreed,
    Answer,
    Deliver,
    MalformedMessage,
    Offer,
    Refusal,
    Reply,
    Request,
    Step,
    Stepped,
    approval_of,
    ask_for,
    header,
    parse_answer,
    parse_request,
    unflat,
)
from strategies.parameters import Parameters, vector_hash
from tests.deployment.federation import Thorax, deployed_job
from tests.fuzz.decoder import DIGEST, MODEL, WORDS, Decoder, der_of, other_npy_header, text_of
from tests.fuzz.ends import at_the_server, at_the_site
from tests.fuzz.mutation import Mutate, claim, confuse_json, confuse_toml, cut, flip, splice
from tests.privacy.secagg.federation import Federation, Remembered, ask, hand_in, requests


@contextmanager
def registry(folder: Path) -> Iterator[dict[str, Decoder]]:
    """All decoders, by name, with a whole enrolled federation in `folder` for what they are held to."""
    thorax = Thorax(folder)
    with contextlib.ExitStack() as stack:
        yield {
            **_messages(thorax),
            **_secure_sums(),
            **_documents(thorax, folder),
            **_jobs(thorax, folder),
            **at_the_site(thorax, stack),
            **at_the_server(thorax, stack),
        }


# -- what server and sites say to each other ---------------------------------------------------------------------------


def _messages(thorax: Thorax) -> dict[str, Decoder]:
    head = Head(3, DIGEST)
    offer = Offer(DIGEST, "name = 1", DIGEST, 3, DIGEST, "0.1", ((DIGEST, "cd" * 64),))
    asked = ask_for(DIGEST, 2, MODEL, DIGEST, 1.0)
    asks: list[Request] = [asked, Step(DIGEST, 2, "share", b"body"), Step(DIGEST, 2, "mask", b"body", asked), offer]
    asks.append(Deliver(DIGEST, 2, MODEL, vector_hash(MODEL)))
    answers: list[Answer] = [Reply("north", DIGEST, 2, MODEL, head), Refusal("north", DIGEST, 2)]
    answers += [Stepped("north", DIGEST, 2, "mask", b"body", WORDS, head), Agreed("north", DIGEST, 0, None)]
    array = array_digest(MODEL)
    seal = Seal(kind="request", sender=COORDINATOR, recipient="north", nonce=DIGEST, time=1.0, until=2.0)
    sealed = seal.signed(thorax.key, "header", array)

    def check_seal(data: bytes) -> None:
        Seal.parse(text_of(data)).check(thorax.key.public_hex, "header", array, recipient="north")

    return {
        "request": Decoder(
            lambda data: parse_request(text_of(data), MODEL),
            tuple(header(one).encode() for one in asks),
            (MalformedMessage,),
            ("strategies.messages.parse_request", "strategies.messages._parse"),
            (confuse_json,),
        ),
        "answer": Decoder(
            lambda data: parse_answer(text_of(data), WORDS),
            tuple(header(one).encode() for one in answers),
            (MalformedMessage,),
            ("strategies.messages.parse_answer",),
            (confuse_json,),
        ),
        "array": Decoder(
            unflat,
            (Array(MODEL).data, Array(WORDS).data, Array(NOTHING).data, Array(np.zeros((2, 2), np.float64)).data),
            (MalformedMessage,),
            ("strategies.messages.unflat",),
            (other_npy_header,),
        ),
        "seal": Decoder(
            check_seal,
            (sealed.text.encode(), seal.text.encode()),
            (Refused,),
            ("strategies.envelope.Seal.parse",),
            (confuse_json,),
        ),
    }


# -- the secure sum ----------------------------------------------------------------------------------------------------


def _secure_sums() -> dict[str, Decoder]:
    ring = Ring(16, 9, 1)
    one = Federation(None, 4, ring).server()
    proposal = one.proposal
    federation = Federation(None, 4, ring)
    server = federation.server()
    federation.run(server, until="share")
    cohort = requests(server, "share")[1]
    survivors = Federation(None, 4, ring)
    last = survivors.server()
    survivors.run(last, until="agree")

    def reader(data: bytes) -> None:
        read = Reader(data, Kind.BOXES)
        read.table(9)
        read.slots()
        read.end()

    refused = (Refused,)
    decoders = {
        "session": Decoder(
            lambda data: Session.parse(data).check(federation.terms),
            (proposal,),
            (Refused, JobError),
            ("privacy.secagg.session.Session.parse",),
            (confuse_json,),
        ),
        "advert": Decoder(Advert.parse, (cohort[4 : 4 + ADVERT],), refused, ("privacy.secagg.wire.Advert.parse",)),
        "cohort": Decoder(parse_cohort, (cohort,), refused, ("privacy.secagg.view.parse_cohort",)),
        "survivors": Decoder(
            read_survivors, (requests(last, "agree")[1],), refused, ("privacy.secagg.view.read_survivors",)
        ),
        "tables": Decoder(
            reader, (bytes([1, Kind.BOXES, 2, 0, 1, 0]) + bytes(9) + bytes([2, 0]) + bytes(9) + bytes(2),), refused, ()
        ),
    }
    for stage in STAGES:
        decoders |= {f"secure sum, {stage}, at the site": _asked(stage, ring)}
        decoders |= {f"secure sum, {stage}, at the server": _answered(stage, ring)}
    return decoders


def _asked(stage: str, ring: Ring) -> Decoder:
    federation = Federation(None, 4, ring)
    server = federation.server()
    federation.run(server, until=stage)
    message, content = requests(server, stage)[1], federation.stores[1].load()

    def call(data: bytes) -> None:
        federation.stores[1].wipe()
        if content is not None:
            federation.stores[1].save(content)
        federation.clients[1] = federation.client(1, journal=Remembered())  # It has answered nothing yet.
        ask(federation, 1, stage, data)

    mutate = (confuse_json,) if stage == "advertise" else ()
    return Decoder(call, (message,), (Refused, JobError), (), mutate, share=0.4)


def _answered(stage: str, ring: Ring) -> Decoder:
    federation = Federation(None, 4, ring)
    server = federation.server()
    federation.run(server, until=stage)
    reply, words = ask(federation, 1, stage, requests(server, stage)[1])

    def call(data: bytes) -> None:
        fresh = copy.copy(server)  # It has heard nothing from this site yet.
        for name, value in vars(server).items():
            if isinstance(value, dict | set | list):
                setattr(fresh, name, copy.copy(value))
        hand_in(fresh, stage, 1, data, words)

    return Decoder(call, (reply,), (Refused,), (), share=0.4)


# -- documents of an enrolment, certificates, the roster, ledgers ------------------------------------------------------


def _documents(thorax: Thorax, folder: Path) -> dict[str, Decoder]:
    coordinator, north = thorax.coordinator, folder / "north"
    invitation = thorax.invitation
    request_data = (north / "request.json").read_bytes()
    kit_data = (coordinator / "kits" / "north.kit.json").read_bytes()
    request = EnrolmentRequest.parse(request_data, invitation)
    kit = Kit.parse(kit_data, request, invitation)
    authority = authority_of(invitation.authority.encode())
    certificates = [(north / "certificate.pem").read_bytes(), (coordinator / "tls" / "server.pem").read_bytes()]
    certificates.append(invitation.authority.encode())
    ders = [load_pem_x509_certificate(pem).public_bytes(Encoding.DER) for pem in certificates]
    site, tls = IdentityKey.load(north / "keys" / "identity.pem"), TlsKey.load(north / "keys" / "tls.key")
    csrs = (request.csr.encode(), make_csr(tls, "south"))
    ledger = Ledger(folder / "fuzzed.jsonl", "north", site)
    for kind in ("open", "budget", "plan"):
        ledger.append(kind, {"a": [1, 2.5], "b": {"c": None}})
    file = folder / "fuzzed"
    roster = thorax.roster

    def from_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def call(data: bytes) -> object:
            file.write_bytes(data)
            return read(file)

        return call

    def signatures(data: bytes) -> object:
        record = json.loads(data)
        return with_signatures(roster, record) if isinstance(record, dict) else None

    return {
        "invitation": Decoder(
            Invitation.parse,
            (invitation.to_bytes(),),
            (Refused,),
            ("privacy.enrolment.Invitation.parse", "privacy.enrolment._Document._read"),
            (confuse_json, _signed_again(Invitation, thorax.key)),
            quotes=True,
        ),
        "enrolment request": Decoder(
            lambda data: EnrolmentRequest.parse(data, invitation),
            (request_data,),
            (Refused,),
            ("privacy.enrolment.EnrolmentRequest.parse",),
            (confuse_json, _signed_again(EnrolmentRequest, site)),
            quotes=True,
        ),
        "kit": Decoder(
            lambda data: Kit.parse(data, request, invitation),
            (kit.to_bytes(),),
            (Refused,),
            ("privacy.enrolment.Kit.parse", "privacy.secagg.roster._parsed"),
            (confuse_json, _signed_again(Kit, thorax.key)),
            share=0.5,
            quotes=True,
        ),
        "address": Decoder(
            lambda data: split_address(text_of(data)),
            (b"127.0.0.1:9092", b"[::1]:1", b"server.example.org:443"),
            (Refused,),
            ("privacy.enrolment.split_address",),
            quotes=True,
        ),
        "others' signatures": Decoder(
            signatures,
            (json.dumps(dict(roster.signatures)).encode(),),
            (Refused, ValueError, RecursionError),  # The last two are `json.loads`'s, here.
            (),
            (confuse_json,),
        ),
        "roster": Decoder(
            from_file(Roster.load),
            ((north / "roster.json").read_bytes(),),
            (Refused,),
            ("privacy.secagg.roster.Roster.load",),
            (confuse_json,),
            share=0.4,
        ),
        "certificate of a call": Decoder(
            peer_of, tuple(ders), (Refused,), ("privacy.authority.peer_of",), (_other_version,)
        ),
        "certificate in a file": Decoder(
            lambda data: peer_of_pem(data, authority=authority),
            tuple(certificates),
            (Refused,),
            ("privacy.authority.peer_of_pem", "privacy.authority._load_pem"),
            (_other_pem(ders, "CERTIFICATE"),),
        ),
        "authority": Decoder(
            authority_of,
            tuple(reversed(certificates)),
            (Refused,),
            ("privacy.authority.authority_of",),
            (_other_pem(ders, "CERTIFICATE"),),
        ),
        "signing request": Decoder(
            lambda data: key_of_csr(data, "north"),
            csrs,
            (Refused,),
            ("privacy.authority.key_of_csr",),
            (_other_pem([der_of(one) for one in csrs], "CERTIFICATE REQUEST"),),
        ),
        "another's ledger": Decoder(
            lambda data: parse_ledger(data, "north", site.public_hex),
            (ledger.path.read_bytes(), ledger.path.read_bytes().splitlines(keepends=True)[0]),
            (LedgerCorrupt,),
            ("privacy.ledger.parse", "privacy.ledger.read_ledger"),
            (confuse_json,),
        ),
        "operator's file": Decoder(
            from_file(Operator.load),
            ((coordinator / "operator" / "operator.json").read_bytes(),),
            (RunError,),
            ("server.operators.Operator.load",),
            (confuse_json,),
            share=0.3,
        ),
        "approval": Decoder(
            from_file(_approval),
            (json.dumps({"key": DIGEST, "signature": "cd" * 64}).encode(),),
            (JobError,),
            (),
            (confuse_json,),
            share=0.2,
        ),
    }


def _signed_again(kind: type[Invitation | EnrolmentRequest | Kit], key: IdentityKey) -> Mutate:
    """Another body under a good signature: whoever has a key can sign anything."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        try:
            record = json.loads(data)
            record["body"] = json.loads(confuse_json(json.dumps(record["body"]).encode(), rng))
            message = f"{kind.FORMAT} signature\0".encode() + bytes.fromhex(digest_of(record["body"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return confuse_json(data, rng)
        return json.dumps({**record, "signature": key.sign(message).hex()}).encode()

    return mutate


def _other_version(data: bytes, rng: random.Random) -> bytes:
    """A certificate of a version that there is not, or is not any more."""
    version = b"\xa0\x03\x02\x01"
    return data.replace(version + b"\x02", version + bytes([rng.choice((0, 1, 3, 127, 255))]))


def _other_pem(ders: list[bytes], kind: str) -> Mutate:
    """A PEM file whose content was changed beneath its base64."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        der = rng.choice((flip, flip, claim, cut, _other_version))(rng.choice(ders), rng)
        der = splice(der, rng.choice(ders), rng) if rng.random() < 0.1 else der
        return f"-----BEGIN {kind}-----\n{base64.encodebytes(der).decode()}-----END {kind}-----\n".encode()

    return mutate


# -- jobs and models ---------------------------------------------------------------------------------------------------


def _jobs(thorax: Thorax, folder: Path) -> dict[str, Decoder]:
    job = deployed_job()
    record = {"epsilon": 1.0, "delta": 1e-4, "clip_norm": 1.0}
    private = deployed_job(privacy={"record": record}, secure_aggregation={})
    model = folder / "fuzzed.safetensors"
    parameters = Parameters({"weight": (2,), "bias": (1,)})
    parameters.save(MODEL, model, {"job": job.hash, "round": "0"})
    content, file = model.read_bytes(), folder / "fuzzed-model"
    approver = thorax.key
    signature = approver.sign(approval_of(job.hash, vector_hash(MODEL))).hex()

    def load(data: bytes) -> object:
        file.write_bytes(data)
        return Parameters.load(file)

    def submitted(data: bytes) -> object:
        key, _, signed = text_of(data).partition(" ")
        approvers = {"alice": approver.public_hex}
        return check_submission(
            job.toml.decode(), model, [(key, signed)], approvers=approvers, required=1, strategies=()
        )

    return {
        "job": Decoder(
            lambda data: parse_job(text_of(data), where="the offered job"),
            (job.toml, private.toml),
            (JobError,),
            ("strategies.job.parse_job",),
            (confuse_toml,),
            share=0.7,
            quotes=True,
        ),
        "model": Decoder(
            load, (content,), (RunError,), ("strategies.parameters.Parameters.load",), (_other_model,), share=0.4
        ),
        "approvals": Decoder(
            submitted,
            (f"{approver.public_hex} {signature}".encode(),),
            (JobError,),
            ("server.jobs.check_submission",),
            share=0.2,
        ),
    }


def _other_model(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another JSON header of the right length."""
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size] if size < 10_000 else b"{}"
    try:
        table = json.loads(text)
        if rng.random() < 0.5:
            inner = table["__metadata__"]
            inner["fedchorus"] = confuse_json(inner["fedchorus"].encode(), rng).decode("utf-8", "replace")
            text = json.dumps(table).encode()
        else:
            text = confuse_json(text, rng)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = confuse_json(text, rng)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
