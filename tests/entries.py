"""What luod writes down of a fd, made here without a luod."""

from __future__ import annotations

from luod.handlers import recognize
from luod.handlers.base import Handler, Probe
from luod.manifest import Entry


def entry_of(fd: int, name: str = "it", handler: Handler | None = None) -> Entry:
    """The entry of a borrowed fd, as luod writes it; `handler` for what isn't recognized without a configuration."""
    probe = Probe(fd)
    handler = handler or recognize(probe)
    return Entry(
        name=name,
        kind=handler.kind,
        compatible=handler.compatible,
        metadata=b"",
        needs=(),
        identity=probe.identity,
        facts=handler.record(probe),
    )
