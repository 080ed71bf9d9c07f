"""timerfds (timerfd_create(2)).

Preserved: the clock and the timer, armed or not, with its interval; expirations go on being counted while luod has it. A timer that nobody
reads costs nothing: it is not even set again before it is read. An alarm clock wakes the machine from suspend also while luod has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from luod.handlers.anonymous import Anonymous, Told

_CLOCKS: Final[Mapping[str, str]] = {"0": "realtime", "1": "monotonic", "7": "boottime", "8": "realtime-alarm", "9": "boottime-alarm"}
"""include/uapi/linux/time.h."""


def _clock(number: str) -> str:
    return _CLOCKS.get(number, number)


class Timerfd(Anonymous):
    """timerfds. Told: the clock. When it fires is for whoever has a copy to say (timerfd_settime(2))."""

    kind: ClassVar[str] = "timerfd"
    compatible: ClassVar[str] = "timerfd-v1"
    inode: ClassVar[str] = "[timerfd]"
    told: ClassVar[dict[str, Told]] = {"clock": Told("clockid", _clock, "")}
