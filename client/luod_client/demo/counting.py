"""The guest: it counts, for ever, and keeps its count in a register and in RAM.

Each count is kept three times, so that what gets lost shows: in EBX, in a word of RAM, and in a journal, a ring of the last
`JOURNAL_COUNTS` counts. In every round the guest compares the register with the word, and halts when they differ: a vCPU whose registers
were not restored, or one on the wrong RAM, gets no further. What it counts it writes to a port.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from luod_client.demo.kvm import KvmFault, Machine

RAM_BYTES: Final = 1024 * 1024
"""What real mode can address."""

PORT: Final = 0xE9
JOURNAL_COUNTS: Final = 16384

_ORIGIN: Final = 0x1000
_COUNT_AT: Final = 0x2000
_JOURNAL_AT: Final = 0x20000
_WORD: Final = struct.Struct("<I")

_PROGRAM: Final = bytes.fromhex(
    # 16-bit code, at 0x1000. `objdump -D -b binary -m i8086 -M intel --adjust-vma=0x1000` shows it.
    "b8 00 20"  #        1000          mov ax, 0x2000
    "8e c0"  #           1003          mov es, ax               the journal's segment, at 0x20000
    "66 31 db"  #        1005          xor ebx, ebx             the count
    "66 43"  #           1008  round:  inc ebx
    "66 a1 00 20"  #     100a          mov eax, [0x2000]
    "66 40"  #           100e          inc eax
    "66 39 d8"  #        1010          cmp eax, ebx             one more than in RAM?
    "75 17"  #           1013          jne differ
    "66 89 1e 00 20"  #  1015          mov [0x2000], ebx
    "66 89 df"  #        101a          mov edi, ebx
    "c1 e7 02"  #        101d          shl di, 2                wraps at 64 KiB
    "26 66 89 1d"  #     1020          mov es:[di], ebx         into the journal
    "66 89 d8"  #        1024          mov eax, ebx
    "66 e7 e9"  #        1027          out 0xe9, eax
    "eb dc"  #           102a          jmp round
    "f4"  #              102c  differ: hlt
)


def boot(ram: int) -> Machine:
    """A machine that will count from 1, on the borrowed memfd `ram`, which is empty and gets its size.

    Raises:
        KvmFault: KVM can't be used.
    """
    os.truncate(ram, RAM_BYTES)
    os.pwrite(ram, _PROGRAM, _ORIGIN)
    machine = Machine(ram)
    machine.start(_ORIGIN)
    return machine


def next_count(machine: Machine) -> int:
    """Let the guest count once more: what it wrote to its port.

    Raises:
        KvmFault: its register and its RAM didn't agree, or it did something else.
    """
    out = machine.run()
    if out is None:
        raise KvmFault("the guest has halted: the count in its register is not the one in its RAM")
    if out.port != PORT:
        raise KvmFault(f"the guest wrote to port {out.port:#x}, it should only know {PORT:#x}")
    return out.value


def count_in(ram: int) -> int:
    """The count in the guest's RAM."""
    (count,) = _WORD.unpack(os.pread(ram, _WORD.size, _COUNT_AT))
    return int(count)


def wrong_in_journal(ram: int, count: int) -> list[int]:
    """Which of the counts up to `count` should be in the journal, in their places, and are not: lost, or written over."""
    journal = memoryview(os.pread(ram, JOURNAL_COUNTS * _WORD.size, _JOURNAL_AT)).cast("I")
    return [each for each in range(max(1, count - JOURNAL_COUNTS + 1), count + 1) if journal[each % JOURNAL_COUNTS] != each]
