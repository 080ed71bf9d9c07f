"""Who owns a file descriptor, in the types.

An `int` is borrowed: whoever is handed one neither closes nor keeps it. An `OwnedFd` is owned: it closes itself, once. `take()` moves
the ownership out. Anything that a peer sent is an `OwnedFd` before a byte of its message is read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Final

_NONE: Final = -1


class OwnedFd:
    """A file descriptor that closes when it is dropped. Dropping it without `close` or `take` is a bug and warns (ResourceWarning)."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, borrowed.

        Raises:
            ValueError: it was closed or taken.
        """
        if self._fd == _NONE:
            raise ValueError("this fd was closed or taken")
        return self._fd

    def take(self) -> int:
        """Move the ownership out: the caller closes it."""
        fd = self.fileno()
        self._fd = _NONE
        return fd

    def close(self) -> None:
        """Close it; does nothing when it was closed or taken. Can block when it is a foreign fd and the last reference."""
        if self._fd != _NONE:
            os.close(self.take())

    @property
    def closed(self) -> bool:
        """Whether it was closed or taken."""
        return self._fd == _NONE

    def __enter__(self) -> OwnedFd:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<OwnedFd closed>" if self.closed else f"<OwnedFd {self._fd}>"

    def __del__(self) -> None:
        fd = getattr(self, "_fd", _NONE)
        if fd != _NONE:
            warnings.warn(f"OwnedFd {fd} was dropped without close()", ResourceWarning, source=self, stacklevel=2)
            self.close()


def own(fds: Iterable[int]) -> list[OwnedFd]:
    """Take the ownership of `fds`."""
    return [OwnedFd(fd) for fd in fds]


def close_all(fds: Iterable[OwnedFd]) -> None:
    """Close each of `fds`, also when closing one of them fails; the first error is raised at the end."""
    first: OSError | None = None
    for fd in fds:
        try:
            fd.close()
        except OSError as error:
            first = first or error
    if first is not None:
        raise first


def duplicate(fd: int) -> OwnedFd:
    """A duplicate of a borrowed fd, close-on-exec."""
    return OwnedFd(os.dup(fd))
