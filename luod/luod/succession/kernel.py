"""The succession by the kernel: finalized sessions are carried through a kexec by /dev/liveupdate.

Theory. A session is taken out of its box, fd by fd, and preserved in kernel sessions of its own, 128 fds each, with its parcel
(`parcel`) in the first. In the next kernel it is put into a box again and adopted. This works while clients are served: the fds are the
same objects, and what is written to a memfd afterwards travels as well.

Happy path: `Cargo.load` for each session, `Cargo.seal`, the kexec; `collect`, `unload`, `Arrival.settle` when all is kept elsewhere as
well, and `Hold.let_go` when a session is finished.

Unhappy paths:
1. The kernel refuses one fd: `load` raises, nothing of that session is preserved.
2. Two entries, of one session or of two, are the same memfd, which the kernel takes once: the second borrows. When the lender ends,
   `drop` ends the borrowers' preservation too and tells which, so that they are loaded again.
3. A session can't be unloaded (the kernel failed, a parcel of a newer version): it is lost, with a reason that is told; the others come.
4. There is no index: nothing was carried.
5. Somebody else has retrieved the kernel sessions, and passes them on (`relay`): these are unloaded, and nothing is collected.
6. The index can't be read, being of a newer luod's: nothing is unloaded. Where a manager has the kernel sessions too they stay with it.
7. A luod has died here before: what it had put elsewhere isn't unloaded again.

Invariants: a file of the last kernel counts as preserved until its kernel session is finished, so nothing is loaded while a `Hold`
holds any. A memfd comes back with no more rights than it had: read-only stays read-only, and so do its permissions, which guard
/proc/self/fd. Nothing here is called by two threads at once.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

import attrs

from luod import verify
from luod.handlers.base import Mismatch
from luod.manifest import ForeignManifest, ManifestFault
from luod.session import Session
from luod.succession.liveupdate import MAX_FILES, Kept, LiveUpdateFault, Opening
from luod.succession.parcel import (
    INDEX,
    PARCEL_TOKEN,
    VERSION,
    Index,
    Parcel,
    ParcelFault,
    Place,
    Shipped,
    decode_index,
    decode_parcel,
    encode,
    part_name,
)
from luod_protocol import box
from luod_protocol.box import BoxFault
from luod_protocol.fds import OwnedFd, close_all

PATIENCE_S: Final = 10.0
"""How long the device may be in another process's use, in seconds, where waiting harms nobody."""

_KEPT_FLAGS: Final = os.O_APPEND | os.O_NONBLOCK
"""What of the file status flags is restored; the kernel brings none."""
_F_SEAL_EXEC: Final = 0x20
_GUARDS: Final = 0o666

_NOT_BROUGHT: Final = LiveUpdateFault("the last kernel, or the service manager, did not bring the kernel session", errno.ENOENT)

log = logging.getLogger("luod")


class NotUnloaded(Exception):
    """A session that can't be had back."""


@attrs.frozen(kw_only=True)
class _Loaded:
    """A session that is preserved: its kernel sessions, and from which others it borrows."""

    shipped: Shipped
    sessions: list[Kept]
    lenders: frozenset[bytes]
    files: int


