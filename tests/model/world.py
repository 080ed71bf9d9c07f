"""What the model checker looks at: one moment of a daemon, its successor, those that were replaced and still live, and the manager.

A `World` is a value: small, hashable, and all that can matter for what happens next. Sessions are bits, 1, 2, 4. A message is its name
and the session it is about (0 for none).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple

from luod.succession.new_table import NewState
from luod.succession.old_table import OldEvent, OldState

Message = tuple[str, int]
Told = tuple[str, str, int]
"""What lies in the manager's socket: who sent it, what, and about which session."""

OPEN_GATE = frozenset({OldState.SERVING, OldState.MEETING, OldState.COPYING})
"""Where a daemon takes requests (old.py: the gate is closed from `_freeze` to the end of `run`)."""

DEAD = "dead"
"""In place of a process's name: the main process, which died."""


class _Word(enum.StrEnum):
    __hash__ = str.__hash__  # Enum's own is slow


class Stage(_Word):
    """How far a session is, for its client and for the daemon's task that works on it."""

    OPEN = "open"
    PUT = "finalize: stored?"
    SEALED = "finalize: logged?"
    KEPT = "finalized"
    TAKEN = "retrieve: logged?"
    ENDING = "finish: in the ledger"
    REMOVING = "finish: removed?"
    GONE = "finish: let go?"
    CLOSING = "finish: to close"
    NOT_ALONE = "finish: alone?"
    DONE = "finished"
    NO_ANSWER = "finalize unanswered"
    NO_FINISH = "finish unanswered"
    LOST = "lost with its only owner"


AT_WORK = frozenset(
    {Stage.PUT, Stage.SEALED, Stage.TAKEN, Stage.ENDING, Stage.REMOVING, Stage.GONE, Stage.CLOSING, Stage.NOT_ALONE},
)
"""A request is being worked on: its task is inside the gate."""

SEALED = frozenset({Stage.SEALED, Stage.KEPT, Stage.TAKEN, Stage.ENDING, Stage.REMOVING})
"""The session is in the daemon's store, finalized (Session.sealed is set)."""


UNHEARD = frozenset({Stage.NO_ANSWER, Stage.NO_FINISH})


class At(_Word):
    """Where a daemon's handover is; old.py's methods."""

    BOOT = "__main__.fresh"
    IDLE = "idle"
    MEET = "_meet"
    OFFER = "_meet: offer"
    COPY = "_copy"
    BOX = "_copy: box"
    COPIED = "_copy: copied"
    VERIFY = "_copy: verified?"
    BROKEN = "_send: EPIPE"
    STILL = "_freeze"
    LIVE = "_send_live"
    DECIDE = "_commit"
    DRAIN = "_commit: deaf"
    HASTY = "_commit: not deaf"
    ANNOUNCE = "_release"
    CONFIRM = "_release: barrier"
    EXIT = "_exit"
    SEE_OFF = "_see_off"


SENDING = frozenset({At.OFFER, At.BOX, At.COPIED})


class Ready(_Word):
    """How far Keeper.begin is."""

    WAIT = "predecessor lives"
    LEDGER = "ledger stored?"
    LEAVE = "old ones removed?"
    YES = "ready"
    FAULT = "not kept"


class Old(NamedTuple):
    """A daemon that serves or has served."""

    up: bool = True
    state: OldState = OldState.SERVING
    at: At = At.IDLE
    held: int = 0
    """Boxes of which it has a descriptor."""
    ended: int = 0
    retrieved: int = 0
    """Sessions of which it knows that somebody has retrieved."""
    promoted: bool = False
    """It began to serve because its predecessor had died."""
    alone: bool = True
    """Whether its predecessor is gone."""
    logging: bool = False
    todo: int = 0
    out: tuple[tuple[str, int, bool], ...] = ()
    """Messages that wait for the channel's lock or for room; whether the handover's own task sends them."""
    inbox: tuple[Message, ...] = ()
    listens: bool = False
    heard: bool = False
    ear: tuple[OldEvent, ...] = ()
    end: bool = False
    """Whether its end of the channel is open."""
    deaf: bool = False
    ready: Ready = Ready.YES
    names: int = 0
    """Boxes that it believes to be in the manager's store."""
    ledger: tuple[int, int] | None = None
    """Endings and retrievals written."""


