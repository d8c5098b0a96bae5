"""The primitives, as this package calls them, against the vectors that their standards publish."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy.keys import IdentityKey, is_signed_by
from privacy.secagg.masks import add_streams, derive, exchange
from privacy.secagg.ring import Ring

# RFC 5869, app. A.1 to A.3: input, salt, info, output.
HKDF_SHA256 = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]

# RFC 7748, sec. 5.2: scalar, u-coordinate, output.
X25519 = [
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
    (
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ),
]

# RFC 8032, sec. 7.1, tests 1 to 3: secret key, public key, message, signature.
ED25519 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]

# NIST SP 800-38A, F.5.5, CTR-AES256.Encrypt.
AES256_KEY = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
COUNTER = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"
PLAINTEXT = (
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
CIPHERTEXT = (
    "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
    "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
)


def xor(left: str, right: str) -> bytes:
    return bytes(a ^ b for a, b in zip(bytes.fromhex(left), bytes.fromhex(right), strict=True))


@pytest.mark.parametrize(("secret", "salt", "info", "output"), HKDF_SHA256)
def test_derive_is_hkdf_sha256(secret: str, salt: str, info: str, output: str) -> None:
    length = len(bytes.fromhex(output))
    derived = derive(bytes.fromhex(secret), salt=bytes.fromhex(salt), info=bytes.fromhex(info), length=length)
    assert derived.hex() == output


def x25519(scalar: bytes, u: bytes) -> bytes:
    return exchange(X25519PrivateKey.from_private_bytes(scalar), u)


@pytest.mark.parametrize(("scalar", "u", "output"), X25519)
def test_exchange_is_x25519(scalar: str, u: str, output: str) -> None:
    assert x25519(bytes.fromhex(scalar), bytes.fromhex(u)).hex() == output


def test_exchange_iterates_as_rfc_7748_says() -> None:
    k = u = (9).to_bytes(32, "little")
    for count in range(1, 1001):
        k, u = x25519(k, u), k
        if count == 1:
            assert k.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_alice_and_bob_agree_as_in_rfc_7748_section_6_1() -> None:
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    alice_public = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    bob_public = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    assert X25519PrivateKey.from_private_bytes(alice).public_key().public_bytes_raw() == alice_public
    assert X25519PrivateKey.from_private_bytes(bob).public_key().public_bytes_raw() == bob_public
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert x25519(alice, bob_public).hex() == x25519(bob, alice_public).hex() == shared


@pytest.mark.parametrize(("secret", "public", "message", "signature"), ED25519)
def test_identity_keys_sign_as_ed25519(secret: str, public: str, message: str, signature: str) -> None:
    key = IdentityKey(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)))
    assert key.public_hex == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    assert is_signed_by(public, bytes.fromhex(signature), bytes.fromhex(message))
    assert not is_signed_by(public, bytes.fromhex(signature), bytes.fromhex(message) + b"\0")


@pytest.mark.parametrize(
    "ring", [Ring(32, 16, 0), Ring(16, 32, 0), Ring(20, 24, 0), Ring(32, 0, 8), Ring(32, 4, 6), Ring(16, 17, 2)]
)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_stream_is_the_keystream_of_aes_256_in_counter_mode(ring: Ring, threads: int) -> None:
    words = ring.zeros()
    assert words.size == 64
    add_streams(words, ring, [(bytes.fromhex(AES256_KEY + COUNTER), 1)], threads=threads)
    assert words.tobytes() == xor(PLAINTEXT, CIPHERTEXT)
    add_streams(words, ring, [(bytes.fromhex(AES256_KEY + COUNTER), -1)], threads=threads)
    assert not np.any(words)
