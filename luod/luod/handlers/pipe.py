"""Anonymous pipes (pipe(2)), either end.

An anonymous pipe is told from a FIFO of some file system by its device: all pipes live on one internal mount (fs/pipe.c).

Preserved: the end, and with it what is in the pipe. While luod holds the write end, readers see no end of file. Its capacity is not told:
F_GETPIPE_SZ waits for whoever reads or writes the pipe, see `luod.handlers.kernel`.
"""

from __future__ import annotations

import functools
import os
import stat
from typing import ClassVar

from luod.handlers.base import Mismatch, Probe
from luod_protocol.fds import close_all, own
from luod_protocol.records import Fact


@functools.cache
def _pipe_device() -> int:
    ends = own(os.pipe2(os.O_CLOEXEC))
    try:
        return os.fstat(ends[0].fileno()).st_dev
    finally:
        close_all(ends)


class Pipe:
    """Ends of anonymous pipes."""

    kind: ClassVar[str] = "pipe"
    compatible: ClassVar[str] = "pipe-v1"

    def recognize(self, probe: Probe) -> bool:
        """By file type and device."""
        return probe.type == stat.S_IFIFO and probe.stat.st_dev == _pipe_device() and probe.opened

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Which end it is."""
        return {"end": _end(probe)}

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """It is the same end."""
        if _end(probe) != facts.get("end"):
            raise Mismatch(f"the end of the pipe is {_end(probe)}, it was {facts.get('end')}")


def _end(probe: Probe) -> str:
    return {os.O_RDONLY: "read", os.O_WRONLY: "write"}.get(probe.flags & os.O_ACCMODE, "both")
