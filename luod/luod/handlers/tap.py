"""Network interfaces whose other side is a fd: tun and tap (/dev/net/tun), macvtap and ipvtap (/dev/tapN).

Preserved: the fd, attached to its interface (or not yet attached), with its flags, offloads, header size, filters, and the packets that
wait to be read. While luod has it the interface stays, its carrier stays up, and what is sent to it waits in a queue of `txqueuelen`
packets (1,000 by default); beyond that packets are lost, as on any wire. Of an interface with several queues each is an entry of its own,
and packets go on being spread over those that are held.

The client must give it to a new vhost again (VHOST_NET_SET_BACKEND).

Nothing is told of a tap: both TUNGETIFF and fdinfo wait for the lock of all network configuration, which a client can hold
(see `luod.handlers.kernel`); a client that wants the interface's name back puts it into the metadata. Closing the last copy of a fd waits
for the same lock, in a thread as all closes do, and ends an interface that isn't persistent.
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.character import Character, Placed


class Tap(Character):
    """tun and tap. All of them share the inode of /dev/net/tun, so one can't be told from another."""

    kind: ClassVar[str] = "tap"
    compatible: ClassVar[str] = "tap-v1"
    drivers: ClassVar[tuple[str, ...]] = ("misc/tun",)


class Macvtap(Placed):
    """macvtap and ipvtap. Told: its place in /sys, with the name of the interface, also of one in another network namespace."""

    kind: ClassVar[str] = "macvtap"
    compatible: ClassVar[str] = "macvtap-v1"
    drivers: ClassVar[tuple[str, ...]] = ("macvtap", "ipvtap")
