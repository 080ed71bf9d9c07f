"""Check what a succession brought against its manifest."""

from __future__ import annotations

from collections.abc import Sequence

from luod import manifest
from luod.handlers import by_kind
from luod.handlers.base import Mismatch, Probe
from luod.manifest import Entry, Manifest
from luod_protocol import box
from luod_protocol.fds import OwnedFd, close_all


class UnknownKind(Mismatch):
    """An entry is of a kind, or of a version of it, that this luod can't verify."""


def entries(described: Sequence[Entry], fds: Sequence[OwnedFd], *, same_kernel: bool) -> None:
    """Check each of `fds` (borrowed) against its entry: count, kind, identity on the same kernel, and what the handler recorded.

    Raises:
        Mismatch: with the name of the entry; `UnknownKind` where another luod may know more.
    """
    if len(described) != len(fds):
        raise Mismatch(f"{len(fds)} fds for {len(described)} entries")
    for entry, fd in zip(described, fds, strict=True):
        handler = by_kind(entry.kind)
        if handler is None or handler.compatible != entry.compatible:
            raise UnknownKind(f"entry {entry.name!r} is {entry.compatible}, which this luod can't verify")
        probe = Probe(fd.fileno())
        if same_kernel and probe.identity != entry.identity:
            raise Mismatch(f"entry {entry.name!r} is another object: {probe.identity}, the manifest says {entry.identity}")
        if not handler.recognize(probe):
            raise Mismatch(f"entry {entry.name!r} is no {entry.kind}")
        try:
            handler.verify(probe, entry.facts)
        except Mismatch as error:
            raise Mismatch(f"entry {entry.name!r}: {error}") from None


def boxed(sealed: int, boot_id: str) -> Manifest:
    """The manifest of a box (borrowed), all of whose fds were checked.

    Raises:
        Mismatch: an entry isn't what the manifest says.
        BoxFault, ManifestFault, ForeignManifest, OSError: it can't be read.
    """
    description = manifest.decode(box.manifest_of(sealed))
    fds = box.look(sealed)
    try:
        entries(description.entries, fds, same_kernel=description.boot_id == boot_id)
    finally:
        close_all(fds)
    return description
