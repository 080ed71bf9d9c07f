"""eventfds (eventfd(2)).

Preserved: the counter, live. The client must register it anew with whatever it armed by number (a new KVM irqfd, say).
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.anonymous import Anonymous, Told, number


class Eventfd(Anonymous):
    """eventfds. Told: whether it is a semaphore (1 or 0; -1 where the kernel, before 6.5, doesn't say)."""

    kind: ClassVar[str] = "eventfd"
    compatible: ClassVar[str] = "eventfd-v1"
    inode: ClassVar[str] = "[eventfd]"
    told: ClassVar[dict[str, Told]] = {"semaphore": Told("eventfd-semaphore", number, -1)}
