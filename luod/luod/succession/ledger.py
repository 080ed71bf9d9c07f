"""The ledger: what a crashed luod must not forget besides the boxes, in a memfd that the service manager keeps.

Theory. A box says all about a session but two things that come later: who has retrieved from it, and that it has ended. Both are written
here, one record behind the other, before a client is told; and that a successor may serve, which may die before it has a ledger of its own.
The manager holds the memfd too, so what a dead luod wrote is there. Its name has the generation of its luod: the next one reads the newest,
and begins one of its own with what still matters.

The memfd has a head, which tells where the records are, and of which epoch. A ledger that has become long is begun anew, with the next
epoch, beside what it was, and then the head is written. Every record's sum is seeded with its epoch, so old records mean nothing. The
memfd has no large holes: systemd 261 and later have the kernel carry it through a kexec, which fills them.

Happy path: `Ledger.begin`, `write`, now and then `begin_anew`; in the next luod `read`.

Unhappy paths:
1. A luod dies while it writes: the last record is incomplete or its sum is wrong. It was not answered yet; reading ends before it.
2. The ledger is of a version that isn't known here: `LedgerFault`. The boxes say enough to go on without.
3. It can't be written (ENOMEM): `LedgerFault`, and the request that needed it is refused.

Invariants: a record is written by one pwrite(2), behind the others; epoch and place by one of 16 bytes. Nobody but luod and the manager
has the memfd.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import ClassVar, Final, TypeAlias, get_args

import attrs

from luod.store import Ended
from luod.system import Process
from luod_protocol.codec import Codec
from luod_protocol.errors import LuodError, ProtocolFault
from luod_protocol.fds import OwnedFd

VERSION: Final = 1
LONG_BYTES: Final = 1024 * 1024
"""A ledger that is longer, and twice as long as what matters of it, is begun anew."""

_HEAD: Final = struct.Struct("<8sQQQ")
"""Magic, version, epoch, and where its records begin, in bytes."""
_CURRENT: Final = struct.Struct("<QQ")
"""The last two of it."""
_CURRENT_PLACE: Final = _HEAD.size - _CURRENT.size
_MAGIC: Final = b"luodldgr"
_RECORD: Final = struct.Struct("<II")
"""Before each record: its size in bytes, its CRC-32."""
_NAME: Final = re.compile(r"luod-ledger-(\d{1,18})")


class LedgerFault(LuodError):
    """The ledger can't be read, or not be written."""


@attrs.frozen(kw_only=True)
class Ending:
    """A finalized session is about to end."""

    type: ClassVar[str] = "ending"
    ended: Ended


@attrs.frozen(kw_only=True)
class Staying:
    """A session that was about to end didn't: the manager did not let go of it."""

    type: ClassVar[str] = "staying"
    session_id: bytes


@attrs.frozen(kw_only=True)
class Retrieval:
    """A process has fds of a session."""

    type: ClassVar[str] = "retrieval"
    session_id: bytes
    process: Process


@attrs.frozen(kw_only=True)
class Successor:
    """A luod of this generation may have served."""

    type: ClassVar[str] = "successor"
    generation: int


Record: TypeAlias = Ending | Staying | Retrieval | Successor

_CODEC: Final[Codec[Record]] = Codec(get_args(Record))


def name(generation: int) -> str:
    """What the manager calls the ledger of the luod `generation`."""
    return f"luod-ledger-{generation}"


def generation(stored: str) -> int | None:
    """The generation in a ledger's name, None for another name."""
    found = _NAME.fullmatch(stored)
    return int(found[1]) if found else None


class Ledger:
    """A ledger that is written. Owns its memfd.

    Args:
        records: what it begins with.

    Raises:
        LedgerFault: unhappy path 3.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        try:
            self.memfd: Final = OwnedFd(os.memfd_create("luod-ledger", os.MFD_CLOEXEC))
        except OSError as error:
            raise LedgerFault(f"luod's ledger can't be made: {error.strerror}") from None
        self._epoch = 0
        self._place = _HEAD.size
        self._length = 0
        self._basis = 0
        try:
            self._put(_HEAD.pack(_MAGIC, VERSION, 0, 0), 0)
            self.begin_anew(records)
        except BaseException:
            self.memfd.close()
            raise

    @property
    def is_long(self) -> bool:
        """Whether it should be begun anew."""
        return self._length > max(LONG_BYTES, 2 * self._basis)

    def begin_anew(self, records: Iterable[Record]) -> None:
        """Have `records` in place of all that was written.

        Raises:
            LedgerFault: unhappy path 3; what was written still holds.
        """
        epoch = self._epoch + 1
        data = b"".join(_encoded(record, epoch) for record in records)
        place = _HEAD.size if _HEAD.size + len(data) <= self._place else self._place + self._length
        self._put(data, place)
        self._put(_CURRENT.pack(epoch, place), _CURRENT_PLACE)
        self._epoch, self._place, self._length, self._basis = epoch, place, len(data), len(data)
        # Only memory is won: without it all would be as well.
        with suppress(OSError):
            os.ftruncate(self.memfd.fileno(), place + len(data))

    def write(self, record: Record) -> None:
        """Add a record.

        Raises:
            LedgerFault: unhappy path 3.
        """
        data = _encoded(record, self._epoch)
        self._put(data, self._place + self._length)
        self._length += len(data)

    def _put(self, data: bytes, place: int) -> None:
        try:
            written = os.pwrite(self.memfd.fileno(), data, place)
        except OSError as error:
            raise LedgerFault(f"luod's ledger can't be written: {error.strerror}; try again") from None
        if written != len(data):
            raise LedgerFault(f"luod's ledger took {written} of {len(data)} bytes, no memory is left: try again")

    def close(self) -> None:
        """Close it here; the manager's stays."""
        self.memfd.close()


def _encoded(record: Record, epoch: int) -> bytes:
    data = _CODEC.encode(record)
    return _RECORD.pack(len(data), _sum(data, epoch)) + data


def _sum(data: bytes, epoch: int) -> int:
    return zlib.crc32(data, epoch & 0xFFFFFFFF)


def read(memfd: int) -> list[Record]:
    """The records of a ledger (borrowed), up to the last that is whole.

    Raises:
        LedgerFault: unhappy path 2.
    """
    try:
        head = os.pread(memfd, _HEAD.size, 0)
        if len(head) != _HEAD.size or not head.startswith(_MAGIC):
            raise LedgerFault("it is no ledger")
        version: int
        epoch: int
        place: int
        _, version, epoch, place = _HEAD.unpack(head)
        if version != VERSION:
            raise LedgerFault(f"it is of version {version}, this luod knows {VERSION}")
        return list(_records(memfd, place, epoch))
    except OSError as error:
        raise LedgerFault(f"it can't be read: {error.strerror}") from None


def _records(memfd: int, place: int, epoch: int) -> Iterator[Record]:
    while True:
        chunk = os.pread(memfd, LONG_BYTES, place)
        taken = 0
        while taken + _RECORD.size <= len(chunk):
            size, told = _RECORD.unpack_from(chunk, taken)
            body = chunk[taken + _RECORD.size : taken + _RECORD.size + size]
            if not size or len(body) != size or _sum(body, epoch) != told:
                break
            try:
                yield _CODEC.decode(body)
            except ProtocolFault as error:
                raise LedgerFault(f"a record can't be understood: {error}") from None
            taken += _RECORD.size + size
        # What isn't whole here may be so in the next chunk; where nothing was taken it is the end.
        if not taken:
            return
        place += taken
