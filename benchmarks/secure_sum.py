"""A whole secure sum against adding the same vectors in the clear: CPU time, bytes and memory, with and without drops.

All clients and the server run in this process, with real keys, signatures and journals, on a complete graph that bears
30 % of them lost; whoever is lost shares its secrets and then sends no words. A client's time is the mean over those
who did the step, with the encoding of its float32 vector to 32 bits, whose arrays are fresh. The server's time is that
of all its steps up to the ring's sum; "decode" is what float64 of that costs besides. The server finds all vectors and
all masked words in memory, none in the cache. Ratios are of the server's time, and of "with_decode", to

weighted  total += weight * vector, in place: numpy multiplies float32 into a scratch vector that exists and adds that
total     `strategies.total.Total.add`: the same vectors unweighted, added to a float64 sum

of the survivors' vectors, timed in turn. What the journals' fsyncs wait for is in the wall time "with waiting" alone.
"masking" is the memory that tracemalloc sees come and go in a client's `mask`; bytes are of one client's messages
beside its vector. "pace", of one X25519 exchange and of bare AES-256-CTR meanwhile, is what to compare milliseconds of
different machines and hours by; no client can be faster than that cipher, over as many vectors as it has peers and one.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from measure import finish, parser, spread
from numpy.typing import NDArray

from privacy.keys import IdentityKey
from privacy.secagg.client import InMemory, SecureClient
from privacy.secagg.fixed_point import FixedPoint
from privacy.secagg.journal import Journal
from privacy.secagg.ring import Ring
from privacy.secagg.roster import Member, Roster
from privacy.secagg.server import SecureServer
from privacy.secagg.session import Shape, Terms
from strategies.total import Layout, Total

MODEL = "00" * 32
CLIENT_STEPS = ("advertise", "share", "admit", "encode", "mask", "agree", "reveal")


class Costs:
    """CPU and wall seconds, how often, and bytes, by (side, step)."""

    def __init__(self) -> None:
        self.cpu, self.wall = defaultdict[tuple[str, str], float](float), defaultdict[tuple[str, str], float](float)
        self.calls, self.bytes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()

    @contextmanager
    def of(self, side: str, step: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu[side, step] += time.process_time() - cpu
        self.wall[side, step] += time.perf_counter() - wall
        self.calls[side, step] += 1

    def client_ms(self, *, wall: bool = False) -> dict[str, float]:
        """The mean of one client by step, and in all."""
        taken = self.wall if wall else self.cpu
        steps = {step: 1e3 * taken["client", step] / self.calls["client", step] for step in CLIENT_STEPS}
        return {**steps, "all": sum(steps.values())}

    def server_ms(self) -> dict[str, float]:
        steps = {step: 1e3 * seconds for (side, step), seconds in self.cpu.items() if side == "server"}
        all_ms = sum(steps.values())
        return {**steps, "all": all_ms - steps["decode"], "with_decode": all_ms}


class Federation:
    """`clients` sites with a float32 vector of `parameters` each, and one secure sum of these after another."""

    def __init__(self, folder: Path, *, clients: int, parameters: int, dropouts: int | None) -> None:
        slots = range(1, clients + 1)
        keys = {slot: IdentityKey(Ed25519PrivateKey.generate()) for slot in slots}
        members = tuple(Member(slot, f"site-{slot}", keys[slot].public_hex) for slot in slots)
        self.roster = Roster("benchmark", 1, members)
        self.codec = FixedPoint(Ring(32, parameters, 1), clients, 1.0)
        self.terms = Terms(
            federation="benchmark",
            roster=self.roster.hash,
            job="00" * 32,
            colluders=0,
            dropouts=dropouts,
            rounds=10**6,
            cohorts=(tuple(slots),),
            ring=self.codec.ring,
            encoding="benchmark",
        )
        self.clients = {
            slot: SecureClient(
                f"site-{slot}",
                identity=keys[slot],
                roster=self.roster,
                terms=self.terms,
                journal=Journal(folder / f"{clients}-{parameters}-{slot}"),
                store=InMemory(),
            )
            for slot in slots
        }
        self.shape = Shape.of(clients, colluders=0, dropouts=dropouts)
        rng = np.random.default_rng(0)
        self.vectors = {slot: rng.random(parameters, np.float32) - np.float32(0.5) for slot in slots}
        self.weights = {slot: float(rng.uniform(0.5, 1)) for slot in slots}
        self._round = 0

    def run(self, *, lost: int) -> Costs:
        """One round in which the last `lost` clients send no words. The sum is compared with the float64 one."""
        self._round += 1
        costs, of, slots = Costs(), self.clients, tuple(self.clients)
        with costs.of("server", "propose"):
            server = SecureServer(self.terms, self.roster, members=slots, round_number=self._round, model=MODEL)
        gone, masked = set(slots[len(slots) - lost :]), dict[int, NDArray[np.uint8]]()

        def up(step: str, slot: int, message: bytes, *words: NDArray[np.uint8]) -> None:
            costs.bytes["up", "vector"] += sum(part.nbytes for part in words)
            if slot not in gone:
                costs.bytes["up", "messages"] += len(message)
            accept: dict[str, Callable[..., None]] = {
                "advertise": server.add_advert,
                "share": server.add_shares,
                "mask": server.add_masked,
                "agree": server.add_agreement,
                "reveal": server.add_reveal,
            }
            with costs.of("server", step):
                accept[step](slot, message, *words)

        def down(slot: int, message: bytes) -> None:
            if slot not in gone:
                costs.bytes["down", "messages"] += len(message)

        requests = dict.fromkeys(slots, server.proposal)
        for step, end in (("advertise", server.cohort), ("share", server.boxes)):
            for slot, request in requests.items():
                down(slot, request)
                with costs.of("client", step):
                    answer = getattr(of[slot], step)(request)
                up(step, slot, answer)
            with costs.of("server", step):
                requests = end()

        proofs = {}
        for slot in [slot for slot in requests if slot not in gone]:
            down(slot, requests[slot])
            with costs.of("client", "admit"):
                of[slot].admit(requests[slot], round_number=self._round, model=MODEL)
            with costs.of("client", "encode"):
                masked[slot] = self.codec.encode(self.vectors[slot], np.array([self.weights[slot]]))
            with costs.of("client", "mask"):
                proofs[slot] = of[slot].mask(masked[slot])
        for slot, proof in proofs.items():
            up("mask", slot, proof, masked[slot])
        with costs.of("server", "mask"):
            requests = server.survivors()

        for step in ("agree", "reveal"):
            for slot, request in requests.items():
                down(slot, request)
                with costs.of("client", step):
                    answer = getattr(of[slot], step)(request)
                up(step, slot, answer)
            if step == "agree":
                with costs.of("server", step):
                    requests = server.evidence()
        with costs.of("server", "finish"):
            summed = server.finish()
        with costs.of("server", "decode"):
            body, tail = self.codec.decode(summed)
        self._check(body, tail, server.summed)
        return costs

    def _check(self, body: NDArray[np.float64], tail: NDArray[np.float64], survivors: tuple[int, ...]) -> None:
        expected = sum(self.vectors[slot][:1000].astype(np.float64) for slot in survivors)
        error = np.abs(body[:1000] - expected).max()
        if (
            error > len(survivors) * self.codec.step
            or abs(tail[0] - sum(self.weights[slot] for slot in survivors)) > 1e-4
        ):
            raise SystemExit(f"the secure sum is not the sum: off by {error}")

    def masking_bytes(self) -> int:
        """The peak of what one client's `mask` allocates, which it all gives back but its message."""
        self._round += 1
        server = SecureServer(
            self.terms, self.roster, members=tuple(self.clients), round_number=self._round, model=MODEL
        )
        for slot, client in self.clients.items():
            server.add_advert(slot, client.advertise(server.proposal))
        for slot, cohort in server.cohort().items():
            server.add_shares(slot, self.clients[slot].share(cohort))
        boxes, client = server.boxes(), self.clients[1]
        client.admit(boxes[1], round_number=self._round, model=MODEL)
        words = self.codec.encode(self.vectors[1], np.ones(1))
        tracemalloc.start()
        client.mask(words)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak


