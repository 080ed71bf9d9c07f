#!/usr/bin/env python3
"""A device behind an IOMMU goes on doing DMA for another process. See README.md beside this; `--help` for the arguments."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import sys
from collections.abc import Mapping, Sequence

try:
    from luod_client.demo import passthrough, vfio
    from luod_client.demo.checks import Check, same
    from luod_protocol.fds import OwnedFd
except ImportError as error:
    sys.exit(f"{error}: this needs luod: use .venv/bin/python in luod's folder, which `make demo` makes")

IOVA = 0x10_0000
"""Where the device sees the memory."""
CAP_IPC_LOCK = 14


def without_ipc_lock() -> None:
    """Give up CAP_IPC_LOCK, with which memory may be pinned that nobody counts; capget(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("<Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, data):
        raise vfio.VfioFault(f"capget: {os.strerror(ctypes.get_errno())}")
    effective = struct.unpack_from("<I", data)[0] & ~(1 << CAP_IPC_LOCK)
    struct.pack_into("<I", data, 0, effective)
    if libc.capset(header, data):
        raise vfio.VfioFault(f"capset: {os.strerror(ctypes.get_errno())}")


def pinned_bytes() -> int:
    """How much pinned memory is counted for this process; VmPin of proc_pid_status(5)."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(r"^VmPin:\s*(\d+) kB$", file.read(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class Cdev:
    """By itself, attached to an address space of an iommufd, in which the memfd is mapped."""

    def acquire(self, device: str, memory: int) -> passthrough.Held:
        """Device and iommufd, and the memory at `IOVA`."""
        without_ipc_lock()
        cdev, iommufd = vfio.open_cdev(device), vfio.open_iommufd()
        ioas = vfio.attach(cdev.fileno(), iommufd.fileno())
        vfio.map_file(iommufd.fileno(), ioas, memory, passthrough.MEMORY_BYTES, IOVA)
        if pinned_bytes() != passthrough.MEMORY_BYTES:
            raise vfio.VfioFault(
                f"{pinned_bytes()} bytes of pinned memory are counted for this process, it has mapped {passthrough.MEMORY_BYTES}"
            )
        addresses = range(IOVA, IOVA + passthrough.MEMORY_BYTES, passthrough.PAGE_BYTES)
        return passthrough.Held(fds={"device": cdev, "iommufd": iommufd}, addresses=list(addresses))

    def resume(self, fds: Mapping[str, OwnedFd], memory: int, addresses: Sequence[int]) -> list[Check]:
        """Have the pinned memory counted for this process. The mapping stays as it is."""
        without_ipc_lock()
        rows = [same("pinned memory counted for B, in bytes", 0, pinned_bytes())]
        vfio.change_process(fds["iommufd"].fileno())
        return [*rows, same("the same, after IOMMU_IOAS_CHANGE_PROCESS", passthrough.MEMORY_BYTES, pinned_bytes())]


if __name__ == "__main__":
    sys.exit(
        passthrough.main(
            Cdev(),
            __file__,
            qemu="-machine q35 -device intel-iommu,intremap=on,caching-mode=on -device edu,addr=10,dma_mask=0xffffffffffff",
            append="intel_iommu=on",
        )
    )
