"""One whole session with entropy that repeats: a change of any format or derivation shows here, and wants a version.

The digests were taken from this implementation when `test_protocol`'s independent one agreed with its masked words and
sum, and `test_rfc_vectors` with its primitives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from privacy.secagg.ring import Ring
from privacy.secagg.server import STAGES
from tests.privacy.secagg.federation import Federation, ask, hand_in, requests

FROZEN = {
    "advertise to 1": "c98bc0f6b83f9d1973a3d500e49ae941227b93a223c32106ac7c2ae15926e517",
    "advertise from 1": "4e5fd6452760cb12b0641df05158bd150f6f63be483ed847336c0161e12787d2",
    "advertise to 2": "c98bc0f6b83f9d1973a3d500e49ae941227b93a223c32106ac7c2ae15926e517",
    "advertise from 2": "da72e84c8dd36b152cc5dd0ecfdafe0e54bf168f3fbc923c6af61819f7cdeabd",
    "advertise to 3": "c98bc0f6b83f9d1973a3d500e49ae941227b93a223c32106ac7c2ae15926e517",
    "advertise from 3": "7244b0e252c6138e613fe23210de39498a7b08dfda3c8e8b06d5289dfbea89a0",
    "advertise to 4": "c98bc0f6b83f9d1973a3d500e49ae941227b93a223c32106ac7c2ae15926e517",
    "advertise from 4": "c22437c6447f60470d08cb8a9a522586e923a4f10b78edf1ccaa88893c6915ab",
    "share to 1": "4e58ba268b2b454c07a0367356f9887cf49e39efa457c8d0218734d13c1d3bf8",
    "share from 1": "2c1474a6194a978935794ebc8bbbb61734d4c7ecc5da43c5dc0d64ee56466b3b",
    "share to 2": "4e58ba268b2b454c07a0367356f9887cf49e39efa457c8d0218734d13c1d3bf8",
    "share from 2": "70ce9b369c15a1f2845b0d3c7be2143538f8d3e980a6c5c2e99a27a88f133393",
    "share to 3": "4e58ba268b2b454c07a0367356f9887cf49e39efa457c8d0218734d13c1d3bf8",
    "share from 3": "ab4a456405cd75c59e1e12645de14701535e72cdc284db1611a44a789f9cb077",
    "share to 4": "4e58ba268b2b454c07a0367356f9887cf49e39efa457c8d0218734d13c1d3bf8",
    "share from 4": "a95162fa863f571dc23173d153a4bd54ae004ea6c6766803bc45f7f8e770ca73",
    "mask to 1": "c8862059f5e53fe4036e0eae6f599c6838d08b16b7fbc0cccfe0b8a1e412f4d7",
    "words of 1": "ef030139d3a4fb6c7e0f54c2a0d110ab35a65176dbfc799b2e368f84c8a6bed5",
    "mask from 1": "fdf5830c4b02c778456d2573113d272b16c87b11e79756395525da835a24e2f3",
    "mask to 2": "963cd346e1eb596c78428b78487c833f6db53ac339ee5b64ab3b3058c23b5479",
    "words of 2": "b1e4585c4ab536dccf181951e4d7c75a181a3e118552927b107e641bf2ec34e1",
    "mask from 2": "aed574641934974d393355812c4e8d00b767b705810c5d35ebf85ec5517ecb02",
    "mask to 3": "1c8f7c9f7ef646e86dfdb0f1a6fa505224c0162a822afdf38d5ea0fdf7dc2ffa",
    "words of 3": "9e299e8575b5d668ed98dd31e0fe31544f964f2786cf38f01c5404c772e223da",
    "mask from 3": "7d8937659c3824804227f4e58b91f3b830dbb87f957159cf9d729962d63f87a3",
    "mask to 4": "ad5ea96bcacca3a7b90c50bf242f77513ff4f812c8b4781d8a48d24aef2595a5",
    "words of 4": "e7b556a70f60c4cc21c9a27fa4fa480b1ac10fe494c2a98726412d192eb376a6",
    "mask from 4": "d077ea3f66c2953981adad14c02734b81c26198edec36522ffc1e22b7fe9edea",
    "agree to 1": "f62a5ba687cbb8ab954711d932031e3838ef5c81d4ca8e5f8645bb2d1f731185",
    "agree from 1": "7061560922ec8652975f030a2effcaed603193c5574ea91bfdbbf046a8a3606f",
    "agree to 2": "f62a5ba687cbb8ab954711d932031e3838ef5c81d4ca8e5f8645bb2d1f731185",
    "agree from 2": "30cc74deddbe2fd6e722f4159a152018c68b746d872c26da4c2d45b135ab8036",
    "agree to 3": "f62a5ba687cbb8ab954711d932031e3838ef5c81d4ca8e5f8645bb2d1f731185",
    "agree from 3": "532cb05529a7ba160c445aca63bd1c6b2423b3cb1bcc7437fee4cc84cf2a2ca2",
    "agree to 4": "f62a5ba687cbb8ab954711d932031e3838ef5c81d4ca8e5f8645bb2d1f731185",
    "agree from 4": "247442fe66581db11c407dc8b62f63051b0967c223a7537a551342bb7c1d1047",
    "reveal to 1": "7d88ccdf21530c6e837856a2cc59e178effaa8da41da4caf1cd12a8e5395cec6",
    "reveal from 1": "f937eb80326b431b1b605227ca448490c5261142e344e589d8e5436c90018995",
    "reveal to 2": "0a31c1eeff8ae275979a07606a5ea881dcff60d514cfdffce09605fb00e30249",
    "reveal from 2": "dd08e24f719e656ad628da36734c73341fa74ae4284b5872ee3e3ce7e525900c",
    "reveal to 3": "f059524da37953e77c8f4630347243682761c5528dbddba1879f8a034f463ad9",
    "reveal from 3": "5e23336d6f75cbb7c476505e661baa4a6afafda369f3902af7c931cbbe15f59e",
    "reveal to 4": "e524241542c1b6a114f501534fd65882354f45ab333c8d292ffa30cef7498495",
    "reveal from 4": "040a2f327b3c94e8c6103670a093926599d26e5a29fc2cbb50529ef14197f9b5",
    "session": "0da45a2f24ae6d0036281c956a653599e336ca7490e8ebe07f44232617171ff8",
    "sum": "a902483cc151e1da1a45938ac6f71a372e7637cad0e8c08eaf4b919d127ef1f2",
}


def stream(label: str) -> Callable[[int], bytes]:
    """Entropy that repeats: request number i is SHAKE-128 of the label and i."""
    count = 0

    def draw(size: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_128(f"{label} {count}".encode()).digest(size)

    return draw


def test_every_message_and_the_sum_of_one_session_are_what_they_were() -> None:
    federation = Federation(None, 4, Ring(32, 5, 2))
    for slot in federation.slots:
        federation.clients[slot] = federation.client(slot, entropy=stream(f"client {slot}"))
    server = federation.server(entropy=stream("server"))
    seen: dict[str, str] = {}

    def see(what: str, content: bytes | NDArray[np.uint8]) -> None:
        seen[what] = hashlib.sha256(bytes(content)).hexdigest()

    for stage in STAGES:
        for slot, message in requests(server, stage).items():
            see(f"{stage} to {slot}", message)
            words = np.arange(slot, slot + federation.ring.nbytes, dtype=np.uint8)
            if stage == "mask":
                federation.clients[slot].admit(message, round_number=1, model=server.session.model)
                reply = federation.clients[slot].mask(words)
                see(f"words of {slot}", words)
            else:
                reply, _ = ask(federation, slot, stage, message)
            see(f"{stage} from {slot}", reply)
            hand_in(server, stage, slot, reply, words)
    see("session", server.session.id)
    total = server.finish()
    see("sum", total)
    plain = [np.arange(slot, slot + federation.ring.nbytes, dtype=np.uint8) for slot in federation.slots]
    expected = federation.ring.zeros()
    for words in plain:
        federation.ring.add(expected, words)
    assert total.tobytes() == expected.tobytes()
    assert seen == FROZEN
