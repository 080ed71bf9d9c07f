"""Whether a successor can carry all that this daemon holds. Asked before anything is frozen."""

from __future__ import annotations

from collections.abc import Collection

from luod.succession.messages import VERSIONS, Meet
from luod_protocol.version import VersionRange


def obstacles(meet: Meet, *, manifests: Collection[int], wires: Collection[int], kinds: Collection[tuple[str, str]]) -> list[str]:
    """What the successor can't carry, each as a clause for a person; empty when it can carry all.

    Args:
        meet: what the successor said.
        manifests: the versions of the manifests held.
        wires: the wire versions that connected clients speak.
        kinds: (kind, compatible) of the entries held.
    """
    found: list[str] = []
    if VERSIONS.common(meet.handover) is None:
        found.append(f"it speaks handover version {meet.handover}, this luod {VERSIONS}")
    found += [f"it reads manifests of version {meet.manifest}, {each} is held" for each in _outside(manifests, meet.manifest)]
    found += [f"it speaks wire version {meet.wire} to clients, one is connected with {each}" for each in _outside(wires, meet.wire)]
    for kind, compatible in sorted(kinds):
        known = meet.kinds.get(kind, ())
        if compatible not in known:
            found.append(f"entries of kind {kind} are {compatible}, it knows {', '.join(known) or 'no such kind'}")
    return found


def _outside(held: Collection[int], known: VersionRange) -> list[int]:
    return sorted(each for each in held if not known.low <= each <= known.high)