class InTheClear:
    """What a server without secure sums does with the same vectors."""

    def __init__(self, federation: Federation) -> None:
        self._from = federation
        self._total, self._scratch = (np.zeros(federation.codec.ring.body, np.float32) for _ in range(2))

    def weighted(self, survivors: int) -> float:
        began = time.process_time()
        self._total.fill(0)
        for slot in range(1, survivors + 1):
            np.multiply(self._from.vectors[slot], np.float32(self._from.weights[slot]), out=self._scratch)
            np.add(self._total, self._scratch, out=self._total)
        return 1e3 * (time.process_time() - began)

    def total(self, survivors: int) -> float:
        began = time.process_time()
        total = Total(Layout(self._total.size - 1))
        for slot in range(1, survivors + 1):
            total.add(self._from.vectors[slot])
        return 1e3 * (time.process_time() - began)


def pace_us(exchanges: int = 200) -> float:
    private, public = X25519PrivateKey.generate(), X25519PrivateKey.generate().public_key()
    began = time.process_time()
    for _ in range(exchanges):
        private.exchange(public)
    return 1e6 * (time.process_time() - began) / exchanges


def keystream_gb_per_s(chunks: int = 200) -> float:
    zeros, scratch = bytes(2**17), bytearray(2**17)
    keystream = Cipher(AES256(os.urandom(32)), CTR(bytes(16))).encryptor()
    began = time.process_time()
    for _ in range(chunks):
        keystream.update_into(zeros, scratch)
    return 1e-9 * chunks * len(zeros) / (time.process_time() - began)


