"""The box: one kernel object that holds a whole session.

Theory. A `SOCK_SEQPACKET` socket pair; one packet is put into it, with a head, the manifest's bytes and up to 253 fds in flight; the
sending end is closed. What remains is one descriptor whose receive queue holds everything. `recvmsg(MSG_PEEK)` hands out fresh
duplicates and consumes nothing (net/unix/af_unix.c, unix_peek_fds). So a session is passed, stored or dropped as one fd, and half of
one can't exist.

Happy path: `seal(manifest, fds)` gives the box; `look(box)` gives the manifest and fresh duplicates of all fds, any number of times, and
`look(box, wanted)` of some of them.

Larger: over 253 fds (or 252 and a large manifest) the fds go into inner boxes of 253, and the outer one holds those: up to 252 x 253.
A manifest over `_INLINE_BYTES` goes into a sealed memfd, the first fd of the (outer) box.

Unhappy paths:
1. ETOOMANYREFS from sendmsg: this uid has RLIMIT_NOFILE fds in flight already. Raised as it is; nothing is left behind.
2. The process is at RLIMIT_NOFILE while looking: the kernel truncates; what came is closed, EMFILE.
3. It isn't a box: `BoxFault`, or not of a layout known here: `UnknownLayout`; the box is left as it was.

Invariants: one packet a box; nobody uses SO_PEEK_OFF (its offset belongs to the socket, all holders share it); a box never goes to a
client (a plain recv would empty it).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from luod_protocol import wire
from luod_protocol.errors import FaultCode, LuodError, ProtocolFault
from luod_protocol.fds import OwnedFd, close_all
from luod_protocol.limits import MAX_FDS_PER_PACKET, MAX_PACKET_BYTES
from luod_protocol.sealed import read_sealed, seal_bytes

_MAGIC: Final = b"luodbox1"
_HEAD: Final = struct.Struct("<8sBxxxIQ")
"""Magic; layout; number of fds in the whole box; size of the manifest in bytes."""
_FLAT, _NESTED, _INNER = range(3)
_IN_MEMFD: Final = 0x80
"""Flag of the layout: the manifest is in a sealed memfd, the first fd."""
_INLINE_BYTES: Final = MAX_PACKET_BYTES - _HEAD.size

MAX_FDS: Final = (MAX_FDS_PER_PACKET - 1) * MAX_FDS_PER_PACKET
"""What a box of boxes holds."""


class BoxFault(LuodError):
    """This fd isn't a box, or its content isn't as a box's must be."""


class UnknownLayout(BoxFault):
    """A box of a layout that this luod doesn't know."""


def _put(head: bytes, body: bytes, fds: Sequence[int]) -> OwnedFd:
    keep, give = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keep, give:
        wire.send(give, head + body, fds, flags=socket.MSG_DONTWAIT)
        return OwnedFd(keep.detach())


def seal(manifest: bytes, fds: Sequence[int]) -> OwnedFd:
    """A box of `manifest` and the borrowed `fds`, of which the box holds references of its own. The caller owns the box.

    Raises:
        ValueError: more than `MAX_FDS`.
        OSError: ETOOMANYREFS (unhappy path 1), EMFILE, ENOBUFS; nothing is left behind.
    """
    if len(fds) > MAX_FDS:
        raise ValueError(f"{len(fds)} fds, a box holds at most {MAX_FDS}")
    owned: list[OwnedFd] = []
    try:
        inside = list(fds)
        flag = 0
        body = manifest
        if len(manifest) > _INLINE_BYTES:
            owned.append(seal_bytes(manifest, "luod-manifest"))
            flag, body = _IN_MEMFD, b""
        layout = _FLAT
        if len(inside) + len(owned) > MAX_FDS_PER_PACKET:
            layout = _NESTED
            for start in range(0, len(fds), MAX_FDS_PER_PACKET):
                part = fds[start : start + MAX_FDS_PER_PACKET]
                owned.append(_put(_HEAD.pack(_MAGIC, _INNER, len(part), 0), b"", part))
            inside = []
        head = _HEAD.pack(_MAGIC, layout | flag, len(fds), len(manifest))
        return _put(head, body, [*(each.fileno() for each in owned), *inside])
    finally:
        close_all(owned)


