"""signalfds (signalfd(2)).

Preserved: the set of signals. A signalfd has no queue: whoever reads it reads the signals that are pending for *itself*. So nothing happens
while luod has it, signals that the old process left pending are lost with it, and the new process must block the signals again
(sigprocmask(2)) before it reads.
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.anonymous import Anonymous, Told, text


class Signalfd(Anonymous):
    """signalfds. Told: the signals, bit N-1 for signal N, in hexadecimal; whoever has a copy can change them."""

    kind: ClassVar[str] = "signalfd"
    compatible: ClassVar[str] = "signalfd-v1"
    inode: ClassVar[str] = "[signalfd]"
    told: ClassVar[dict[str, Told]] = {"signals": Told("sigmask", text, "", fixed=False)}