class Cargo:
    """What the kernel is to carry. Closing it unpreserves everything.

    Args:
        opening: opens the device.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._loaded: dict[bytes, _Loaded] = {}
        self._lent: dict[tuple[int, int], tuple[bytes, int]] = {}
        """Device and inode of a memfd: the session that has it, and the token."""
        self._index: Kept | None = None

    def __contains__(self, session_id: bytes) -> bool:
        return session_id in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def files(self) -> int:
        """How many entries are preserved."""
        return sum(each.files for each in self._loaded.values())

    def load(self, session: Session, sealed: int) -> None:
        """Preserve a finalized session, whose box `sealed` (borrowed) is. Takes long for large memfds: their holes are filled.

        Raises:
            LiveUpdateFault: the kernel refuses; nothing of it is preserved.
            BoxFault, OSError: the box can't be opened.
        """
        assert session.sealed is not None
        manifest = session.sealed.manifest
        parts = parts_of(len(manifest.entries))
        sessions = self._created([part_name(session.session_id, part) for part in range(parts)])
        lent: dict[tuple[int, int], tuple[bytes, int]] = {}
        places: list[Place] = []
        try:
            for start in range(0, len(manifest.entries), MAX_FILES):
                entries = manifest.entries[start : start + MAX_FILES]
                fds = box.look(sealed, range(start, start + len(entries)))
                try:
                    for entry, fd in zip(entries, fds, strict=True):
                        try:
                            places.append(self._placed(session.session_id, entry.kind, fd.fileno(), len(places) + 1, sessions, lent))
                        except LiveUpdateFault as error:
                            raise LiveUpdateFault(f"entry {entry.name!r}: {error.reason}", error.errno) from None
                finally:
                    close_all(fds)
            parcel = Parcel(version=VERSION, manifest=box.manifest_of(sealed), places=tuple(places))
            _preserve_record(sessions[0], encode(parcel))
        except BaseException:
            _close(sessions)
            raise
        self._lent |= lent
        self._loaded[session.session_id] = _Loaded(
            shipped=Shipped(session_id=session.session_id, session=session.name, owner=session.owner, parts=parts),
            sessions=sessions,
            lenders=frozenset(place.lender for place in places if place.lender),
            files=len(places),
        )

    def _created(self, names: Sequence[str]) -> list[Kept]:
        sessions: list[Kept] = []
        device = self._opening(patience_s=PATIENCE_S)
        try:
            sessions.extend(device.create(name) for name in names)
        except BaseException:
            _close(sessions)
            raise
        finally:
            device.close()
        return sessions

    def _placed(
        self, own: bytes, kind: str, fd: int, token: int, sessions: Sequence[Kept], lent: dict[tuple[int, int], tuple[bytes, int]]
    ) -> Place:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if kind != "memfd":
            # All anonymous inodes are one, so nothing says which of these are the same.
            sessions[token // MAX_FILES].preserve(fd, token)
            return Place(lender=b"", token=token, flags=flags, position=0, mode=0)
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if mode & _GUARDS != _GUARDS and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _F_SEAL_EXEC:
            raise LiveUpdateFault("its permissions can't be restored, for it has the seal `exec`: give it mode 0666")
        key = (status.st_dev, status.st_ino)
        lender, place = lent.get(key) or self._lent.get(key) or (own, token)
        if (lender, place) == (own, token):
            sessions[token // MAX_FILES].preserve(fd, token)
            lent[key] = (own, token)
        position = os.lseek(fd, 0, os.SEEK_CUR)
        return Place(lender=b"" if lender == own else lender, token=place, flags=flags, position=position, mode=mode)

    def drop(self, session_id: bytes) -> list[bytes]:
        """Unpreserve a session, if it is preserved, and those that borrow from it. Returns the ids of these."""
        if session_id not in self._loaded:
            return []
        dropped = [session_id]
        for each in dropped:
            dropped += [one for one, loaded in self._loaded.items() if each in loaded.lenders and one not in dropped]
        for each in dropped:
            self._lent = {key: place for key, place in self._lent.items() if place[0] != each}
            _close(self._loaded.pop(each).sessions)
        return dropped[1:]

    def seal(self, index: Callable[[tuple[Shipped, ...]], Index]) -> None:
        """Preserve the index of all that is loaded: what the next kernel's luod looks for. Waits for nobody.

        Raises:
            LiveUpdateFault: it can't be; the sessions still are.
        """
        device = self._opening(patience_s=0)
        try:
            session = device.create(INDEX)
        finally:
            device.close()
        try:
            _preserve_record(session, encode(index(tuple(each.shipped for each in self._loaded.values()))))
        except BaseException:
            session.close()
            raise
        self._index = session

    @property
    def sessions(self) -> list[Kept]:
        """All kernel sessions: the index, then the others as it has them. Frozen only."""
        assert self._index is not None
        return [self._index, *(one for each in self._loaded.values() for one in each.sessions)]

    def close(self) -> None:
        """Unpreserve everything."""
        _close([*([self._index] if self._index is not None else []), *(one for each in self._loaded.values() for one in each.sessions)])
        self._index, self._loaded, self._lent = None, {}, {}


class Hold:
    """The kernel sessions of the last kernel, by session. A session's are finished when it is, or all before a next update."""

    def __init__(self, sessions: Mapping[bytes, list[Kept]]) -> None:
        self._sessions = dict(sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session_id: bytes) -> bool:
        return session_id in self._sessions

    def let_go(self, session_id: bytes) -> None:
        """A session has ended: the kernel need not hold anything of it. Does nothing for any other."""
        for each in self._sessions.pop(session_id, ()):
            _finish(each)

    def let_all_go(self) -> None:
        """Finish all."""
        for each in list(self._sessions):
            self.let_go(each)