class _Content:
    """What one peek gave."""

    def __init__(self, box: int) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=box)
        try:
            packet = wire.receive(sock, flags=socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise BoxFault("the box is empty") from None
        except ProtocolFault as error:
            if error.code is not FaultCode.TRUNCATED:
                raise BoxFault(f"this is not a box: {error.message}") from None
            raise OSError(errno.EMFILE, f"while opening a box: {error.message}") from None
        finally:
            sock.detach()  # it is borrowed
        if packet is None:
            raise BoxFault("the box is empty")
        self.fds = packet.take_fds()
        try:
            if len(packet.data) < _HEAD.size:
                raise BoxFault("this is not a box")
            magic, layout, self.count, self.size = _HEAD.unpack_from(packet.data)
            if magic != _MAGIC:
                raise BoxFault("this is not a box")
            if self.count > MAX_FDS:
                raise BoxFault(f"its head says {self.count} fds, a box holds at most {MAX_FDS}")
            self.layout = layout & ~_IN_MEMFD
            self.manifest = packet.data[_HEAD.size :]
            if layout & _IN_MEMFD:
                self._read_manifest()
            if len(self.manifest) != self.size:
                raise BoxFault(f"the manifest has {len(self.manifest)} bytes, the head says {self.size}")
        except BaseException:
            self.close()
            raise

    def _read_manifest(self) -> None:
        if not self.fds:
            raise BoxFault("the manifest's memfd is missing")
        with self.fds.pop(0) as memfd:
            try:
                self.manifest = read_sealed(memfd.fileno(), self.size)
            except ProtocolFault as error:
                raise BoxFault(error.message) from None

    def close(self) -> None:
        close_all(self.fds)


def _count(content: _Content, said: int) -> None:
    if len(content.fds) != said:
        raise BoxFault(f"the box holds {len(content.fds)} fds, its head says {said}")


def manifest_of(box: int) -> bytes:
    """The manifest in `box` (borrowed).

    Raises:
        BoxFault: unhappy path 3.
        OSError: EMFILE, ENOTSOCK and what else recvmsg(2) says.
    """
    content = _Content(box)
    content.close()
    return content.manifest


def size(box: int) -> int:
    """How many fds `box` (borrowed) says it holds. Holds for layouts that aren't known here, too.

    Raises:
        BoxFault: unhappy path 3.
        OSError: EMFILE, ENOTSOCK and what else recvmsg(2) says.
    """
    content = _Content(box)
    content.close()
    count: int = content.count
    return count


def look(box: int, wanted: Sequence[int] | None = None) -> list[OwnedFd]:
    """Fresh duplicates of the fds in `box` (borrowed), all of them in order, or those at the places `wanted`. The caller owns them.

    Raises:
        BoxFault: unhappy path 3.
        IndexError: a place in `wanted` that isn't there.
        OSError: EMFILE, ENOTSOCK and what else recvmsg(2) says.
    """
    content = _Content(box)
    try:
        places = range(content.count) if wanted is None else wanted
        for place in places:
            if not 0 <= place < content.count:
                raise IndexError(f"place {place} of a box of {content.count}")
        if content.layout == _FLAT:
            _count(content, content.count)
            return _pick(content.fds, places)
        if content.layout == _NESTED:
            return _look_nested(content, places)
        raise UnknownLayout(f"a box of layout {content.layout}, which this luod doesn't know")
    finally:
        content.close()


def _pick(fds: list[OwnedFd], places: Sequence[int]) -> list[OwnedFd]:
    """The fds at `places`, moved out of `fds`; a place that is wanted again is duplicated."""
    result: list[OwnedFd] = []
    seen: dict[int, OwnedFd] = {}
    try:
        for place in places:
            owned = OwnedFd(os.dup(seen[place].fileno())) if place in seen else OwnedFd(fds[place].take())
            seen[place] = owned
            result.append(owned)
    except BaseException:
        close_all(result)
        raise
    return result


def _look_nested(outer: _Content, places: Sequence[int]) -> list[OwnedFd]:
    found: dict[int, OwnedFd] = {}
    try:
        for index in sorted({place // MAX_FDS_PER_PACKET for place in places}):
            if index >= len(outer.fds):
                raise BoxFault(f"the box holds {len(outer.fds)} inner boxes, number {index} is missing")
            start = index * MAX_FDS_PER_PACKET
            inner = _inner(outer.fds[index].fileno())
            try:
                if inner.layout != _INNER:
                    raise BoxFault("an inner box isn't one")
                _count(inner, min(MAX_FDS_PER_PACKET, outer.count - start))
                here = [place for place in dict.fromkeys(places) if place // MAX_FDS_PER_PACKET == index]
                found.update(zip(here, _pick(inner.fds, [place - start for place in here]), strict=True))
            finally:
                inner.close()
        return _pick_found(found, places)
    finally:
        close_all(found.values())


def _inner(fd: int) -> _Content:
    try:
        return _Content(fd)
    except OSError as error:
        if error.errno in (errno.ENOTSOCK, errno.ENOTCONN, errno.EINVAL, errno.EBADF):
            raise BoxFault("an inner box isn't one") from None
        raise


def _pick_found(found: dict[int, OwnedFd], places: Sequence[int]) -> list[OwnedFd]:
    order = {place: index for index, place in enumerate(found)}
    return _pick(list(found.values()), [order[place] for place in places])
