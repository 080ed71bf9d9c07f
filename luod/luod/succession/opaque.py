"""Boxes that can't be sessions here: of a newer luod as a rule, kept untouched and handed on until one can read them.

Theory. After a downgrade, what the newer luod left in the service manager's store may be of a version that isn't known here. Which session
it is, whose and of what name, is in its manifest, so nobody can be shown it; but whoever has the box has the session, so it is enough to
keep the box. Every luod that is handed one tries to read it.

Happy path: `examine` when it comes, while nobody waits; `decide` when all sessions are there, without touching a fd.

Unhappy paths:
1. It is of a version that isn't read here (manifest, layout of the box, kind of an entry): it stays opaque.
2. It can be read, and another session has its id, or its owner's name: that one was there when clients came, so this one stays opaque, and
   the next luod asks again. Of two boxes the one finalized first is taken.
3. It can be read, and its session is known to have ended: it was on its way out of the store when its luod died. It is let go of.

Invariants: nothing is dropped here but by 3.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Iterable, Mapping
from typing import Final

import attrs

from luod import verify
from luod.handlers.base import Mismatch
from luod.manifest import ForeignManifest, Manifest, ManifestFault
from luod.session import Session
from luod.store import Opaque
from luod.system import Process
from luod.verify import UnknownKind
from luod_protocol import box
from luod_protocol.box import BoxFault, UnknownLayout
from luod_protocol.fds import OwnedFd

SHOWN: Final = 3
"""How many are named in a log."""

log = logging.getLogger("luod")


def examine(sealed: OwnedFd, stored: str, boot_id: str) -> Opaque:
    """What `sealed` (moved) is: with its manifest where it can be a session here, else with the reason why not.

    Args:
        stored: what the service manager calls it; empty when it doesn't hold it.
        boot_id: of the kernel that runs.
    """
    found = Opaque(box=sealed, stored=stored)
    try:
        found.fds = box.size(sealed.fileno())
        found.manifest = verify.boxed(sealed.fileno(), boot_id)
    except (Mismatch, BoxFault, ManifestFault, ForeignManifest, OSError) as error:
        found.why = str(error)
        found.foreign = isinstance(error, (ForeignManifest, UnknownKind, UnknownLayout))
    return found


@attrs.frozen(kw_only=True)
class Decided:
    """What becomes of boxes: those that are sessions now, those that stay opaque, those whose session has ended."""

    sessions: list[tuple[Opaque, Manifest]] = attrs.Factory(list[tuple[Opaque, Manifest]])
    opaque: list[Opaque] = attrs.Factory(list[Opaque])
    ended: list[Opaque] = attrs.Factory(list[Opaque])


def decide(found: Iterable[Opaque], sessions: Iterable[Session], ended: Container[bytes]) -> Decided:
    """Decide what becomes of each of `found`, oldest first.

    Args:
        sessions: those that there are.
        ended: the ids of those that have ended.
    """
    decided = Decided()
    taken: set[bytes | tuple[int, str]] = set()
    for session in sessions:
        taken |= {session.session_id, (session.owner, session.name)}
    for each in sorted(found, key=lambda each: each.manifest.finalized_at if each.manifest else 0.0):
        if each.manifest is None:
            decided.opaque.append(each)
            continue
        session_id, owned_name = each.manifest.session_id, (each.manifest.owner, each.manifest.session)
        if session_id in ended:
            decided.ended.append(each)
        elif session_id in taken:
            each.why = f"session {session_id.hex()} is there already"
            decided.opaque.append(each)
        elif owned_name in taken:
            each.why = f"uid {each.manifest.owner} has another session {each.manifest.session!r}"
            decided.opaque.append(each)
        else:
            taken |= {session_id, owned_name}
            decided.sessions.append((each, each.manifest))
    return decided


def as_session(found: Opaque, description: Manifest, retrieved: Mapping[bytes, set[Process]], boot_id: str) -> Session:
    """The session that a box is, with what is known of who has `retrieved`. It owns the box."""
    # Processes are of one boot: after another one their numbers mean somebody else.
    processes = retrieved.get(description.session_id, set()) if description.boot_id == boot_id else set[Process]()
    return Session.adopted(description, found.box, processes, stored=found.stored)


def tell(opaque: Collection[Opaque]) -> None:
    """Log what is kept and can't be shown; nothing when there is nothing."""
    if opaque:
        few = [f"{each.stored or 'one'} ({each.why})" for each in list(opaque)[:SHOWN]]
        more = f" and {len(opaque) - SHOWN} more" if len(opaque) > SHOWN else ""
        log.warning("sessions that can't be shown here are kept for a luod that can read them: %s%s", ", ".join(few), more)
