"""What an update of the kernel would carry, before anything is done: which sessions can't travel and why, and what the rest weighs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final

import trio

from luod.custody import Custody
from luod.lifecycle import SessionState
from luod.session import Session
from luod.succession.kernel import parts_of
from luod.succession.liveupdate import MAX_SESSIONS
from luod_protocol import box
from luod_protocol import messages as m
from luod_protocol.box import BoxFault
from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import close_all, duplicate

UNREADABLE: Final = "this luod can neither read them nor send them along; upgrade luod first"
"""Why what is opaque can't travel, and what to do."""

_LOOK_AT_ONCE: Final = 128


async def report(custody: Custody, seq: int) -> m.PreflightReport:
    """What would be carried now.

    Raises:
        Refusal: luod can't look at its sessions.
    """
    sessions = [each for each in custody.store if each.sealed is not None]
    excluded = cannot(custody, sessions)
    going = [each for each in sessions if each.session_id not in excluded]
    boxes = [
        (duplicate(each.sealed.box.fileno()), [place for place, entry in enumerate(each.contents) if entry.kind == "memfd"])
        for each in going
        if each.sealed is not None
    ]
    try:
        memory, holes = await trio.to_thread.run_sync(lambda: _weigh((each.fileno(), places) for each, places in boxes))
    except (OSError, BoxFault) as error:
        raise Refusal(Code.SYSTEM_ERROR, f"luod can't look at its sessions: {error}; try again") from None
    finally:
        close_all(each for each, _ in boxes)
    return m.PreflightReport(
        seq=seq,
        fault=impossible(custody, going),
        sessions=len(going),
        fds=sum(each.size for each in going),
        memory_bytes=memory,
        hole_bytes=holes,
        open_sessions=tuple(told(each) for each in custody.store if each.state is SessionState.OPEN),
        cannot={
            **{f"{told(each)}, id {each.session_id.hex()}": excluded[each.session_id] for each in sessions if each.session_id in excluded},
            **dict.fromkeys(opaque(custody), UNREADABLE),
        },
    )


def impossible(custody: Custody, going: Iterable[Session]) -> str:
    """Why these sessions can't be carried together; empty where they can."""
    fault = custody.carriable.fault
    parts = sum(parts_of(each.size) for each in going) + 1
    if not fault and parts > MAX_SESSIONS:
        fault = f"these sessions need {parts} sessions of the kernel, which takes {MAX_SESSIONS}: leave some behind, or finish some"
    return fault


def cannot(custody: Custody, sessions: Iterable[Session]) -> dict[bytes, str]:
    """Those of these sessions, by id, that can't travel, and why."""
    sessions, carriable = tuple(sessions), custody.carriable
    carriable.look({sort for session in sessions for sort in session.sorts})
    found: dict[bytes, str] = {}
    for session in sessions:
        carriable.see_session(session)
        refused = carriable.refused(session.sorts)
        if refused:
            entry = next(each for each in session.contents if each.sort in refused)
            found[session.session_id] = f"entry {entry.name!r}: {carriable.why_not((entry.sort,))}"
    return found


def opaque(custody: Custody) -> tuple[str, ...]:
    """What of a newer luod's is here and can't travel, in words; empty without any."""
    many = len(custody.store.opaque)
    return (f"{many} sessions of a newer luod",) if many else ()


def told(session: Session) -> str:
    """How a session is named in what people read."""
    return f"session {session.name!r} of uid {session.owner}"


def _weigh(boxes: Iterable[tuple[int, Sequence[int]]]) -> tuple[int, int]:
    """Bytes that the memfds at these places in boxes (borrowed) have, and how many their holes would take; each memfd once."""
    seen: dict[tuple[int, int], os.stat_result] = {}
    for sealed, places in boxes:
        for start in range(0, len(places), _LOOK_AT_ONCE):
            fds = box.look(sealed, places[start : start + _LOOK_AT_ONCE])
            try:
                for status in (os.fstat(fd.fileno()) for fd in fds):
                    seen[status.st_dev, status.st_ino] = status
            finally:
                close_all(fds)
    return (
        sum(min(each.st_size, each.st_blocks * 512) for each in seen.values()),
        sum(max(0, each.st_size - each.st_blocks * 512) for each in seen.values()),
    )
