"""What to do instead with a fd that no handler takes. Only words for people: nothing here decides whether a fd is taken.

Most of them work in the process that made them only, whatever luod did: they hold on to its memory (KVM, vhost, userfaultfd, io_uring).
An io_uring doesn't even arrive: the client's own sendmsg(2) fails, and the client library has to explain it.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import Final

from luod.handlers.base import Probe
from luod.handlers.socket import FAMILIES, family

_TYPES: Final[Mapping[int, str]] = {
    stat.S_IFREG: "a regular file: its path outlives any process, preserve the path or copy the content into a memfd",
    stat.S_IFDIR: "a directory: open it again by its path",
    stat.S_IFBLK: "a block device: open it again by its path",
    stat.S_IFCHR: "a character device of a kind that luod doesn't know: open it again by its path",
    stat.S_IFIFO: "a named FIFO: open it again by its path",
}

_VHOST: Final = (
    "a vhost device, which works with the memory of the process that called VHOST_SET_OWNER: "
    "save the rings' bases (VHOST_GET_VRING_BASE) in a memfd, open the device again and set it up"
)

_GUEST_MEMFD: Final = "a guest_memfd, which belongs to one KVM virtual machine: have the guest's memory in a memfd"

_DRIVERS: Final[Mapping[str, str]] = {
    "misc/vhost-net": _VHOST,
    "misc/vhost-vsock": _VHOST,
    "misc/vhost-scsi": _VHOST,
    "vhost-vdpa": _VHOST,
    "misc/kvm": "/dev/kvm itself, which has no state: open it again",
    "misc/fuse": "a connection of a FUSE server, which luod doesn't take: mount it again",
    "cuse": "a device that another process serves (CUSE): open it again by its path",
}

_NAMES: Final[Mapping[str, str]] = {
    "[eventpoll]": "an epoll: make a new one and add the retrieved fds to it",
    "kvm-vm": "a KVM virtual machine, which works in the process that made it only: save its state in a memfd, make a new one on the "
    "same memory",
    "kvm-vcpu": "a KVM vCPU, which works in the process that made it only: save its registers in a memfd and make a new one",
    "kvm-": "a device of a KVM virtual machine, which works in the process that made it only: save its state in a memfd and make a new one",
    "[kvm-gmem]": _GUEST_MEMFD,
    "/[kvm-gmem]": _GUEST_MEMFD,
    "[io_uring]": "an io_uring, which works with the memory of the process that made it: make a new one",
    "[userfaultfd]": "a userfaultfd, which belongs to one process's memory: make a new one",
    "[fanotify]": "a fanotify group, which luod doesn't take: make a new one",
    "[perf_event]": "a perf event, which luod doesn't take: make a new one",
    "/secretmem (deleted)": "secret memory, which luod does not take: use a memfd",
    "net:[": "a network namespace: open it again by its path in /proc or /run/netns",
}
"""Beginnings of links in /proc, the longer before the shorter."""


NEVER: Final[Mapping[str, str]] = {
    "KVM VM": _NAMES["kvm-vm"],
    "KVM vCPU": _NAMES["kvm-vcpu"],
    "KVM device": _NAMES["kvm-"],
    "guest_memfd": _GUEST_MEMFD,
    "vhost device": _VHOST,
    "epoll": _NAMES["[eventpoll]"],
    "userfaultfd": _NAMES["[userfaultfd]"],
    "io_uring": _NAMES["[io_uring]"],
    "fanotify": _NAMES["[fanotify]"],
    "perf event": _NAMES["[perf_event]"],
    "secret memory": _NAMES["/secretmem (deleted)"],
}
"""What luod takes under no configuration, and why or what to do instead."""


def instead(probe: Probe) -> str:
    """What the fd seems to be, and what to do instead of preserving it."""
    if not probe.opened:
        return "only the name of an object, opened with O_PATH: open it for use, or preserve the fd that it was made from"
    if probe.type == stat.S_IFSOCK:
        known = ", ".join(FAMILIES.values())
        return f"a socket of address family {family(probe.fd)}, of which luod knows nothing ({known} are taken): make a new one"
    if probe.driver in _DRIVERS:
        return _DRIVERS[probe.driver]
    name = probe.link.removeprefix("anon_inode:")
    for prefix, text in _NAMES.items():
        if name.startswith(prefix):
            return text
    return f"{name or 'unnamed':.200}, {_TYPES.get(probe.type, 'a kind that luod does not know: make a new one')}"
