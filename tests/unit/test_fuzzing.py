"""The fuzzer's targets: random bytes, and what the fuzzer has found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzzing import SEEDS, TARGETS

FOUND: tuple[tuple[str, bytes], ...] = (("a_box", b"luodbox1\1\0\0\0\2\0\0\0" + bytes(8)),)
"""Target and bytes that broke it once."""


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds(target: str) -> None:
    for seed in SEEDS:
        TARGETS[target](seed)


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_with_something_changed(target: str) -> None:
    tried = 0

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.sampled_from(SEEDS), st.integers(0, 100), st.binary(max_size=8))
    def run(seed: bytes, place: int, change: bytes) -> None:
        nonlocal tried
        tried += 1
        TARGETS[target](seed[:place] + change + seed[place + len(change) :])

    run()
    assert tried >= 60


def test_what_was_found() -> None:
    for target, data in FOUND:
        TARGETS[target](data)
