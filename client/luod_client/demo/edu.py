"""QEMU's `edu` device, a PCI device that does DMA: docs/specs/edu.rst of QEMU has its registers.

It copies between a buffer of its own, a page, and memory, in about 0.1 s, and raises an interrupt when that is done. `Edu` drives one
through its vfio fd.
"""

from __future__ import annotations

import os
import select
from typing import Final

from luod_client.demo import vfio
from luod_client.demo.vfio import VfioFault

VENDOR: Final = 0x1234
DEVICE: Final = 0x11E8
TRANSFER_BYTES: Final = 2048
"""Of each transfer; QEMU 7.2 takes all of the buffer for too much, and ends."""
PATIENCE_S: Final = 60.0
"""How long a transfer may take, on a machine that has much else to do."""

_IDENTITY: Final = 0x00
_LIVENESS: Final = 0x04
_INTERRUPT_STATUS: Final = 0x24
_INTERRUPT_ACKNOWLEDGE: Final = 0x64
_SOURCE: Final = 0x80
_DESTINATION: Final = 0x88
_COUNT: Final = 0x90
_COMMAND: Final = 0x98
_START: Final = 1
_TO_MEMORY: Final = 2
_INTERRUPT: Final = 4
_BUFFER: Final = 0x40000


class Edu:
    """The device behind a borrowed fd.

    Args:
        device: the fd, of a device that may do DMA.
        interrupt: borrowed; the eventfd that its interrupt signals.

    Raises:
        VfioFault: it is another device.
    """

    def __init__(self, device: int, interrupt: int) -> None:
        self._registers = vfio.Region(device, vfio.BAR0)
        self._interrupt = interrupt
        identity = self._registers.read(_IDENTITY)
        if identity & 0xFFFF != 0x00ED:
            raise VfioFault(f"the device says that it is {identity:#010x}, which is no edu of QEMU")

    def remember(self, value: int) -> None:
        """Have it keep 32 bits, in a register that only a reset or another value changes."""
        self._registers.write(_LIVENESS, value)

    def remembered(self) -> int:
        """What it keeps."""
        return ~self._registers.read(_LIVENESS) & 0xFFFF_FFFF

    @property
    def busy(self) -> bool:
        """Whether a transfer is under way."""
        return bool(self._registers.read(_COMMAND) & _START)

    def start(self, address: int, *, to_memory: bool) -> None:
        """Start a transfer of what is at `address`, as the device sees it: to memory, or into the device's buffer."""
        source, destination = (_BUFFER, address) if to_memory else (address, _BUFFER)
        for register, value in ((_SOURCE, source), (_DESTINATION, destination), (_COUNT, TRANSFER_BYTES)):
            self._registers.write(register, value, 8 if value >> 32 else 4)
        self._registers.write(_COMMAND, _START | _INTERRUPT | (_TO_MEMORY if to_memory else 0))

    def wait(self) -> int:
        """Wait until a transfer is done. How many interrupts there were since the last time.

        Raises:
            VfioFault: not in time.
        """
        if not select.select([self._interrupt], [], [], PATIENCE_S)[0]:
            raise VfioFault(f"the device's interrupt did not come within {PATIENCE_S:.0f} s")
        self._registers.write(_INTERRUPT_ACKNOWLEDGE, self._registers.read(_INTERRUPT_STATUS))
        return int.from_bytes(os.read(self._interrupt, 8), "little")

    def transfer(self, address: int, *, to_memory: bool) -> None:
        """`start` and `wait`."""
        self.start(address, to_memory=to_memory)
        self.wait()