@attrs.frozen(kw_only=True)
class Arrival:
    """What the last kernel brought: sessions, oldest first, the kernel sessions that they came in, and that of the index; and `lost`, what
    could not be had back."""

    index: Index
    sessions: list[Session]
    hold: Hold
    lost: tuple[str, ...]
    index_session: Kept

    def settle(self) -> None:
        """The sessions are kept elsewhere as well: from here on nobody needs to unload them again."""
        _finish(self.index_session)


def parts_of(entries: int) -> int:
    """How many kernel sessions a session with so many entries takes."""
    return entries // MAX_FILES + 1


def collect(opening: Opening) -> dict[int, Kept | LiveUpdateFault]:
    """The kernel sessions that the last kernel left for luod, or why one can't be had, by number: 0 is that of the index, the others come
    as it has them. The caller owns them.

    Raises:
        LiveUpdateFault: the device can't be opened.
    """
    device = opening(patience_s=PATIENCE_S)
    try:
        found: dict[int, Kept | LiveUpdateFault] = {}
        for number, name in enumerate(_names(found)):
            try:
                found[number] = device.retrieve(name)
            except LiveUpdateFault as error:
                found[number] = error
        return found
    finally:
        device.close()


def _names(found: Mapping[int, Kept | LiveUpdateFault]) -> Iterator[str]:
    """The names of kernel sessions: that of the index, and when it is found the others."""
    yield INDEX
    first = found[0]
    if not isinstance(first, LiveUpdateFault):
        with suppress(ParcelFault, LiveUpdateFault, OSError):
            yield from _parts(decode_index(_record(first)))


def _parts(index: Index) -> Iterator[str]:
    for shipped in index.sessions:
        yield from (part_name(shipped.session_id, part) for part in range(shipped.parts))


def unload(collected: Mapping[int, Kept | LiveUpdateFault], boot_id: str, *, known: Collection[bytes] = ()) -> Arrival | None:
    """What the last kernel brought, or None when it brought nothing. The caller owns all of it.

    Args:
        collected: its kernel sessions, as `collect` has them; owned.
        boot_id: of this kernel.
        known: ids of sessions that are here already, or have ended here.
    """
    left = dict(collected)
    first = left.pop(0, _NOT_BROUGHT)
    try:
        if isinstance(first, LiveUpdateFault):
            if left or not first.is_absent:
                log.error("what the last kernel brought can't be had: %s", first)
            return None
        try:
            index = decode_index(_record(first))
        except (ParcelFault, LiveUpdateFault, OSError) as error:
            log.error("the last kernel brought sessions that this luod can't use: %s: %s", INDEX, error)
            first.close()
            return None
        came: dict[bytes, list[Kept]] = {}
        lost: list[str] = []
        number = 0
        for shipped in index.sessions:
            parts = [left.pop(number + part, _NOT_BROUGHT) for part in range(1, shipped.parts + 1)]
            number += shipped.parts
            came[shipped.session_id] = [part for part in parts if not isinstance(part, LiveUpdateFault)]
            if faults := [part for part in parts if isinstance(part, LiveUpdateFault)]:
                _lose(shipped, str(faults[0]), came, lost)
    finally:
        _close(each for each in left.values() if not isinstance(each, LiveUpdateFault))
    wanted = [each for each in index.sessions if each.session_id not in known]
    parcels = {each.session_id: _parcel(each, came, lost) for each in wanted if each.session_id in came}
    adopted: list[Session] = []
    for shipped in wanted:
        parcel = parcels.get(shipped.session_id)
        if parcel is not None:
            try:
                adopted.append(_boxed(shipped, parcel, came, boot_id))
            except (NotUnloaded, LiveUpdateFault, OSError, Mismatch, BoxFault, ManifestFault, ForeignManifest) as error:
                _lose(shipped, str(error), {}, lost)
    _guard(parcels, came)
    held = {session.session_id for session in adopted}
    for session_id in set(came) - held:
        _close(came.pop(session_id))
    adopted.sort(key=lambda each: each.sealed.manifest.finalized_at if each.sealed is not None else 0.0)
    return Arrival(index=index, sessions=adopted, hold=Hold(came), lost=tuple(lost), index_session=first)


