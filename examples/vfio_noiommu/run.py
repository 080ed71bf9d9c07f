#!/usr/bin/env python3
"""A device without an IOMMU goes on doing DMA for another process. See README.md beside this; `--help` for the arguments."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Mapping, Sequence

try:
    from luod_client.demo import passthrough, vfio
    from luod_client.demo.checks import Check, same
    from luod_protocol.fds import OwnedFd
except ImportError as error:
    sys.exit(f"{error}: this needs luod: use .venv/bin/python in luod's folder, which `make demo` makes")


def physical_addresses(memory: int) -> list[int]:
    """Where the pages of a memfd are, by /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst), which tells only root.

    Raises:
        VfioFault: the kernel doesn't say.
    """
    size = os.fstat(memory).st_size
    addresses: list[int] = []
    with mmap.mmap(memory, size) as mapped, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for at in range(0, size, mmap.PAGESIZE):
            mapped[at] = mapped[at]  # so that the page is there
        first = ctypes.c_char.from_buffer(mapped)
        begin = ctypes.addressof(first) // mmap.PAGESIZE
        del first
        for number in range(size // mmap.PAGESIZE):
            entry = int.from_bytes(os.pread(pagemap.fileno(), 8, (begin + number) * 8), "little")
            frame = entry & (1 << 55) - 1
            if not entry >> 63 or not frame:
                raise vfio.VfioFault("/proc/self/pagemap doesn't say where memory is: be root")
            addresses.append(frame * mmap.PAGESIZE)
    return addresses


class Group:
    """By its group, in a container that has no IOMMU: the device uses physical addresses, so the memory must stay where it is."""

    def acquire(self, device: str, memory: int) -> passthrough.Held:
        """Container, group, device."""
        group, container = vfio.open_group(device), vfio.open_container()
        vfio.put_without_iommu(group.fileno(), container.fileno())
        fds = {"group": group, "container": container, "device": vfio.device_of(group.fileno(), device)}
        return passthrough.Held(fds=fds, addresses=physical_addresses(memory))

    def resume(self, fds: Mapping[str, OwnedFd], memory: int, addresses: Sequence[int]) -> list[Check]:
        """Nothing needs to be done."""
        where = physical_addresses(memory)
        return [
            same("memory: physical address of its first page", f"{addresses[0]:#x}", f"{where[0]:#x}"),
            same("memory: pages that have moved", 0, sum(a != b for a, b in zip(addresses, where, strict=True))),
        ]


if __name__ == "__main__":
    sys.exit(
        passthrough.main(Group(), __file__, qemu="-device edu,addr=10,dma_mask=0xffffffffffff", append="vfio.enable_unsafe_noiommu_mode=1")
    )
