"""eventfds (eventfd(2)).

All anonymous inodes share one inode, so an eventfd is told by its name in /proc, which the kernel gives and nobody can choose.

Preserved: the counter, live. The client must register it anew with whatever it armed by number (a new KVM irqfd, say).
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.base import Mismatch, Probe
from luod_protocol.records import Fact


class Eventfd:
    """eventfds."""

    kind: ClassVar[str] = "eventfd"
    compatible: ClassVar[str] = "eventfd-v1"

    def recognize(self, probe: Probe) -> bool:
        """By the anonymous inode's name; such inodes have no file type."""
        return probe.type == 0 and probe.link == "anon_inode:[eventfd]" and probe.opened

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Whether it is a semaphore (1 or 0; -1 where the kernel, before 6.5, doesn't say)."""
        return {"semaphore": int(probe.info.get("eventfd-semaphore", "-1"))}

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """It is still a semaphore, or still none."""
        now = self.record(probe)
        if now != facts:
            raise Mismatch(f"the eventfd's semaphore flag is {now['semaphore']}, it was {facts.get('semaphore')}")
