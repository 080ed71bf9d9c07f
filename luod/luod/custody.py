"""What luod has in custody, and the rules that all verbs share.

Theory. `Custody` holds the sessions; who may see which session, and how one ends, is decided here once for all verbs. `policy` has the
rules and `quota` the books of what is kept for whom. `serializing` and `deserializing` have the verbs, `orchestrator` finds the verb for a
request.

Invariants: every session in the store is charged in the quota, as it is now, and no other; what can't be read here is nobody's and counted
apart. A session belongs to one client while open or claimed. What a client may not see doesn't exist for it: `no-such-session`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs

from luod import checks, survival
from luod.capacity import Capacity
from luod.changes import Change
from luod.closing import NOTHING, Closing
from luod.lifecycle import SessionEvent, SessionState
from luod.policy import ROOT, Peer, Policy
from luod.quota import Quota
from luod.session import Session
from luod.store import Ended, Opaque, Store
from luod.succession.carriable import Carriable
from luod.survival import Outlook
from luod.system import Process, System
from luod_protocol import messages as m
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd


@attrs.define(kw_only=True, eq=False)
class Client:
    """Who is at the other end of a connection, and the session that is tied to it. `notices`: it asked to be told of updates."""

    peer: Peer
    process: Process
    session: Session | None = None
    notices: bool = False

    @property
    def uid(self) -> int:
        """The uid that connected."""
        return self.peer.uid


@attrs.frozen(kw_only=True)
class Outcome:
    """What a verb did: the reply, the fds to send with it, and what must be done before it is sent.

    `again` is the id of a session of which the reply says again what was said before, or is just about to be said on another connection.
    """

    reply: m.Reply
    fds: Sequence[OwnedFd] = ()
    changes: Sequence[Change] = ()
    closing: Closing = NOTHING
    again: bytes = b""


@attrs.frozen(kw_only=True)
class Storing:
    """A session that is to be in the service manager's store: its box is borrowed."""

    box: int


@attrs.frozen(kw_only=True)
class Forgetting:
    """A session that is to be out of the service manager's store, where its box (borrowed) is `stored`: it will end as `ended` says."""

    ended: Ended
    box: int
    stored: str


@attrs.frozen(kw_only=True)
class Working:
    """Work that may wait for a client, for ever: it is done in a thread of this uid's. It goes on when `late` has been raised and
    nobody waits any more, so it owns what it needs."""

    uid: int
    work: Callable[[], None]
    late: Refusal


@attrs.frozen(kw_only=True)
class Pending:
    """A verb whose checks are passed and that waits for the service manager, or for work. Nobody else can touch its session meanwhile.

    `act(stored)` does it, told what the manager calls the box that it holds (empty: none), or returns what is to be waited for next. It may
    still raise a Refusal. When that happens, or the wait fails, `undo()` leaves everything as it was.
    """

    waits_for: Storing | Forgetting | Working
    act: Callable[[str], Outcome | Pending]
    undo: Callable[[], None]


Publish = Callable[[str, Session, str], None]


