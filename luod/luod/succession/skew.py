"""Whether a successor can carry all that this daemon holds. Asked before anything is frozen.

What is opaque here is not asked about: whoever speaks this version of the handover can keep a box.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from luod.session import Session
from luod.succession.messages import VERSIONS, Meet

SHOWN: Final = 3
"""How many of those that are in the way are named, of each sort."""

_SHOWN_CHARACTERS: Final = 64


def obstacles(meet: Meet, *, sessions: Iterable[Session], speakers: Iterable[tuple[int, int]]) -> list[str]:
    """What the successor can't carry, each as a clause for a person; empty when it can carry all.

    Args:
        meet: what the successor said.
        sessions: those that are held.
        speakers: the wire version and the pid of each connected client.
    """
    found: list[str] = []
    if VERSIONS.common(meet.handover) is None:
        found.append(f"it speaks handover version {meet.handover}, this luod {VERSIONS}")
    known = {(kind, compatible) for kind, versions in meet.kinds.items() for compatible in versions}
    unread: dict[int, list[Session]] = {}
    entries: dict[tuple[str, str], list[str]] = {}
    for session in sessions:
        # An open session has no manifest: whoever finalizes it writes one.
        if session.sealed is not None and session.sealed.manifest.version not in meet.manifest:
            unread.setdefault(session.sealed.manifest.version, []).append(session)
        if not session.kinds <= known:
            for entry in session.contents:
                if (kind := (entry.kind, entry.compatible)) not in known:
                    entries.setdefault(kind, []).append(f"{_quoted(entry.name)} of {_named(session)}")
    clients: dict[int, list[int]] = {}
    for version, pid in speakers:
        if version not in meet.wire:
            clients.setdefault(version, []).append(pid)
    for version, held in sorted(unread.items()):
        of_these = _some([_named(each) for each in held[:SHOWN]], len(held))
        found.append(f"it reads manifests of version {meet.manifest}, and version {version} is that of {of_these}")
    for version, pids in sorted(clients.items()):
        of_these = _some([f"process {each}" for each in pids[:SHOWN]], len(pids))
        found.append(f"it speaks wire version {meet.wire} to clients, and version {version} is that of {of_these}")
    for (name, compatible), named in sorted(entries.items()):
        knows = ", ".join(meet.kinds.get(name, ())) or "no such kind"
        found.append(f"entries of kind {name} are {compatible}, it knows {knows}: {_some(named[:SHOWN], len(named))}")
    return found


def _named(session: Session) -> str:
    return f"session {_quoted(session.name)} of uid {session.owner}"


def _quoted(name: str) -> str:
    return repr(name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}...")


def _some(named: Sequence[str], count: int) -> str:
    return ", ".join(named) + (f" and {count - len(named)} more" if count > len(named) else "")
