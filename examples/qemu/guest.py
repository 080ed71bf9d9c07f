"""The guest: a kernel of 168 bytes that counts for ever, on the serial port.

Theory. A count is kept three times, so that what gets lost shows: in EBX, in a word of RAM at 2 MiB, and in a journal of the last
`JOURNAL_COUNTS` counts at 4 MiB. The guest also leaves a mark every 16 MiB, in all of its RAM: a word that is its own address. In every
round it compares the register with the word in RAM and looks at one of the marks, in turn, and halts for ever when something differs. So
a guest that counts on has its registers and its RAM.
"""

from __future__ import annotations

import os
import struct
from typing import Final

MARK_EVERY: Final = 16 * 1024 * 1024
"""Bytes from one mark to the next; the first is there as well."""

JOURNAL_COUNTS: Final = 65536

SEALS: Final = {"ram": ("grow", "shrink"), "state": ("grow", "shrink", "write")}
"""Of the memfds that luod gets: a state is never written again; the RAM is, but keeps its size."""

_LOW_RAM_BYTES: Final = 3 * 1024**3
"""Where a pc's RAM ends below 4 GiB when it has more than 3.5 GiB; up to there an address is an offset in the memfd."""

_COUNT_AT: Final = 0x200000
_JOURNAL_AT: Final = 0x400000
_WORD: Final = struct.Struct("<I")

# 32-bit code at 1 MiB, which is where multiboot puts it; `objdump -D -b binary -m i386 -M intel --adjust-vma=0x100000` shows it.
_PROGRAM: Final = (
    "02 b0 ad 1b"  #          100000          the multiboot header: its magic number
    "00 00 01 00"  #          100004          flags: the addresses that follow are valid
    "fe 4f 51 e4"  #          100008          with these three the sum is 0
    "00 00 10 00"  #          10000c          where this header is,
    "00 00 10 00"  #          100010          the first byte that is loaded,
    "00 00 00 00"  #          100014          the last one: that of the file,
    "00 00 00 00"  #          100018          nothing to be cleared,
    "20 00 10 00"  #          10001c          and where to begin
    "bc 00 00 18 00"  #       100020          mov esp, 0x180000
    "b9 {limit}"  #           100025          mov ecx, limit
    "31 db"  #                10002a          xor ebx, ebx             the count
    "bf 00 00 00 01"  #       10002c          mov edi, 0x1000000
    "89 3f"  #                100031  mark:   mov [edi], edi
    "81 c7 00 00 00 01"  #    100033          add edi, 0x1000000
    "39 cf"  #                100039          cmp edi, ecx
    "72 f4"  #                10003b          jb mark
    "be 00 00 00 01"  #       10003d          mov esi, 0x1000000       the mark to look at
    "43"  #                   100042  round:  inc ebx
    "a1 00 00 20 00"  #       100043          mov eax, [0x200000]
    "40"  #                   100048          inc eax
    "39 d8"  #                100049          cmp eax, ebx             one more than in RAM?
    "75 57"  #                10004b          jne differ
    "89 1d 00 00 20 00"  #    10004d          mov [0x200000], ebx
    "39 36"  #                100053          cmp [esi], esi           is the mark as it was?
    "75 4d"  #                100055          jne differ
    "81 c6 00 00 00 01"  #    100057          add esi, 0x1000000       the next one
    "39 ce"  #                10005d          cmp esi, ecx
    "72 05"  #                10005f          jb kept
    "be 00 00 00 01"  #       100061          mov esi, 0x1000000
    "0f b7 fb"  #             100066  kept:   movzx edi, bx
    "89 1c bd 00 00 40 00"  # 100069          mov [edi*4 + 0x400000], ebx   into the journal
    "6a 0a"  #                100070          push 10                  a line's end, below its digits
    "89 d8"  #                100072          mov eax, ebx
    "bd 0a 00 00 00"  #       100074          mov ebp, 10
    "31 d2"  #                100079  digit:  xor edx, edx
    "f7 f5"  #                10007b          div ebp
    "83 c2 30"  #             10007d          add edx, '0'
    "52"  #                   100080          push edx
    "85 c0"  #                100081          test eax, eax
    "75 f4"  #                100083          jnz digit
    "ba fd 03 00 00"  #       100085  send:   mov edx, 0x3fd           the serial port's line status
    "ec"  #                   10008a  busy:   in al, dx
    "a8 20"  #                10008b          test al, 0x20            may it be sent to?
    "74 fb"  #                10008d          jz busy
    "58"  #                   10008f          pop eax
    "ba f8 03 00 00"  #       100090          mov edx, 0x3f8           its data
    "ee"  #                   100095          out dx, al
    "3c 0a"  #                100096          cmp al, 10
    "75 eb"  #                100098          jne send
    "ba a0 86 01 00"  #       10009a          mov edx, 100000          some time: about 1,000 counts a second
    "4a"  #                   10009f  wait:   dec edx
    "75 fd"  #                1000a0          jnz wait
    "eb 9e"  #                1000a2          jmp round
    "fa"  #                   1000a4  differ: cli
    "f4"  #                   1000a5          hlt
    "eb fc"  #                1000a6          jmp differ
)


def _marked_bytes(ram_bytes: int) -> int:
    return min(ram_bytes, _LOW_RAM_BYTES)


def kernel(ram_bytes: int) -> bytes:
    """The guest, for a machine with `ram_bytes` of RAM: a file for QEMU's `-kernel`."""
    return bytes.fromhex(_PROGRAM.format(limit=_WORD.pack(_marked_bytes(ram_bytes)).hex()))


def _word(ram: int, offset: int) -> int:
    (value,) = _WORD.unpack(os.pread(ram, _WORD.size, offset))
    return int(value)


def wrong_in_ram(ram: int, count: int) -> str:
    """What is not in the guest's RAM as it must be, after `count` counts; empty when all is there.

    The guest must not run, and may have begun the count after `count`.

    Args:
        ram: the RAM's memfd, borrowed.
        count: the last one that came through the serial port.
    """
    for mark in range(MARK_EVERY, _marked_bytes(os.fstat(ram).st_size), MARK_EVERY):
        if _word(ram, mark) != mark:
            return f"the mark at {mark:#x} is {_word(ram, mark):#x}"
    if _word(ram, _COUNT_AT) not in (count, count + 1):
        return f"{_word(ram, _COUNT_AT)} was counted, and {count} said"
    journal = memoryview(os.pread(ram, JOURNAL_COUNTS * _WORD.size, _JOURNAL_AT)).cast("I")
    for each in range(max(1, count - JOURNAL_COUNTS + 2), count + 1):
        if journal[each % JOURNAL_COUNTS] != each:
            return f"the journal has {journal[each % JOURNAL_COUNTS]} where {each} belongs"
    return ""
