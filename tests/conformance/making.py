"""What a specimen is, and how most are made."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, TypeAlias

import attrs

from luod_protocol.fds import OwnedFd
from luod_protocol.records import Fact

Maker: TypeAlias = Callable[[], AbstractContextManager[int]]

HOSTILE: Final = b"\xff\x1b[31m\n:"
"""A name that is no UTF-8 and does things to a terminal."""


def _nothing(fd: int) -> None:
    """Nobody does anything."""


@attrs.frozen(kw_only=True)
class Specimen:
    """A fd of a kind that is taken.

    Attributes:
        name: unique.
        kind: the handler that must take it.
        make: makes it, borrowed until the block ends.
        facts: what must be recorded of it, among other things.
        use: what somebody who has a copy may do without becoming a liar; `verify` must not mind.
        unlike: specimens of this kind whose record must not pass for this one.
    """

    name: str
    kind: str
    make: Maker
    facts: dict[str, Fact]
    use: Callable[[int], None] = _nothing
    unlike: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class Refused:
    """A fd that is not taken; `words` must be in the reason."""

    name: str
    make: Maker
    words: tuple[str, ...]


def making(function: Callable[[], int]) -> Maker:
    """A maker of fds that nothing else belongs to."""

    @contextmanager
    def make() -> Generator[int]:
        with OwnedFd(function()) as fd:
            yield fd.fileno()

    return make


def available(make: Maker) -> bool:
    """Whether this machine has such things and lets this user make them; a test of one that isn't there has nothing to do."""
    try:
        with make():
            return True
    except OSError:
        return False


def reopened(make: Maker, flags: int) -> Maker:
    """The object that `make` makes, opened once more with other flags."""

    @contextmanager
    def again() -> Generator[int]:
        with make() as fd, OwnedFd(os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)) as second:
            yield second.fileno()

    return again