def _lose(shipped: Shipped, why: str, came: dict[bytes, list[Kept]], lost: list[str]) -> None:
    log.error("session %r of uid %d is lost, it did not come through the kexec: %s", shipped.session, shipped.owner, why)
    lost.append(f"{shipped.session} of uid {shipped.owner}: {why}")
    _close(came.pop(shipped.session_id, []))


def _parcel(shipped: Shipped, came: dict[bytes, list[Kept]], lost: list[str]) -> Parcel | None:
    try:
        return decode_parcel(_record(came[shipped.session_id][0]))
    except (ParcelFault, LiveUpdateFault, OSError) as error:
        _lose(shipped, str(error), came, lost)
        return None


def _boxed(shipped: Shipped, parcel: Parcel, came: Mapping[bytes, list[Kept]], boot_id: str) -> Session:
    fds: list[OwnedFd] = []
    try:
        for number, place in enumerate(parcel.places, 1):
            lender = place.lender or shipped.session_id
            if lender not in came:
                raise NotUnloaded(f"it shares a memfd with session {lender.hex()}, which did not come")
            fd = came[lender][place.token // MAX_FILES].retrieve(place.token)
            with fd:
                fds.append(_as_it_was(fd, place, alone=lender == shipped.session_id and place.token == number))
        sealed = box.seal(parcel.manifest, [fd.fileno() for fd in fds])
    finally:
        close_all(fds)
    try:
        return Session.adopted(verify.boxed(sealed.fileno(), boot_id), sealed, (), stored="")
    except BaseException:
        sealed.close()
        raise


def _as_it_was(fd: OwnedFd, place: Place, *, alone: bool) -> OwnedFd:
    """The fd of an entry from what was retrieved, which is open for reading and writing. `alone`: the file position is the entry's own."""
    access = place.flags & os.O_ACCMODE
    number = fd.fileno()
    if not stat.S_ISREG(os.fstat(number).st_mode) or (alone and access == os.O_RDWR):
        own = OwnedFd(fd.take())
    else:
        position = os.lseek(number, 0, os.SEEK_CUR) if alone else place.position
        own = OwnedFd(os.open(f"/proc/self/fd/{number}", access | os.O_CLOEXEC))
        os.lseek(own.fileno(), position, os.SEEK_SET)
    if place.flags & _KEPT_FLAGS:
        fcntl.fcntl(own.fileno(), fcntl.F_SETFL, place.flags & _KEPT_FLAGS)
    return own


def _guard(parcels: Mapping[bytes, Parcel | None], came: Mapping[bytes, list[Kept]]) -> None:
    """Restore the permissions of memfds, after all that had to be opened anew was."""
    for session_id, parcel in parcels.items():
        for place in parcel.places if parcel is not None else ():
            sessions = came.get(place.lender or session_id)
            if sessions is None or not place.mode:
                continue
            with sessions[place.token // MAX_FILES].retrieve(place.token) as fd:
                if stat.S_IMODE(os.fstat(fd.fileno()).st_mode) & _GUARDS != place.mode & _GUARDS:
                    os.fchmod(fd.fileno(), place.mode)


def _preserve_record(session: Kept, data: bytes) -> None:
    with OwnedFd(os.memfd_create("luod-record", os.MFD_CLOEXEC)) as memfd:
        view = memoryview(data)
        while view:
            view = view[os.write(memfd.fileno(), view) :]
        session.preserve(memfd.fileno(), PARCEL_TOKEN)


def _record(session: Kept) -> bytes:
    with session.retrieve(PARCEL_TOKEN) as memfd:
        size = os.fstat(memfd.fileno()).st_size
        data = b""
        while len(data) < size and (part := os.pread(memfd.fileno(), size - len(data), len(data))):
            data += part
        return data


def _finish(session: Kept) -> None:
    try:
        session.finish()
    except LiveUpdateFault as error:
        log.warning("the kernel: %s", error)
    session.close()


def _close(sessions: Iterable[Kept]) -> None:
    for each in sessions:
        each.close()
