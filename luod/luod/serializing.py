"""The verbs of a session's making: open, preserve, unpreserve, finalize, cancel.

Happy path: each verb checks shape, permission, capacity and uniqueness in this order, then acts; finalize seals all into one box.

Unhappy paths:
1. A check fails: `Refusal`, and nothing has changed. fds that came with the request are the caller's to close.
2. The kernel refuses (ETOOMANYREFS, EMFILE, EBUSY of a seal): `Refusal` with what it means; what was begun is undone, except seals already
   added to memfds, which can't be taken off again: the refusal names them.
3. Somebody who is writing into a memfd keeps it from being sealed, perhaps for ever: it is sealed in a thread, and `Refusal` after a while.
   The session is open as before; the thread may still add the seals.
"""

from __future__ import annotations

import errno
import fcntl
import threading
from collections.abc import Mapping, Sequence

import attrs

from luod import checks, manifest
from luod.changes import Sealing
from luod.closing import Closing
from luod.custody import Client, Custody, Outcome, Pending, Storing, Working, no_entry, own
from luod.handlers import recognize
from luod.handlers.base import Probe
from luod.handlers.recognizer import Recognizer
from luod.lifecycle import SessionEvent, SessionState
from luod.quota import Cost, cost
from luod.session import Sealed, Session, Staged, entry_info, weigh
from luod_protocol import box
from luod_protocol import messages as m
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd, close_all, duplicate
from luod_protocol.limits import MAX_ENTRIES_PER_SESSION, MAX_MANIFEST_BYTES, MAX_NEEDS_PER_ENTRY


