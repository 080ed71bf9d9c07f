"""What must exist: the model beside the soak's clients.

Theory. Clients tell what they are about to ask, then ask, then tell the answer. So what a client has not been answered yet is known to
have been asked, and is *unknown*: it may have happened or not, and must not be held against luod. Tellings of different clients come in
any order; a session is held once `finalized` was answered *or* somebody is known to end it, and so on.

Happy path: open, sealing, held, ending, gone.

Unhappy paths:
1. An answer is lost, or the client dies between question and answer: sealing or ending stays, until somebody asks again (`unknown`).
2. The client of an open session is gone, or rolls back: leaving, until the session isn't listed any more.
3. What luod says contradicts all this: `Violation`, with the last of what concerns the session.

Invariants: a held session is listed, a gone one never again.
"""

from __future__ import annotations

import enum
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from typing import Final, TypeAlias

import attrs

from luod_protocol.records import SessionInfo
from soak.plan import plan

LIMIT_S: Final = 30.0
"""How long luod may take, in seconds, to notice that a client is gone."""
LAST: Final = 60
"""How much is remembered of a session."""

Asker: TypeAlias = tuple[int, int]
"""A client: its process's number, its own number there."""


class Breach(enum.StrEnum):
    """What can be wrong."""

    LOST = "lost"
    DUPLICATED = "duplicated"
    LEAKED = "leaked"
    REVIVED = "come back"
    WRONG = "wrong"


class Violation(Exception):
    """luod broke a promise."""

    def __init__(self, breach: Breach, text: str, session_id: bytes = b"") -> None:
        super().__init__(text)
        self.breach = breach
        self.session_id = session_id


class State(enum.StrEnum):
    """What is known of a session."""

    OPEN = "open"
    LEAVING = "leaving"
    SEALING = "sealing"
    HELD = "held"
    ENDING = "ending"
    GONE = "gone"


class Event(enum.StrEnum):
    """What happens to what is known."""

    FINALIZING = "finalizing"
    NOT_FINALIZED = "not finalized"
    FINALIZED = "finalized"
    ENDING = "ending"
    NOT_ENDED = "not ended"
    ENDED = "ended"
    LEFT = "left"
    ABSENT = "absent"


TABLE: Final[dict[tuple[State, Event], State]] = {
    (State.OPEN, Event.FINALIZING): State.SEALING,
    (State.OPEN, Event.LEFT): State.LEAVING,
    (State.OPEN, Event.ABSENT): State.GONE,
    (State.LEAVING, Event.LEFT): State.LEAVING,
    (State.LEAVING, Event.ABSENT): State.GONE,
    (State.SEALING, Event.NOT_FINALIZED): State.OPEN,
    (State.SEALING, Event.FINALIZED): State.HELD,
    (State.SEALING, Event.ABSENT): State.GONE,
    # Somebody found it before its maker has told that it was finalized.
    (State.SEALING, Event.ENDING): State.ENDING,
    (State.HELD, Event.ENDING): State.ENDING,
    (State.HELD, Event.FINALIZED): State.HELD,
    (State.ENDING, Event.FINALIZED): State.ENDING,
    (State.ENDING, Event.ENDING): State.ENDING,
    (State.ENDING, Event.NOT_ENDED): State.HELD,
    (State.ENDING, Event.ENDED): State.GONE,
    **{(State.GONE, event): State.GONE for event in Event if event is not Event.NOT_FINALIZED},
}


@attrs.define(kw_only=True)
class Known:
    """What is known of one session.

    Attributes:
        since: number of the model's change that made it so.
        at: when that was, in seconds of CLOCK_MONOTONIC.
        askers: who asked to end it and was not answered, and with which verb.
        retrieving, retrieved: pids that asked for its fds; those that were answered, and when that was told.
        last: what concerns it.
    """

    session_id: bytes
    name: str
    owner: int
    maker: Asker
    state: State = State.OPEN
    since: int = 0
    at: float = 0.0
    askers: dict[Asker, str] = attrs.Factory(dict[Asker, str])
    retrieving: set[int] = attrs.Factory(set[int])
    retrieved: dict[int, float] = attrs.Factory(dict[int, float])
    last: deque[str] = attrs.Factory(lambda: deque[str](maxlen=LAST))


