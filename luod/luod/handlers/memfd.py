"""memfds (memfd_create(2)), of ordinary and of huge pages.

A memfd is told by its device: all of them live on one internal tmpfs mount (mm/shmem.c), those of huge pages on one internal hugetlbfs
mount for each page size (fs/hugetlbfs/inode.c). F_GET_SEALS tells nothing (it succeeds on any tmpfs file), and neither does the name.

Preserved: contents, size, seals, position (with the open file). Contents are as live as their owners leave them.
"""

from __future__ import annotations

import fcntl
import functools
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar, Final

from luod.handlers.base import Mismatch, Probe
from luod_protocol.fds import OwnedFd
from luod_protocol.records import Fact
from luod_protocol.sealed import memfd_device

_SEALS: Final = {
    fcntl.F_SEAL_SEAL: "seal",
    fcntl.F_SEAL_SHRINK: "shrink",
    fcntl.F_SEAL_GROW: "grow",
    fcntl.F_SEAL_WRITE: "write",
    0x10: "future-write",
    0x20: "exec",
}
"""include/uapi/linux/fcntl.h."""

_HUGE_SHIFTS: Final = range(16, 35)
"""log2 of what can be a huge page's size on some machine, for MFD_HUGE_SHIFT: see memfd_create(2)."""


@functools.cache
def _huge_devices() -> Mapping[int, int]:
    """st_dev to page size in bytes, of the page sizes that this kernel has."""
    devices: dict[int, int] = {}
    for shift in _HUGE_SHIFTS:
        flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | shift << os.MFD_HUGE_SHIFT
        with suppress(OSError), OwnedFd(os.memfd_create("luod-probe", flags)) as fd:
            devices[os.fstat(fd.fileno()).st_dev] = 1 << shift
    return devices


class Memfd:
    """memfds."""

    kind: ClassVar[str] = "memfd"
    compatible: ClassVar[str] = "memfd-v1"

    def recognize(self, probe: Probe) -> bool:
        """By st_dev."""
        device = probe.stat.st_dev
        return probe.type == stat.S_IFREG and (device == memfd_device() or device in _huge_devices()) and probe.opened

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Size in bytes, seals by name, access, and the huge page size in bytes (0: ordinary pages)."""
        seals = fcntl.fcntl(probe.fd, fcntl.F_GET_SEALS)
        return {
            "size": probe.stat.st_size,
            "seals": ",".join(name for bit, name in _SEALS.items() if seals & bit),
            "access": probe.access,
            "huge_page_size": _huge_devices().get(probe.stat.st_dev, 0),
        }

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """The recorded seals are there, access and page size are the same; the size is as they allow."""
        now = self.record(probe)
        seals = set(str(facts.get("seals", "")).split(",")) - {""}
        missing = seals - set(str(now["seals"]).split(","))
        if missing:
            raise Mismatch(f"the memfd has lost the seals {', '.join(sorted(missing))}")
        for fact in ("access", "huge_page_size"):
            if now[fact] != facts.get(fact):
                raise Mismatch(f"the memfd's {fact} is {now[fact]}, it was {facts.get(fact)}")
        size, before = probe.stat.st_size, int(facts.get("size", 0))
        if ("shrink" in seals and size < before) or ("grow" in seals and size > before):
            raise Mismatch(f"the sealed memfd has {size} bytes, it had {before}")
