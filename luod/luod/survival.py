"""What a finalized session survives on this host, and why it doesn't survive the rest. One source for finalize, show and capabilities."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from luod_protocol.errors import Code, Refusal


class Survives(enum.StrEnum):
    """What may happen to luod or the host."""

    DAEMON_UPGRADE = "daemon-upgrade"
    DAEMON_CRASH = "daemon-crash"
    SERVICE_RESTART = "service-restart"
    SOFT_REBOOT = "soft-reboot"
    KEXEC = "kexec"


_NO_STORE = "this luod keeps its boxes in its own process only; nothing outside of it holds a copy"
_NO_KERNEL = "this luod doesn't hand its set to the kernel (/dev/liveupdate)"


def reasons() -> Mapping[Survives, str]:
    """For each, the empty string for yes, else why not."""
    return {
        Survives.DAEMON_UPGRADE: "",
        Survives.DAEMON_CRASH: _NO_STORE,
        Survives.SERVICE_RESTART: f"{_NO_STORE}; use an upgrade instead of a restart",
        Survives.SOFT_REBOOT: _NO_STORE,
        Survives.KEXEC: _NO_KERNEL,
    }


def survived() -> tuple[str, ...]:
    """What every finalized session of this daemon survives."""
    return tuple(each.value for each, reason in reasons().items() if not reason)


def demand(required: Iterable[str]) -> None:
    """Refuse a demand that this host can't meet, with the reasons."""
    known = {each.value: reason for each, reason in reasons().items()}
    for each in required:
        if each not in known:
            raise Refusal(Code.BAD_REQUEST, f"can't require {each[:64]!r}: there are {', '.join(known)}")
    missing = [f"{each}: {known[each]}" for each in required if known[each]]
    if missing:
        raise Refusal(Code.CANNOT_SURVIVE, f"the session would not survive what is required. {'. '.join(missing)}")