class New(NamedTuple):
    """A successor that does not serve yet."""

    up: bool = True
    state: NewState = NewState.STARTING
    at: str = "begin"
    """begin, run, lost (the socket has ended), left."""
    held: int = 0
    ended: int = 0
    retrieved: int = 0
    opened: int = 0
    inbox: tuple[Message, ...] = ()
    eof: bool = False
    """Whether the other end is closed."""
    end: bool = True


GONE = New(up=False, at="left", end=False)


class Manager(NamedTuple):
    """The service manager. `main` is a process's name, or DEAD. `ledgers` are those stored, oldest first: the name of who writes it, or
    what a dead one wrote."""

    main: str = "old"
    queue: tuple[Told, ...] = ()
    held: int = 0
    ledgers: tuple[str | tuple[int, int], ...] = ("old",)


class World(NamedTuple):
    """One moment. `ghosts` have been replaced and are not gone yet, the latest last."""

    old: Old
    stages: tuple[Stage, ...]
    new: New | None = None
    ghosts: tuple[Old, ...] = ()
    manager: Manager | None = None
    promised: int = 0
    """Sessions of which `finalized` said that they survive a crash."""
    seen: int = 0
    """Sessions of which a retrieval was answered."""
    attempts: int = 1


def bits(mask: int) -> Iterator[int]:
    """The sessions in a mask."""
    for session in (1, 2, 4):
        if mask & session:
            yield session


def staged(world: World, session: int) -> Stage:
    """A session's stage."""
    return world.stages[session >> 1]


def with_stage(world: World, session: int, stage: Stage) -> World:
    """The world with a session at another stage."""
    stages = list(world.stages)
    stages[session >> 1] = stage
    return world._replace(stages=tuple(stages))


def at_stage(world: World, stages: frozenset[Stage]) -> int:
    """The sessions that are at one of these stages."""
    mask = 0
    for number, stage in enumerate(world.stages):
        if stage in stages:
            mask |= 1 << number
    return mask


def sealed(world: World) -> int:
    """The finalized sessions in the daemon's store: also those of whose end or beginning a client never heard."""
    return at_stage(world, SEALED) | (at_stage(world, UNHEARD) & world.old.held)


def serves(old: Old) -> bool:
    """Whether a daemon takes requests."""
    return old.up and old.at is not At.BOOT and old.state in OPEN_GATE


def names(mask: int) -> str:
    """For people: ab for sessions 1 and 2."""
    return "".join("abc"[session >> 1] for session in bits(mask)) or "-"


def _queue(messages: tuple[tuple[str, int], ...]) -> str:
    return " ".join(f"{kind}({names(session)})" if session else kind for kind, session in messages) or "."


def _daemon(old: Old) -> str:
    if not old.up:
        return "dead"
    parts = [f"{old.state} {old.at}", f"has {names(old.held)}"]
    if old.out:
        parts.append(f"to send: {_queue(tuple(each[:2] for each in old.out))}")
    if old.inbox:
        parts.append(f"unread: {_queue(old.inbox)}")
    if old.ear:
        parts.append(f"events: {' '.join(old.ear)}")
    if old.deaf:
        parts.append("deaf")
    if old.ready is not Ready.YES:
        parts.append(old.ready)
    if old.ledger is not None:
        parts.append(f"ledger ended {names(old.ledger[0])} retrieved {names(old.ledger[1])}")
    return ", ".join(parts)


def describe(world: World) -> str:
    """The world in a few lines."""
    lines = [f"sessions  {'; '.join(f'{names(1 << number)} {stage}' for number, stage in enumerate(world.stages))}"]
    lines += [f"replaced  {_daemon(ghost)}" for ghost in world.ghosts]
    lines.append(f"daemon    {_daemon(world.old)}")
    new = world.new
    if new is not None:
        end = " EOF" if new.eof else ""
        state = f"{new.state} {new.at}, has {names(new.held)}, unread: {_queue(new.inbox)}{end}" if new.up else "dead"
        lines.append(f"successor {state}")
    manager = world.manager
    if manager is not None:
        told = _queue(tuple((f"{who}:{what}", session) for who, what, session in manager.queue))
        ledgers = ", ".join(
            f"of {each}" if isinstance(each, str) else f"ended {names(each[0])} retrieved {names(each[1])}" for each in manager.ledgers
        )
        lines.append(f"manager   main {manager.main}, has {names(manager.held)}, ledgers: {ledgers}; unread: {told}")
    return "\n".join(f"        {line}" for line in lines)
