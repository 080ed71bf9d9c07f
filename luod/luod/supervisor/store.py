"""The descriptors in custody.

The rules are systemd's (src/core/service.c, service_add_fd_store): at most `limit` of them, the same open file once, the newest first
when they are passed on. One more limit is the kernel's: the names go to the daemon in one environment variable, and execve(2) takes no
string longer than 128 KiB. A store that the daemon can't be started with would be lost, so what doesn't fit is not stored.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from luod_protocol.fds import OwnedFd

MAX_NAMES_BYTES: Final = 32 * 4096 - len("LISTEN_FDNAMES=") - 1
"""MAX_ARG_STRLEN of the kernel (include/uapi/linux/binfmts.h) with pages of 4 KiB, less the variable's name and the NUL."""


class Stored(NamedTuple):
    """One descriptor. `label` is the same for descriptors that could be of one open file; `poll`: it is dropped when it hangs up."""

    name: str
    fd: OwnedFd
    label: str
    poll: bool


class Added(enum.Enum):
    """What became of a descriptor."""

    STORED = enum.auto()
    KNOWN = enum.auto()
    FULL = enum.auto()


class Store:
    """The stored descriptors.

    Args:
        limit: how many there may be.
        same: whether two borrowed descriptors are of one open file.
    """

    def __init__(self, limit: int, same: Callable[[int, int], bool]) -> None:
        self.limit = limit
        self._same = same
        self._stored: list[Stored] = []

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, fd: OwnedFd, name: str, label: str, *, poll: bool) -> Added:
        """Store `fd`. Only when the answer is STORED has it been taken."""
        names_bytes = sum(len(stored.name) + 1 for stored in self._stored) + len(name)
        if len(self._stored) >= self.limit or names_bytes > MAX_NAMES_BYTES:
            return Added.FULL
        number = fd.fileno()
        if any(stored.label == label and self._same(stored.fd.fileno(), number) for stored in self._stored):
            return Added.KNOWN
        self._stored.append(Stored(name, OwnedFd(fd.take()), label, poll))
        return Added.STORED

    def remove(self, name: str) -> list[OwnedFd]:
        """Drop all that have this name. The caller owns them."""
        return self._drop(lambda stored: stored.name == name)

    def remove_numbers(self, numbers: Iterable[int]) -> list[OwnedFd]:
        """Drop those descriptors. The caller owns them."""
        dropped = set(numbers)
        return self._drop(lambda stored: stored.fd.fileno() in dropped)

    def _drop(self, unwanted: Callable[[Stored], bool]) -> list[OwnedFd]:
        dropped = [stored.fd for stored in self._stored if unwanted(stored)]
        self._stored = [stored for stored in self._stored if not unwanted(stored)]
        return dropped

    def polled(self) -> list[int]:
        """The borrowed descriptors that are dropped when they hang up."""
        return [stored.fd.fileno() for stored in self._stored if stored.poll]

    def listed(self) -> list[tuple[int, str]]:
        """The borrowed descriptors and their names, the newest first."""
        return [(stored.fd.fileno(), stored.name) for stored in reversed(self._stored)]