class Model:
    """All sessions.

    Attributes:
        changes: how often anything changed.
        counts: how many sessions were made, finalized, ended.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.counts = Counter[str]()
        self._known: dict[bytes, Known] = {}
        self._gone: dict[bytes, Known] = {}
        """A window of the last; older ones only as ids."""
        self._long_gone: set[bytes] = set()
        self._ended: list[bytes] = []
        self._orphans = 0

    def __iter__(self) -> Iterator[Known]:
        return iter(list(self._known.values()))

    def get(self, session_id: bytes) -> Known | None:
        """What is known of a session, also for some time after its end."""
        return self._known.get(session_id) or self._gone.get(session_id)

    def note(self, session_id: bytes, text: str) -> None:
        """Remember what concerns a session."""
        known = self.get(session_id)
        if known is not None:
            known.last.append(f"{time.monotonic():.3f} {known.state:8} {text}")

    def open(self, session_id: bytes, owner: int, maker: Asker) -> None:
        """A client is about to open a session."""
        self.changes += 1
        self.counts["opened"] += 1
        self._known[session_id] = Known(
            session_id=session_id, name=plan(session_id).name, owner=owner, maker=maker, since=self.changes, at=time.monotonic()
        )

    def step(self, session_id: bytes, event: Event, asker: Asker | None = None, verb: str = "") -> State:
        """Something happens, by the will of `asker`. Returns the state then."""
        known = self.get(session_id)
        if known is None:
            return State.GONE
        if asker is not None and event in (Event.ENDING, Event.NOT_ENDED, Event.ENDED):
            known.askers.pop(asker, None)
        if asker is not None and event is Event.ENDING:
            known.askers[asker] = verb
        if event is Event.NOT_ENDED and (known.askers or known.state is State.HELD):
            return known.state  # somebody else asked as well
        after = TABLE.get((known.state, event))
        if after is None:
            raise Violation(Breach.WRONG, f"a session that is {known.state} can't be {event}", session_id)
        if after is not known.state:
            self._change(known, after)
        return after

    def _change(self, known: Known, after: State) -> None:
        self.changes += 1
        self.counts[after] += 1
        known.state, known.since, known.at = after, self.changes, time.monotonic()
        if after in (State.LEAVING, State.GONE):
            self._ended.append(known.session_id)
        if after is State.GONE:
            self._gone[known.session_id] = self._known.pop(known.session_id)
            if len(self._gone) > 2000:
                oldest = next(iter(self._gone))
                del self._gone[oldest]
                self._long_gone.add(oldest)

    def orphan(self, asker: Asker) -> None:
        """This client will not tell any more what became of what it asked, or never knew. Its open session ends."""
        self._orphans += 1
        nobody = (-self._orphans, 0)
        for known in self:
            if asker in known.askers:
                known.askers[nobody] = known.askers.pop(asker)
            if known.maker == asker:
                known.maker = nobody
                if known.state is State.OPEN:
                    self.step(known.session_id, Event.LEFT)

    def take_ended(self) -> list[bytes]:
        """Sessions that have ended since this was asked last: nobody may hold anything of them."""
        ended, self._ended = self._ended, []
        return ended

    def unknown(self) -> list[tuple[bytes, str]]:
        """What has to be asked again, since nobody will tell: ids and verbs."""
        sealing = [(known.session_id, "finalize") for known in self if known.state is State.SEALING and known.maker[0] < 0]
        return sealing + [(known.session_id, verb) for known in self for asker, verb in known.askers.items() if asker[0] < 0]

    def not_ended(self, session_id: bytes) -> None:
        """Nobody of whom it was unknown has ended this session."""
        known = self._known.get(session_id)
        for asker in [each for each in known.askers if each[0] < 0] if known else ():
            self.step(session_id, Event.NOT_ENDED, asker)

    # ---- what luod says

    def check_list(self, listed: Collection[SessionInfo], asked_at: int, survives: Collection[str]) -> None:
        """Hold a list against what must exist.

        Args:
            listed: what luod listed.
            asked_at: `changes` when it was asked. All that was told before the answer has been noted by now.
            survives: what luod must have promised.

        Raises:
            Violation: as it says.
        """
        seen: set[bytes] = set()
        names: set[tuple[int, str]] = set()
        for info in listed:
            if info.session_id in seen or (info.owner, info.session) in names:
                raise Violation(Breach.DUPLICATED, f"session {info.session!r} of uid {info.owner} is listed twice", info.session_id)
            seen.add(info.session_id)
            names.add((info.owner, info.session))
            self._check_listed(info, asked_at, survives)
        for known in self:
            if known.state is State.HELD and known.since <= asked_at and known.session_id not in seen:
                raise Violation(Breach.LOST, f"session {known.name!r} of uid {known.owner} isn't there", known.session_id)
            if known.state is State.LEAVING and known.since <= asked_at and known.session_id not in seen:
                self.step(known.session_id, Event.ABSENT)

    def _check_listed(self, info: SessionInfo, asked_at: int, survives: Collection[str]) -> None:
        known = self.get(info.session_id)
        if known is None:
            raise Violation(Breach.REVIVED, f"session {info.session!r} is there, which ended long ago or never was", info.session_id)
        if known.state is State.GONE and known.since <= asked_at:
            raise Violation(Breach.REVIVED, f"session {info.session!r} is {info.state}, though it ended", info.session_id)
        if (info.owner, info.session) != (known.owner, known.name):
            text = f"it is {info.session!r} of {info.owner}, it was {known.name!r} of {known.owner}"
            raise Violation(Breach.WRONG, text, info.session_id)
        if known.since > asked_at:
            return
        if known.state in (State.OPEN, State.LEAVING) and info.state != "open":
            raise Violation(Breach.WRONG, f"session {info.session!r} is {info.state}, though nobody has finalized it", info.session_id)
        if known.state is State.LEAVING and time.monotonic() > known.at + LIMIT_S:
            raise Violation(Breach.LEAKED, f"session {info.session!r} is still open, {LIMIT_S:g} s after its client's end", info.session_id)
        if known.state is State.HELD:
            self._check_held(info, survives)

    def _check_held(self, info: SessionInfo, survives: Collection[str]) -> None:
        if info.state == "open":
            raise Violation(Breach.WRONG, f"session {info.session!r} is open again", info.session_id)
        if info.entries != len(plan(info.session_id).kept):
            raise Violation(Breach.LOST, f"session {info.session!r} has {info.entries} entries", info.session_id)
        if not set(survives) <= set(info.survives) or not info.generation or not info.finalized_at:
            raise Violation(Breach.WRONG, f"session {info.session!r}: {info}", info.session_id)

    def check_holders(self, session_id: bytes, holders: Mapping[int, bool], asked_at: float, dead: Mapping[int, float]) -> None:
        """Hold who has retrieved, as luod says, against who told so.

        Args:
            holders: pid -> whether luod says that it lives.
            dead: pid -> since when no process has it.
        """
        known = self.get(session_id)
        if known is None:
            return
        told = {pid for pid, when in known.retrieved.items() if when < asked_at}
        if not told <= set(holders) <= known.retrieving:
            text = f"luod says that {sorted(holders)} have retrieved; {sorted(told)} have, {sorted(known.retrieving)} asked"
            raise Violation(Breach.WRONG, text, session_id)
        for pid, alive in holders.items():
            if alive and dead.get(pid, asked_at) < asked_at:
                raise Violation(Breach.WRONG, f"process {pid} is dead, luod says it lives", session_id)

    def check_missing(self, session_id: bytes, asked_at: float) -> None:
        """Somebody who asked for a session at `asked_at` was told that there is none."""
        known = self.get(session_id)
        if known is not None and known.state is State.HELD and known.at < asked_at:
            raise Violation(Breach.LOST, f"luod doesn't know session {known.name!r}", session_id)

    def check_found(self, session_id: bytes, asked_at: float) -> None:
        """Somebody who asked for a session at `asked_at` got it."""
        known = self.get(session_id)
        if known is None or (known.state is State.GONE and known.at < asked_at):
            raise Violation(Breach.REVIVED, "a session that ended was claimed", session_id)

    def check_name_was_free(self, session_id: bytes, asked_at: float) -> None:
        """A session was opened that somebody asked for at `asked_at`."""
        mine = self.get(session_id)
        for known in self if mine is not None else ():
            same = mine is not None and known is not mine and (known.owner, known.name) == (mine.owner, mine.name)
            if same and known.state is State.HELD and known.at < asked_at:
                raise Violation(Breach.DUPLICATED, f"uid {known.owner} could open a second session {known.name!r}", known.session_id)
