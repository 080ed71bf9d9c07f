"""The verbs of taking a session back: list, show, claim, retrieve, release, finish, discard.

Happy path: claim, retrieve (any entries, in any order, any number of times), finish.

Unhappy paths:
1. A check fails: `Refusal`, and nothing has changed.
2. The box can't be opened (EMFILE): `Refusal`; the session is as it was.
3. The answer to a finish was lost, and it is asked again: `finished` again, for as long as the session is remembered.
"""

from __future__ import annotations

from luod import checks
from luod.changes import Change, Departure, Retrieval
from luod.custody import Client, Custody, Forgetting, Outcome, Pending, no_entry, own
from luod.lifecycle import SessionEvent
from luod.session import Sealed, Session, entry_info
from luod.store import Ended
from luod_protocol import box
from luod_protocol import messages as m
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd
from luod_protocol.limits import MAX_FDS_PER_PACKET, MAX_PACKET_BYTES


class Deserializing:
    """The verbs of the endpoint `deserialize`, over one custody."""

    def __init__(self, custody: Custody) -> None:
        self._custody = custody

    def claim(self, client: Client, request: m.Claim, _: list[OwnedFd]) -> Outcome:
        session = self._custody.find(client, request)
        self._custody.refuse_unless_free(session, client, force=request.force)
        session.step(SessionEvent.CLAIM)
        session.claimer = client.process
        client.session = session
        self._custody.publish("claimed", session, f"by process {client.process.pid}")
        return Outcome(
            reply=m.Claimed(
                seq=request.seq,
                info=session.info(self._custody.system, self._custody.survived(session)),
                metadata=session.metadata,
                entries=tuple(entry_info(entry) for entry in session.contents),
            )
        )

    def retrieve(self, client: Client, request: m.Retrieve, _: list[OwnedFd]) -> Outcome:
        session = own(client)
        sealed = _sealed(session)
        if not request.names:
            raise Refusal(Code.BAD_REQUEST, "retrieve names at least one entry")
        if len(request.names) > MAX_FDS_PER_PACKET:
            raise Refusal(
                Code.TOO_LARGE, f"retrieve names 1 to {MAX_FDS_PER_PACKET} entries, these are {len(request.names)}: ask several times"
            )
        if len(request.names) == MAX_FDS_PER_PACKET and sum(len(name) + 3 for name in request.names) > MAX_PACKET_BYTES - 1024:
            raise Refusal(Code.TOO_LARGE, f"the names of {len(request.names)} entries don't fit beside as many fds: ask for one fewer")
        for name in request.names:
            if name not in sealed.places:
                raise no_entry(session, name)
        try:
            fds = box.look(sealed.box.fileno(), [sealed.places[name] for name in request.names])
        except OSError as error:
            raise Refusal(Code.SYSTEM_ERROR, f"luod can't open the box of session {session.name!r}: {error.strerror}; try again") from None
        session.step(SessionEvent.RETRIEVE)
        changes: list[Change] = []
        if client.process not in session.retrieved_by:
            session.retrieved_by.add(client.process)
            changes.append(Retrieval(session_id=session.session_id, process=client.process))
            self._custody.publish("retrieved", session, f"by process {client.process.pid}")
        return Outcome(reply=m.Retrieved(seq=request.seq, names=request.names), fds=fds, changes=changes)

    def release(self, client: Client, request: m.Release, _: list[OwnedFd]) -> Outcome:
        self._custody.let_go(client, own(client), SessionEvent.RELEASE)
        return Outcome(reply=m.Released(seq=request.seq))

    def finish(self, client: Client, request: m.Finish, _: list[OwnedFd]) -> Outcome | Pending:
        checks.session_id(request.session_id)
        session = client.session
        if session is None:
            return self._finished_again(client, request)
        if session.session_id != request.session_id:
            raise Refusal(Code.BAD_REQUEST, f"this connection has claimed session {session.name!r}, which has another id")

        def act(_: str) -> Outcome:
            closing = self._custody.end(client, session, SessionEvent.FINISH, "finished")
            departure = Departure(session_id=session.session_id, owner=session.owner, finished=True)
            return Outcome(reply=m.Finished(seq=request.seq, session_id=session.session_id), changes=[departure], closing=closing)

        return Pending(waits_for=_forgetting(session, finished=True), act=act, undo=_as_it_was)

    def _finished_again(self, client: Client, request: m.Finish) -> Outcome:
        ended = self._custody.ended(client, request.session_id)
        if ended is not None and ended.finished:
            return Outcome(reply=m.Finished(seq=request.seq, session_id=request.session_id), again=request.session_id)
        session = self._custody.store.by_id(request.session_id)
        if session is not None and self._custody.may_see(client, session):
            raise Refusal(Code.OUT_OF_ORDER, f"session {session.name!r} is {session.state} and not claimed here: claim it, then finish")
        self._custody.refuse_ended(client, request.session_id)
        raise Refusal(Code.NO_SUCH_SESSION, "no session with this id is held, nor is one remembered as finished")

    def discard(self, client: Client, request: m.Discard, _: list[OwnedFd]) -> Outcome | Pending:
        session = self._custody.find(client, request)
        self._custody.refuse_unless_free(session, client, force=request.force)
        session.ending = True

        def act(_: str) -> Outcome:
            closing = self._custody.end(client, session, SessionEvent.DISCARD, "discarded")
            departure = Departure(session_id=session.session_id, owner=session.owner, finished=False)
            return Outcome(reply=m.Discarded(seq=request.seq, session_id=session.session_id), changes=[departure], closing=closing)

        def undo() -> None:
            session.ending = False

        return Pending(waits_for=_forgetting(session, finished=False), act=act, undo=undo)

    def list_sessions(self, client: Client, request: m.List, _: list[OwnedFd]) -> Outcome:
        owner = None if request.owner is None else self._custody.looked_at(client, request.owner)
        seen = [each for each in self._custody.store if self._custody.may_see(client, each) and owner in (None, each.owner)]
        sessions = tuple(each.info(self._custody.system, self._custody.survived(each)) for each in seen)
        return Outcome(reply=m.Listed(seq=request.seq, sessions=sessions))

    def show(self, client: Client, request: m.Show, _: list[OwnedFd]) -> Outcome:
        session = self._custody.find(client, request)
        return Outcome(
            reply=m.Shown(
                seq=request.seq,
                info=session.info(self._custody.system, self._custody.survived(session)),
                metadata=session.metadata,
                entries=tuple(entry_info(entry) for entry in session.contents),
            )
        )


def _forgetting(session: Session, *, finished: bool) -> Forgetting:
    ended = Ended(session_id=session.session_id, owner=session.owner, finished=finished)
    return Forgetting(ended=ended, box=_sealed(session).box.fileno(), stored=session.stored)


def _as_it_was() -> None:
    """A claimed session needs nothing: its claimer has it."""


def _sealed(session: Session) -> Sealed:
    if session.sealed is None:
        raise Refusal(Code.OUT_OF_ORDER, f"session {session.name!r} is not finalized")
    return session.sealed
