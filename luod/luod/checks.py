"""The checks of a session's content that need nothing but the content. Each raises the refusal that names the entry."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Mapping
from typing import Final

from luod_protocol.errors import Code, Refusal
from luod_protocol.limits import MAX_METADATA_BYTES, RESERVED_PREFIX, SESSION_ID_BYTES, name_fault

SEALS: Final[Mapping[str, int]] = {
    "seal": fcntl.F_SEAL_SEAL,
    "shrink": fcntl.F_SEAL_SHRINK,
    "grow": fcntl.F_SEAL_GROW,
    "write": fcntl.F_SEAL_WRITE,
    "future-write": 0x10,
    "exec": 0x20,
}
"""F_ADD_SEALS of fcntl(2); include/uapi/linux/fcntl.h for the two that Python has no name for."""


def session_name(name: str) -> None:
    """Refuse a name that no session can have."""
    reason = name_fault(name)
    if reason is None and name.startswith(RESERVED_PREFIX):
        reason = f"names that begin with {RESERVED_PREFIX!r} are luod's own"
    if reason is not None:
        raise Refusal(Code.BAD_NAME, f"session name {_short(name)} refused: {reason}")


def entry_name(name: str, *, what: str = "entry name") -> None:
    """Refuse a name that no entry can have."""
    reason = name_fault(name)
    if reason is not None:
        raise Refusal(Code.BAD_NAME, f"{what} {_short(name)} refused: {reason}", entry=name[:64])


def session_id(value: bytes) -> None:
    """Refuse what can't be a session's id."""
    if len(value) != SESSION_ID_BYTES:
        raise Refusal(Code.BAD_REQUEST, f"a session id has {SESSION_ID_BYTES} bytes, this has {len(value)}")


def metadata(value: bytes, whose: str, entry: str = "") -> None:
    """Refuse metadata that is too large."""
    if len(value) > MAX_METADATA_BYTES:
        raise Refusal(
            Code.TOO_LARGE,
            f"{len(value)} bytes of metadata for {whose}, at most {MAX_METADATA_BYTES} are kept: put them into a memfd and preserve that",
            entry=entry,
        )


def unique(names: Iterable[str]) -> None:
    """Refuse a list that has a name twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Refusal(Code.ENTRY_EXISTS, f"entry {_short(name)} is named twice in one request", entry=name[:255])
        seen.add(name)


def needs(graph: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse needs that aren't there, or go round in a circle.

    Args:
        graph: each entry's name and the names that it needs.
    """
    for name, wanted in graph.items():
        for each in wanted:
            if each not in graph:
                raise Refusal(
                    Code.BAD_NEEDS, f"entry {name!r} needs {each!r}, which isn't in the session: preserve it, or drop the need", entry=name
                )
    done: set[str] = set()
    for start in graph:
        path: dict[str, None] = {}
        stack = [(start, iter(graph[start]))]
        while stack:
            name, rest = stack[-1]
            path[name] = None
            following = next((each for each in rest if each not in done), None)
            if following is None:
                stack.pop()
                path.pop(name, None)
                done.add(name)
            elif following in path:
                circle = [*list(path)[list(path).index(following) :], following]
                raise Refusal(Code.BAD_NEEDS, f"needs go round in a circle: {' -> '.join(circle)}", entry=following)
            else:
                stack.append((following, iter(graph[following])))


def seal_bits(entry: str, names: Iterable[str]) -> int:
    """The F_SEAL_ bits of `names`."""
    bits = 0
    for name in names:
        if name not in SEALS:
            raise Refusal(Code.BAD_SEAL, f"unknown seal {_short(name)} for entry {entry!r}: there are {', '.join(SEALS)}", entry=entry)
        bits |= SEALS[name]
    return bits


def _short(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:61] + "...")
