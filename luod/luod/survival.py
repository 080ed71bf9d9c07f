"""What a finalized session survives on this host, and why it doesn't survive the rest. One source for finalize, show and capabilities."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from luod_protocol.errors import Code, Refusal


class Survives(enum.StrEnum):
    """What may happen to luod or the host."""

    DAEMON_UPGRADE = "daemon-upgrade"
    DAEMON_CRASH = "daemon-crash"
    SERVICE_RESTART = "service-restart"
    SOFT_REBOOT = "soft-reboot"
    KEXEC = "kexec"


_ALONE: Final = (
    "nothing outside of this luod holds a copy of its boxes: run it as a systemd service (systemd/luod.service) or as `luod --supervised`"
)
_NO_KERNEL: Final = "it isn't known yet what this kernel carries"
_PARENT_TOO: Final = "a restart ends the supervising parent as well, which holds the copies; use an upgrade instead"
_UNSEEN: Final = "luod can't see whether the store of its unit is kept over a soft-reboot: this systemd doesn't tell"
_RELEASED: Final = "systemd lets go of the store of luod's unit when it stops it: FileDescriptorStorePreserve=yes in the unit keeps it"


@attrs.frozen(kw_only=True)
class Outlook:
    """For each, the empty string for yes, else why not."""

    reasons: Mapping[Survives, str]

    def survived(self, *, stored: bool) -> tuple[str, ...]:
        """What a finalized session survives; `stored` tells whether a service manager holds its box."""
        only_here = (Survives.DAEMON_UPGRADE, Survives.KEXEC)
        return tuple(each.value for each, reason in self.reasons.items() if not reason and (stored or each in only_here))

    def with_kernel(self, reason: str) -> Outlook:
        """The same, where a kexec is survived unless there is a reason why not."""
        return Outlook(reasons={**self.reasons, Survives.KEXEC: reason})

    def demand(self, required: Iterable[str]) -> None:
        """Refuse a demand that this host can't meet, with the reasons."""
        known = {each.value: reason for each, reason in self.reasons.items()}
        for each in required:
            if each not in known:
                raise Refusal(Code.BAD_REQUEST, f"can't require {each[:64]!r}: there are {', '.join(known)}")
        missing = [f"{each}: {known[each]}" for each in required if known[each]]
        if missing:
            raise Refusal(Code.CANNOT_SURVIVE, f"the session would not survive what is required. {'. '.join(missing)}")


ALONE: Final = Outlook(
    reasons={
        Survives.DAEMON_UPGRADE: "",
        Survives.DAEMON_CRASH: _ALONE,
        Survives.SERVICE_RESTART: f"{_ALONE}; use an upgrade instead of a restart",
        Survives.SOFT_REBOOT: _ALONE,
        Survives.KEXEC: _NO_KERNEL,
    }
)
"""Without a service manager."""


def kept(*, restarts: bool, stops: bool | None = None) -> Outlook:
    """With a service manager that keeps boxes; `restarts` tells whether it does so over a restart of the service, `stops` whether over a
    stop as well, and so over a soft-reboot; None: it isn't known."""
    over_stops = {True: "", False: _RELEASED, None: _UNSEEN}[stops]
    return Outlook(
        reasons={
            Survives.DAEMON_UPGRADE: "",
            Survives.DAEMON_CRASH: "",
            Survives.SERVICE_RESTART: "" if restarts else _PARENT_TOO,
            Survives.SOFT_REBOOT: over_stops if restarts else _PARENT_TOO,
            Survives.KEXEC: _NO_KERNEL,
        }
    )


def not_kept(fault: str) -> Outlook:
    """With a service manager that doesn't keep boxes, for the reason `fault`."""
    reason = f"the service manager does not keep luod's boxes: {fault}"
    return Outlook(
        reasons={
            Survives.DAEMON_UPGRADE: "",
            Survives.DAEMON_CRASH: reason,
            Survives.SERVICE_RESTART: reason,
            Survives.SOFT_REBOOT: reason,
            Survives.KEXEC: _NO_KERNEL,
        }
    )