def measure(federation: Federation, *, lost: int, rounds: int) -> dict[str, Any]:
    """`rounds` times a secure round and both sums in the clear, in turn, after one warm-up of each."""
    clear, survivors = InTheClear(federation), len(federation.clients) - lost
    costs, weighted, total, pace, keystream = [], [], [], [], []
    for number in range(rounds + 1):
        if number % 2:
            costs.append(federation.run(lost=lost))
        weighted.append(clear.weighted(survivors))
        total.append(clear.total(survivors))
        pace.append(pace_us())
        keystream.append(keystream_gb_per_s())
        if not number % 2:
            costs.append(federation.run(lost=lost))
    del costs[0], weighted[0], total[0]  # The warm-up.
    client, wall = [cost.client_ms() for cost in costs], [cost.client_ms(wall=True)["all"] for cost in costs]
    server, last = [cost.server_ms() for cost in costs], costs[-1]

    def ratio(step: str, other: list[float]) -> dict[str, Any]:
        return spread([ours[step] / theirs for ours, theirs in zip(server, other, strict=True)])

    return {
        "clients": len(federation.clients),
        "parameters": federation.codec.ring.body,
        "lost": lost,
        "client_ms": {step: spread([ms[step] for ms in client]) for step in client[0]},
        "client_wall_ms": spread(wall),
        "server_ms": {step: spread([ms[step] for ms in server]) for step in server[0]},
        "pace_us": spread(pace),
        "pace_gb_per_s": spread(keystream),
        "weighted_ms": spread(weighted),
        "total_ms": spread(total),
        "server_over_weighted": ratio("all", weighted),
        "server_over_total": ratio("all", total),
        "with_decode_over_weighted": ratio("with_decode", weighted),
        "with_decode_over_total": ratio("with_decode", total),
        "up_bytes_beyond_vector": last.bytes["up", "messages"] // survivors
        + last.bytes["up", "vector"] // survivors
        - 4 * federation.codec.ring.body,
        "down_bytes": last.bytes["down", "messages"] // survivors,
    }


def text_of(case: dict[str, Any]) -> list[str]:
    def ms(figures: dict[str, Any]) -> str:
        all_ms = f" ({figures['all']['min']:.1f} to {figures['all']['max']:.1f})"
        return ", ".join(f"{name} {ms['median']:.2f}{all_ms * (name == 'all')}" for name, ms in figures.items())

    def of(name: str) -> str:
        return f"{case[name]['median']:.2f} ({case[name]['min']:.2f} to {case[name]['max']:.2f})"

    return [
        f"{case['clients']} clients, {case['parameters']:,} parameters, {case['lost']} lost:",
        f"  pace: X25519 {of('pace_us')} us, AES-256-CTR {of('pace_gb_per_s')} GB/s",
        f"  client, CPU ms: {ms(case['client_ms'])}; with waiting {of('client_wall_ms')}",
        f"  server, CPU ms: {ms(case['server_ms'])}",
        f"  in the clear, CPU ms: weighted {of('weighted_ms')}, Total.add {of('total_ms')}",
        f"  server / weighted {of('server_over_weighted')}, / Total.add {of('server_over_total')}; "
        f"with decode {of('with_decode_over_weighted')}, {of('with_decode_over_total')}",
        f"  bytes of a client beside the vector: up {case['up_bytes_beyond_vector']}, down {case['down_bytes']}",
    ]


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    sizes = ((20, 10**5, 5), (10, 10**6, 3)) if options.quick else ((20, 10**6, 9), (10, 10**7, 3))
    results, lines = dict[str, Any](), list[str]()
    with TemporaryDirectory() as folder:
        for clients, parameters, rounds in sizes:
            federation = Federation(Path(folder), clients=clients, parameters=parameters, dropouts=clients * 3 // 10)
            for lost in (0, clients // 10, clients * 3 // 10):
                case = measure(federation, lost=lost, rounds=rounds)
                results[f"{clients}_clients_{parameters}_parameters_{lost}_lost"] = case
                lines += text_of(case)
            masking = federation.masking_bytes()
            results[f"{clients}_clients_{parameters}_parameters_masking_bytes"] = masking
            lines.append(f"  masking: {masking / 1e6:.3f} MB beside the vector")
    finish({"secure_sum": results}, as_json=options.json, lines=lines)


if __name__ == "__main__":
    main()