class Serializing:
    """The verbs of the endpoint `serialize`, over one custody; `recognizer` says what is taken."""

    def __init__(self, custody: Custody, recognizer: Recognizer) -> None:
        self._custody = custody
        self._recognizer = recognizer

    def open(self, client: Client, request: m.Open, _: list[OwnedFd]) -> Outcome:
        checks.session_name(request.session)
        checks.session_id(request.session_id)
        checks.metadata(request.metadata, f"session {request.session!r}")
        owner = self._custody.owner(client, request.owner)
        self._refuse_unless_allowed(client, request.session)
        session = Session(
            session_id=request.session_id,
            name=request.session,
            owner=owner,
            metadata=request.metadata,
            opened_at=self._custody.system.now(),
        )
        self._custody.quota.refuse_beyond(owner, cost(session))
        if len(self._custody.store) >= self._custody.capacity.sessions:
            raise Refusal(
                Code.LIMIT_REACHED,
                f"luod holds {len(self._custody.store)} sessions, its limit: finish or discard some, "
                "or have limits.max_sessions of luod's configuration raised",
            )
        existing = self._custody.store.by_name(owner, request.session)
        if existing is not None:
            raise Refusal(
                Code.SESSION_EXISTS,
                f"uid {owner} has a session {request.session!r} already ({existing.state}): "
                "claim and finish it, discard it, or take another name",
            )
        self._custody.refuse_ended(client, request.session_id)
        # Nor one that ended and is somebody else's: what is remembered of it must stay its owner's.
        if self._custody.store.by_id(request.session_id) or self._custody.store.ended(request.session_id):
            raise Refusal(Code.SESSION_EXISTS, "a session with this id exists, or did: ids are random, make a new one for each session")
        self._custody.store.add(session)
        self._custody.quota.charge(session)
        client.session, client.notices = session, request.notices
        self._custody.publish("opened", session, "")
        return Outcome(reply=m.Opened(seq=request.seq, session_id=session.session_id))

    def _refuse_unless_allowed(self, client: Client, name: str) -> None:
        policy = self._custody.policy
        if policy.may_open(client.peer, name):
            return
        patterns = policy.openable(client.peer)
        what = f"a session {name[:64]!r}, only those named {' or '.join(patterns)}" if patterns else "sessions"
        raise Refusal(
            Code.NOT_PERMITTED,
            f"the [[serialize]] rules of luod's configuration don't let uid {client.uid} open {what:.300}; "
            "whoever runs luod can change them",
        )

    def preserve(self, client: Client, request: m.Preserve, fds: list[OwnedFd]) -> Outcome:
        session = own(client)
        if not request.entries:
            raise Refusal(Code.BAD_REQUEST, "preserve names at least one entry")
        for spec in request.entries:
            checks.entry_name(spec.name)
            checks.metadata(spec.metadata, f"entry {spec.name!r}", spec.name)
            if len(spec.needs) > MAX_NEEDS_PER_ENTRY:
                raise Refusal(
                    Code.TOO_LARGE, f"entry {spec.name!r} needs {len(spec.needs)} others, at most {MAX_NEEDS_PER_ENTRY}", entry=spec.name
                )
            for need in spec.needs:
                checks.entry_name(need, what=f"entry {spec.name!r} refused, its need")
        checks.unique(spec.name for spec in request.entries)
        entries = [self._recognized(spec, fd.fileno()) for spec, fd in zip(request.entries, fds, strict=True)]
        if session.size + len(entries) > MAX_ENTRIES_PER_SESSION:
            raise Refusal(
                Code.LIMIT_REACHED,
                f"session {session.name!r} would have {session.size + len(entries)} entries, at most {MAX_ENTRIES_PER_SESSION} fit: "
                "use several sessions",
            )
        added = weigh(entries)
        weight = session.weight + added
        if weight > MAX_MANIFEST_BYTES:
            raise Refusal(
                Code.TOO_LARGE,
                f"session {session.name!r} would have {weight} bytes of names, needs and metadata, at most {MAX_MANIFEST_BYTES} are kept: "
                "put them into a memfd and preserve that",
            )
        self._custody.quota.refuse_beyond(session.owner, Cost(staged_fds=len(entries), metadata_bytes=added))
        here = self._custody.staged_fds + self._custody.being_closed()
        if here + len(entries) > self._custody.capacity.staged_fds:
            raise Refusal(
                Code.LIMIT_REACHED,
                f"luod has {here} fds of open sessions, those that it is closing included, and {self._custody.capacity.staged_fds} is the "
                "limit: finalize what is complete, then go on",
            )
        for entry in entries:
            if entry.name in session.staged:
                raise Refusal(
                    Code.ENTRY_EXISTS,
                    f"session {session.name!r} has an entry {entry.name!r} already: unpreserve it first, or take another name",
                    entry=entry.name,
                )
        session.step(SessionEvent.PRESERVE)
        for entry, fd in zip(entries, fds, strict=True):
            self._custody.carriable.see(entry.sort, fd.fileno())
            session.staged[entry.name] = Staged(entry=entry, fd=fd)
        fds.clear()
        session.weight = weight
        self._custody.quota.charge(session)
        return Outcome(reply=m.Preserved(seq=request.seq, entries=tuple(entry_info(entry) for entry in entries)))

    def _recognized(self, spec: m.EntrySpec, fd: int) -> manifest.Entry:
        try:
            probe = Probe(fd)
            handler = self._recognizer.recognize(probe)
            facts = handler.record(probe)
        except Refusal as refusal:
            raise Refusal(refusal.code, f"entry {spec.name!r} refused: {refusal.message}", entry=spec.name) from None
        except OSError as error:
            why = f"entry {spec.name!r} refused: the kernel doesn't tell luod what it is: {error.strerror}"
            raise Refusal(Code.SYSTEM_ERROR, why, entry=spec.name) from None
        return manifest.Entry(
            name=spec.name,
            kind=handler.kind,
            compatible=handler.compatible,
            metadata=spec.metadata,
            needs=spec.needs,
            identity=probe.identity,
            facts=facts,
        )

    def unpreserve(self, client: Client, request: m.Unpreserve, _: list[OwnedFd]) -> Outcome:
        session = own(client)
        checks.unique(request.names)
        for name in request.names:
            if name not in session.staged:
                raise no_entry(session, name)
        session.step(SessionEvent.UNPRESERVE)
        taken = [session.staged.pop(name) for name in request.names]
        session.weight -= weigh(staged.entry for staged in taken)
        closing = Closing(session.owner, [staged.fd for staged in taken])
        self._custody.quota.charge(session)
        return Outcome(reply=m.Unpreserved(seq=request.seq), closing=closing)

    def finalize(self, client: Client, request: m.Finalize, _: list[OwnedFd]) -> Outcome | Pending:
        checks.session_id(request.session_id)
        session = client.session
        if session is None:
            return self._finalized_again(client, request)
        if session.session_id != request.session_id:
            raise Refusal(Code.BAD_REQUEST, "this connection's session has another id: finalize with the id that it was opened with")
        if request.entries not in (None, session.size):
            raise Refusal(
                Code.BAD_REQUEST,
                f"session {session.name!r} has {session.size} entries, the request says {request.entries}: was a preserve refused?",
            )
        self._custody.outlook_of(session).demand(request.require)
        for name in request.seal:
            if name not in session.staged:
                raise no_entry(session, name)
        checks.needs({name: staged.entry.needs for name, staged in session.staged.items()})
        self._refuse_unless_it_fits(session)
        if request.seal:
            return self._seal_first(client, request, session)
        return self._box(client, request, session, ())

    def _refuse_unless_it_fits(self, session: Session) -> None:
        self._custody.quota.refuse_beyond(session.owner, Cost(preserved_fds=session.size))
        if self._custody.preserved_fds + session.size > self._custody.capacity.preserved_fds:
            raise Refusal(
                Code.LIMIT_REACHED,
                f"session {session.name!r} has {session.size} fds, luod holds {self._custody.preserved_fds} for its clients and "
                f"{self._custody.capacity.preserved_fds} is the limit: finish or discard sessions, or raise limits.max_preserved_fds "
                "(more needs a uid of luod's own with a high RLIMIT_NOFILE, or CAP_SYS_RESOURCE)",
            )

    def _box(self, client: Client, request: m.Finalize, session: Session, sealed: Sequence[str]) -> Pending:
        description = manifest.Manifest(
            version=manifest.VERSIONS.high,
            session_id=session.session_id,
            session=session.name,
            owner=session.owner,
            metadata=session.metadata,
            boot_id=self._custody.system.boot_id,
            generation=self._custody.generation,
            opened_at=session.opened_at,
            finalized_at=self._custody.system.now(),
            entries=tuple(session.contents),
        )
        try:
            sealing = Sealed.of(description, _boxed(description, session))
        except Refusal as refusal:
            raise Refusal(refusal.code, refusal.message + _already(sealed)) from None
        # Charged before it is waited for: others finalize meanwhile.
        session.sealing = True
        self._custody.quota.charge(session)

        def undo() -> None:
            session.sealing = False
            self._custody.quota.charge(session)
            # Never the last reference: the entries are still staged.
            sealing.box.close()

        def act(stored: str) -> Outcome:
            self._custody.outlook_of(session).demand(request.require)
            session.sealed, session.stored, session.sealing = sealing, stored, False
            session.step(SessionEvent.FINALIZE)
            staged, session.staged = session.staged, {}
            self._custody.quota.charge(session)
            # Never the last reference, the box has one: these closes can't block.
            close_all(each.fd for each in staged.values())
            client.session = None
            self._custody.publish("finalized", session, f"{len(staged)} entries")
            return Outcome(reply=self._finalized(request, session), changes=[Sealing(session=session)])

        return Pending(waits_for=Storing(box=sealing.box.fileno()), act=act, undo=undo)

    def _seal_first(self, client: Client, request: m.Finalize, session: Session) -> Pending:
        sealing = _Sealing(_missing_seals(session, request.seal), session)

        def act(_: str) -> Pending:
            for name in sealing.done:
                staged = session.staged[name]
                probe = Probe(staged.fd.fileno())
                facts = recognize(probe).record(probe)
                session.staged[name] = attrs.evolve(staged, entry=attrs.evolve(staged.entry, facts=facts))
            if sealing.fault is not None:
                raise sealing.fault
            # Others have finalized meanwhile.
            self._refuse_unless_it_fits(session)
            return self._box(client, request, session, sealing.done)

        late = Refusal(
            Code.BAD_SEAL,
            f"{', '.join(request.seal):.200} can't be sealed now, somebody is in the middle of writing there; the session is still open, "
            "try again when nobody writes (the seals may be added in the meantime)",
        )
        return Pending(waits_for=Working(uid=session.owner, work=sealing.work, late=late), act=act, undo=sealing.give_up)

    def _finalized_again(self, client: Client, request: m.Finalize) -> Outcome:
        session = self._custody.store.by_id(request.session_id)
        if session is None or not self._custody.may_see(client, session):
            self._custody.refuse_ended(client, request.session_id)
            raise Refusal(Code.NO_SUCH_SESSION, "no session with this id was finalized: open it and preserve its entries again")
        if session.state is SessionState.OPEN:
            raise Refusal(Code.OUT_OF_ORDER, "the session with this id is open on another connection, which alone can finalize it")
        return Outcome(reply=self._finalized(request, session), again=session.session_id)

    def _finalized(self, request: m.Finalize, session: Session) -> m.Finalized:
        return m.Finalized(
            seq=request.seq,
            session_id=session.session_id,
            survives=self._custody.survived(session),
            entry_survives=self._custody.differing(session),
        )

    def cancel(self, client: Client, request: m.Cancel, _: list[OwnedFd]) -> Outcome:
        session = own(client)
        return Outcome(reply=m.Cancelled(seq=request.seq), closing=self._custody.end(client, session, SessionEvent.CANCEL, "cancelled"))


