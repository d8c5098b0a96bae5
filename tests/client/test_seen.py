"""A nonce is accepted once: also after a restart, a cut-off write and a clean-up; and the file stays small."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.seen import SeenNonces
from privacy.errors import Refused, RunError

NOW, KEEP_S = 1_800_000_000.0, 600.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nonces"


def nonces(count: int) -> list[str]:
    return [secrets.token_hex(32) for _ in range(count)]


def test_a_nonce_is_accepted_once_and_others_still_are(path: Path) -> None:
    seen, (first, second) = SeenNonces(path), nonces(2)
    seen.add(first, until=NOW + KEEP_S, now=NOW)
    seen.add(second, until=NOW + KEEP_S, now=NOW)
    for nonce in (first, second):
        with pytest.raises(Refused, match="replayed"):
            seen.add(nonce, until=NOW + 1 + KEEP_S, now=NOW + 1)


def test_a_restart_forgets_nothing(path: Path) -> None:
    kept = nonces(20)
    for nonce in kept:
        SeenNonces(path).add(nonce, until=NOW + KEEP_S, now=NOW)
    seen = SeenNonces(path)
    for nonce in kept:
        with pytest.raises(Refused, match="replayed"):
            seen.add(nonce, until=NOW + KEEP_S + KEEP_S, now=NOW + KEEP_S)
    assert path.stat().st_mode & 0o077 == 0


@given(cut=st.integers(0, 5 * 82))
def test_a_write_that_was_cut_off_costs_the_last_nonce_at_most(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, kept = tmp_path_factory.mktemp("seen") / "nonces", nonces(5)
    seen = SeenNonces(path)
    for nonce in kept:
        seen.add(nonce, until=NOW + KEEP_S, now=NOW)
    os.truncate(path, cut)
    seen = SeenNonces(path)
    whole = cut // 82
    for nonce in kept[:whole]:
        with pytest.raises(Refused, match="replayed"):
            seen.add(nonce, until=NOW + KEEP_S, now=NOW)
    for nonce in kept[whole:]:
        seen.add(nonce, until=NOW + KEEP_S, now=NOW)
    assert path.stat().st_size == 5 * 82  # What comes after a torn line is not joined to it.
    with pytest.raises(Refused, match="replayed"):
        SeenNonces(path).add(kept[-1], until=NOW + KEEP_S, now=NOW)


def test_old_nonces_are_dropped_and_young_ones_are_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.seen._COMPACT", 10)
    seen = SeenNonces(path)
    old, young = nonces(8), nonces(4)
    for nonce in old:
        seen.add(nonce, until=NOW + KEEP_S, now=NOW)
    for nonce in young:
        seen.add(nonce, until=NOW + KEEP_S + 1 + KEEP_S, now=NOW + KEEP_S + 1)
    assert path.stat().st_size < 12 * 82
    for again in (seen, SeenNonces(path)):
        for nonce in young:
            with pytest.raises(Refused, match="replayed"):
                again.add(nonce, until=NOW + KEEP_S + 2 + KEEP_S, now=NOW + KEEP_S + 2)


def test_a_nonce_that_comes_with_the_clean_up_is_kept_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.seen._COMPACT", 1)
    seen, (first, second) = SeenNonces(path), nonces(2)
    seen.add(first, until=NOW + KEEP_S, now=NOW)
    seen.add(second, until=NOW + KEEP_S + 1 + KEEP_S, now=NOW + KEEP_S + 1)
    with pytest.raises(Refused, match="replayed"):
        SeenNonces(path).add(second, until=NOW + KEEP_S + 2 + KEEP_S, now=NOW + KEEP_S + 2)


@pytest.mark.parametrize("content", [b"x" * 82, b"\xff" * 164, b"ab" * 32 + b" not a time at a\n"])
def test_a_damaged_file_is_refused_with_what_to_do(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(RunError, match="damaged; remove it") as caught:
        SeenNonces(path)
    assert str(caught.value).isprintable()