class Custody:
    """All sessions of one daemon.

    Args:
        system: clock and machine.
        capacity: what to take.
        policy: who may do what.
        generation: of this daemon.
        publish: called with an event's name, its session and a detail, for those who monitor.
        being_closed: how many fds wait to be closed.
        carriable: what the kernel carries.

    Attributes:
        outlook: what finalized sessions survive, but for a kexec.
        admit: raises a Refusal for a request that must wait for the end of an update.
    """

    def __init__(
        self,
        *,
        system: System,
        capacity: Capacity,
        policy: Policy,
        generation: int,
        publish: Publish,
        carriable: Carriable,
        being_closed: Callable[[], int] = int,
    ) -> None:
        self.outlook = survival.ALONE
        self.admit: Callable[[m.Request], None] = _admit_all
        self.carriable: Final = carriable
        self.store = Store()
        self.quota: Final = Quota(capacity.share, exempt=(ROOT, system.uid))
        self.system: Final = system
        self.capacity: Final = capacity
        self.policy: Final = policy
        self.generation: Final = generation
        self.publish: Final = publish
        self.being_closed: Final = being_closed

    @property
    def preserved_fds(self) -> int:
        """Entries of all finalized sessions, those that can't be read here among them."""
        return self.quota.total.preserved_fds + sum(opaque.fds for opaque in self.store.opaque)

    @property
    def staged_fds(self) -> int:
        """Entries of all open sessions."""
        return self.quota.total.staged_fds

    def lost(self, client: Client) -> Closing:
        """A client is gone: roll its open session back, or release its claim. Returns what is to be closed."""
        session = client.session
        if session is None:
            return NOTHING
        if session.state is SessionState.OPEN:
            return self.end(client, session, SessionEvent.SERIALIZER_LOST, "rolled-back")
        self.let_go(client, session, SessionEvent.CLAIMER_LOST)
        return NOTHING

    def adopt(self, session: Session) -> None:
        """Take in a session from a succession: open, preserved or claimed."""
        self.store.add(session)
        self.quota.charge(session)
        self.carriable.see_session(session)

    def keep_opaque(self, opaque: Opaque) -> None:
        """Take in a box that can't be a session here, or not yet; owned from here on."""
        self.store.opaque.append(opaque)

    def give_opaque(self, opaque: Opaque) -> None:
        """Move a box out again, to be adopted as a session or closed."""
        self.store.opaque.remove(opaque)

    def drop(self, session_id: bytes) -> Closing:
        """Take out a session that was adopted from a predecessor, where it ended since. Returns what is to be closed."""
        session = self.store.by_id(session_id)
        if session is None:
            return NOTHING
        self.store.remove(session)
        self.quota.release(session)
        return Closing(session.owner, session.take_fds())

    def survived(self, session: Session) -> tuple[str, ...]:
        """What a finalized session survives."""
        return self.outlook_of(session).survived(stored=bool(session.stored))

    def outlook_of(self, session: Session) -> Outlook:
        """What `session` survives once it is finalized, and why it doesn't survive the rest. It travels whole or not at all."""
        return self.outlook.with_kernel(self.carriable.why_not(session.sorts))

    def differing(self, session: Session) -> dict[str, tuple[str, ...]]:
        """Entries that a session of their own would carry further than this one, which has others that the kernel refuses."""
        refused = self.carriable.refused(session.sorts)
        if not refused or self.carriable.fault:
            return {}
        survived = self.outlook.with_kernel("").survived(stored=bool(session.stored))
        return {entry.name: survived for entry in session.contents if entry.sort not in refused}

    def count(self, state: SessionState) -> int:
        """How many sessions are in `state`."""
        return sum(session.state is state for session in self.store)

    def end(self, client: Client, session: Session, event: SessionEvent, name: str) -> Closing:
        """A session ends with `event`, published as `name`. Returns what is to be closed."""
        session.step(event)
        if session.sealed is not None:
            self.store.remember(
                Ended(session_id=session.session_id, owner=session.owner, finished=event is SessionEvent.FINISH),
            )
        self.store.remove(session)
        self.quota.release(session)
        if client.session is session:
            client.session = None
        self.publish(name, session, f"{session.size} entries")
        return Closing(session.owner, session.take_fds())

    def let_go(self, client: Client, session: Session, event: SessionEvent) -> None:
        """A claim ends and the session is preserved again."""
        session.step(event)
        session.claimer = None
        client.session = None
        self.publish("released", session, "")

    def owner(self, client: Client, wanted: int | None) -> int:
        """The uid for which `client` opens a session.

        Raises:
            Refusal: it may not act for `wanted`.
        """
        if wanted is None or wanted == client.uid:
            return client.uid
        if client.uid != ROOT:
            raise Refusal(Code.NOT_PERMITTED, f"uid {client.uid} can't open sessions for uid {wanted}: only root can")
        _refuse_no_uid(wanted)
        return wanted

    def looked_at(self, client: Client, wanted: int | None) -> int:
        """The uid at whose sessions `client` looks.

        Raises:
            Refusal: it may not look at those of `wanted`.
        """
        if wanted is None or wanted == client.uid:
            return client.uid
        if not self.policy.may_look(client.peer, wanted):
            raise Refusal(
                Code.NOT_PERMITTED,
                f"uid {client.uid} can't act for uid {wanted}: only root can, and whom a [[claim]] rule of luod's configuration names",
            )
        _refuse_no_uid(wanted)
        return wanted

    def may_see(self, client: Client, session: Session) -> bool:
        """Whether the session exists for this client."""
        return self.policy.may_see(client.peer, session.owner, session.name)

    def find(self, client: Client, request: m.Show | m.Claim | m.Discard) -> Session:
        """The session that `request` means.

        Raises:
            Refusal: there is none that the client may see.
        """
        if bool(request.session) == bool(request.session_id):
            raise Refusal(Code.BAD_REQUEST, f"{request.type} takes a session's name or its id, exactly one of them")
        owner = self.looked_at(client, request.owner)
        if request.session_id:
            checks.session_id(request.session_id)
            session = self.store.by_id(request.session_id)
            self.refuse_ended(client, request.session_id)
        else:
            session = self.store.by_name(owner, request.session)
        if session is None or not self.may_see(client, session):
            what = f"{request.session[:64]!r}" if request.session else f"with id {request.session_id.hex()}"
            raise Refusal(Code.NO_SUCH_SESSION, f"uid {owner} has no session {what}: `list` shows those that there are")
        return session

    def ended(self, client: Client, session_id: bytes) -> Ended | None:
        """How the session with this id ended, if that is remembered and the client's business. Its name is forgotten, its id was enough
        to find it."""
        ended = self.store.ended(session_id)
        return ended if ended is not None and self.policy.may_look(client.peer, ended.owner) else None

    def refuse_ended(self, client: Client, session_id: bytes) -> None:
        """Refuse the id of a session that has ended, telling how."""
        ended = self.ended(client, session_id)
        if ended is not None:
            how = "finished" if ended.finished else "discarded"
            raise Refusal(Code.SESSION_FINISHED, f"the session with this id was {how}; luod holds nothing of it any more")

    def refuse_unless_free(self, session: Session, client: Client, *, force: bool) -> None:
        """Refuse unless `client` may claim or discard the session now."""
        if session.state is SessionState.OPEN:
            raise Refusal(Code.OUT_OF_ORDER, f"session {session.name!r} is still open: it can be had once its client has finalized it")
        if session.ending:
            raise Refusal(Code.SESSION_CLAIMED, f"session {session.name!r} is being discarded")
        if session.state is SessionState.CLAIMED:
            pid = session.claimer.pid if session.claimer else 0
            raise Refusal(
                Code.SESSION_CLAIMED, f"session {session.name!r} is claimed by process {pid}: it is free when that one releases or ends"
            )
        holders = [each for each in session.retrieved_by if each != client.process and self.system.is_alive(each)]
        if holders and not force:
            pids = ", ".join(str(each.pid) for each in holders)
            raise Refusal(
                Code.STILL_HELD,
                f"process {pids} has retrieved from session {session.name!r} and is alive, it may still use what it got: "
                "end it first, or use force",
            )


def _admit_all(_: m.Request) -> None:
    """There is no update."""


def own(client: Client) -> Session:
    """The session tied to the client's connection."""
    if client.session is None:
        raise Refusal(Code.OUT_OF_ORDER, "this connection has no session")
    return client.session


def _refuse_no_uid(wanted: int) -> None:
    if not 0 <= wanted < 2**32 - 1:
        raise Refusal(Code.BAD_REQUEST, f"{wanted} is no uid")


def no_entry(session: Session, name: str) -> Refusal:
    """The refusal of a name that isn't there."""
    return Refusal(Code.NO_SUCH_ENTRY, f"session {session.name!r} has no entry {name[:64]!r}: `show` lists its entries", entry=name[:255])