def _missing_seals(session: Session, wanted: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The seals that are to be added to each of these entries, as bits."""
    bits = {name: checks.seal_bits(name, names) for name, names in wanted.items()}
    for name in bits:
        entry = session.staged[name].entry
        if entry.kind != "memfd":
            raise Refusal(Code.BAD_SEAL, f"entry {name!r} is a {entry.kind}: only memfds have seals", entry=name)
        seals = fcntl.fcntl(session.staged[name].fd.fileno(), fcntl.F_GET_SEALS)
        bits[name] &= ~seals
        if seals & fcntl.F_SEAL_SEAL and bits[name]:
            raise Refusal(Code.BAD_SEAL, f"entry {name!r} takes no more seals: it was made without MFD_ALLOW_SEALING", entry=name)
    return bits


class _Sealing:
    """Adds seals. F_ADD_SEALS waits for whoever is in the middle of a write(2) there (mm/memfd.c: inode_lock), who may wait for memory of
    its own choice; and for some time where pages are pinned.

    Args:
        missing: the bits to add, by entry.
        session: whose entries these are.

    Attributes:
        done: what was sealed, in order.
        fault: why that isn't all.
    """

    def __init__(self, missing: Mapping[str, int], session: Session) -> None:
        self.done: list[str] = []
        self.fault: Refusal | None = None
        self._missing = missing
        self._mine = threading.Lock()
        # Duplicates: whoever waits for this may give up, and the entries be closed.
        self._fds: dict[str, OwnedFd] = {}
        name = ""
        try:
            for name in missing:
                self._fds[name] = duplicate(session.staged[name].fd.fileno())
        except OSError as error:
            close_all(self._fds.values())
            raise Refusal(Code.SYSTEM_ERROR, f"entry {name!r} can't be sealed: {error.strerror}; try again", entry=name) from None

    def work(self) -> None:
        """Add them, up to the first that fails."""
        if not self._mine.acquire(blocking=False):
            return
        name = ""
        try:
            for name, added in self._missing.items():
                if added:
                    fcntl.fcntl(self._fds[name].fileno(), fcntl.F_ADD_SEALS, added)
                self.done.append(name)
        except OSError as error:
            why = "it is still mapped writable: unmap it first" if error.errno == errno.EBUSY else str(error)
            self.fault = Refusal(Code.BAD_SEAL, f"entry {name!r} can't be sealed: {why}{_already(self.done)}", entry=name)
        finally:
            close_all(self._fds.values())

    def give_up(self) -> None:
        """Nobody waits for it any more: have it not begin, if it hasn't."""
        if self._mine.acquire(blocking=False):
            close_all(self._fds.values())


def _already(sealed: Sequence[str]) -> str:
    return f"; these are sealed already, which can't be undone: {', '.join(sealed)}" if sealed else ""


def _boxed(description: manifest.Manifest, session: Session) -> OwnedFd:
    data = manifest.encode(description)
    if len(data) > MAX_MANIFEST_BYTES:
        raise Refusal(Code.TOO_LARGE, f"the manifest of session {session.name!r} has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} fit")
    try:
        return box.seal(data, [staged.fd.fileno() for staged in session.staged.values()])
    except OSError as error:
        if error.errno == errno.ETOOMANYREFS:
            raise Refusal(
                Code.LIMIT_REACHED,
                "the kernel refuses more fds in flight for luod's uid (ETOOMANYREFS): finish or discard sessions, or give luod a uid of "
                "its own with a higher RLIMIT_NOFILE",
            ) from None
        raise Refusal(
            Code.SYSTEM_ERROR, f"session {session.name!r} can't be boxed: {error.strerror}; it is still open, try again"
        ) from None
