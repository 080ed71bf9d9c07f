"""The manifest: the versioned description of a preserved session, which travels with its fds, always.

It lies in the session's box beside the fds, entry N describing fd N. Whoever has the box has the session: nothing else is needed to
adopt it, and nothing that is kept elsewhere may be needed to understand it.

Unhappy paths:
1. A manifest of a version that isn't read here, a newer one as a rule: `ForeignManifest`. The box is kept untouched and passed on, never
   dropped (succession/opaque).
2. Bytes that are no manifest: `ManifestFault`.
"""

from __future__ import annotations

from typing import ClassVar, Final

import attrs

from luod_protocol.codec import Codec, as_map, unpack
from luod_protocol.errors import LuodError, ProtocolFault
from luod_protocol.records import Fact
from luod_protocol.version import VersionRange

VERSIONS = VersionRange(low=1, high=1)


class ManifestFault(LuodError):
    """These bytes are no manifest."""


class ForeignManifest(LuodError):
    """A manifest of a version that this luod doesn't read."""


@attrs.frozen(kw_only=True)
class Identity:
    """Which kernel object a fd refers to: st_dev and st_ino, of a character device st_dev and st_rdev. Means something on one kernel only,
    and nothing for anonymous inodes, which all kinds of them share."""

    device: int
    inode: int


@attrs.frozen(kw_only=True)
class Entry:
    """One preserved fd. `facts` is what its handler recorded, `needs` the names of entries that it depends on."""

    name: str
    kind: str
    compatible: str
    metadata: bytes
    needs: tuple[str, ...]
    identity: Identity
    facts: dict[str, Fact]

    @property
    def sort(self) -> str:
        """Its kind, or more than that where the kernel makes a difference in what it carries through a kexec."""
        if self.kind == "socket":
            return f"{self.facts.get('family')} socket"
        return f"{self.kind} of huge pages" if self.facts.get("huge_page_size") else self.kind


@attrs.frozen(kw_only=True)
class Manifest:
    """A preserved session. `generation` is the daemon that finalized it, times are seconds since 1970."""

    type: ClassVar[str] = "manifest"
    version: int
    session_id: bytes
    session: str
    owner: int
    metadata: bytes
    boot_id: str
    generation: int
    opened_at: float
    finalized_at: float
    entries: tuple[Entry, ...]


CODEC: Final[Codec[Manifest]] = Codec((Manifest,))


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest`."""
    return CODEC.encode(manifest)


def decode(data: bytes) -> Manifest:
    """The manifest in `data`.

    Raises:
        ForeignManifest: unhappy path 1.
        ManifestFault: unhappy path 2.
    """
    try:
        version = as_map(unpack(data)).get("version")
        if type(version) is int and version not in VERSIONS:
            raise ForeignManifest(f"a manifest of version {version}, this luod reads {VERSIONS}")
        return CODEC.decode(data)
    except (ProtocolFault, TypeError) as error:
        raise ManifestFault(str(error)) from None
