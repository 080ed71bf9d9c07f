"""Regular files, block and character devices that the configuration names, of which luod knows nothing more.

Such a fd is taken when its object is, now, what lies at an allowed path. The text of the link in /proc can't show that: in a mount
namespace of its own a client gives any file any path. So the text only chooses
which path to look at; what counts is that device and inode there, and for a device node the device it stands for, are those of the fd.

The look never waits. A path is looked up in what the kernel has cached (RESOLVE_CACHED of openat2(2)) and no further: a FUSE server that a
client runs under an allowed path isn't asked. What a client has open is cached, so this finds what is there; a network file system whose
server the kernel would have to ask first is the exception, and is refused.

A file of a FUSE mount is never taken: its server can change the inode number of a file that is open, and so stop an upgrade.

Preserved: the open file, with its position and its flock(2) locks. Contents are the file's, as live as its users leave them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import ClassVar, Final

import attrs

from luod.handlers.base import Mismatch, Probe
from luod.handlers.kernel import Stat, cached_stat, is_fuse
from luod_protocol.records import Fact

_TYPES: Final[Mapping[int, str]] = {stat.S_IFREG: "regular", stat.S_IFBLK: "block", stat.S_IFCHR: "character"}

_WILD: Final = frozenset("*?[")


@attrs.frozen
class File:
    """Files and devices. `path` is where it was found; empty where nothing is recorded but only verified."""

    kind: ClassVar[str] = "file"
    compatible: ClassVar[str] = "file-v1"

    path: str = ""

    def recognize(self, probe: Probe) -> bool:
        """By file type: for whatever no other handler knows. Whether it is allowed is for `AllowedFiles`, when it is preserved."""
        return probe.type in _TYPES and probe.opened

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Its path as allowed, its type, the access, and for a device which one it is (major:minor), else nothing."""
        return {"path": self.path, **_nature(probe)}

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """Type, access and device are the same. The path isn't looked at: it is others' to change, and so is the configuration."""
        for fact, value in _nature(probe).items():
            if value != facts.get(fact):
                raise Mismatch(f"the file's {fact} is {value}, it was {facts.get(fact)}")


def _nature(probe: Probe) -> dict[str, Fact]:
    device = probe.stat.st_rdev
    return {
        "type": _TYPES[probe.type],
        "access": probe.access,
        "device": "" if probe.type == stat.S_IFREG else f"{os.major(device)}:{os.minor(device)}",
    }


class AllowedFiles:
    """The files that a configuration allows.

    Args:
        patterns: absolute paths; `*`, `?` and `[abc]` match within one component.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._literal: list[str] = []
        self._wild: list[list[str]] = []
        for pattern in patterns:
            if _WILD & set(pattern):
                self._wild.append(pattern.split("/"))
            else:
                self._literal.append(pattern)

    def __bool__(self) -> bool:
        return bool(self._literal or self._wild)

    def path_of(self, probe: Probe) -> str | None:
        """The allowed path at which the object of this fd lies now; None: it isn't allowed. Never blocks."""
        for path, follow in self._candidates(probe):
            found = cached_stat(path, follow=follow)
            if found is not None and _what(found) == _what(probe.stat) and not is_fuse(found.st_dev):
                return path
        return None

    def _candidates(self, probe: Probe) -> Iterator[tuple[str, bool]]:
        # A path that is written out may lead through symlinks, as /dev/disk/by-id/... does: whoever wrote it meant that.
        for path in self._literal:
            yield path, True
        # A path that the kernel tells has none; one that is found there all the same somebody has just put there.
        parts = probe.link.split("/")
        for pattern in self._wild:
            if len(pattern) == len(parts) and all(map(fnmatchcase, parts, pattern)):
                yield probe.link, False
                return


def _what(found: Stat) -> tuple[int, int, int, int]:
    return stat.S_IFMT(found.st_mode), found.st_dev, found.st_ino, found.st_rdev
