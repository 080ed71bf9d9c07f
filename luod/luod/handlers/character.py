"""What kinds of character devices have in common: they are told by the driver that has their number, see `luod.handlers.devices`.

The path through which one was opened tells nothing: anybody who may make device nodes gives them any name. A device number says what was
opened, as long as it was opened; see `luod.handlers.kernel.Stat`.

`verify` checks nothing beyond the kind: the number is the identity, which is checked for all kinds, and all else (the interface of a tap,
the mappings of a container, even whether the device is still plugged in) may change.
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.base import Probe
from luod_protocol.records import Fact


class Character:
    """A kind of character devices. A subclass says its name and its drivers."""

    kind: ClassVar[str]
    compatible: ClassVar[str]
    drivers: ClassVar[tuple[str, ...]]

    def recognize(self, probe: Probe) -> bool:
        """By the driver, which is known for open character devices only."""
        return probe.driver in self.drivers

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Nothing; a subclass may know more."""
        return {}

    def verify(self, probe: Probe, facts: dict[str, Fact]) -> None:
        """Nothing beyond the kind, see above."""


class Placed(Character):
    """Devices that stand for a piece of hardware or an interface."""

    def record(self, probe: Probe) -> dict[str, Fact]:
        """Where it is in /sys/devices; empty when it isn't there."""
        return {"device": probe.sysfs}
