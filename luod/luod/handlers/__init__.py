"""The kinds of fds that luod takes: the table of handlers, and why a fd that none of them knows is refused."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from typing import Final

from luod.handlers.base import Handler, Probe
from luod.handlers.eventfd import Eventfd
from luod.handlers.file import File
from luod.handlers.memfd import Memfd
from luod.handlers.pipe import Pipe
from luod.handlers.socket import FAMILIES, Socket, family
from luod_protocol.errors import Code, Refusal

HANDLERS: Final[tuple[Handler, ...]] = (Memfd(), Socket(), Pipe(), Eventfd())
"""Asked in this order; exactly one recognizes a fd, so the order is for speed only."""

_BY_KIND: Final[Mapping[str, Handler]] = {handler.kind: handler for handler in (*HANDLERS, File())}
"""A file is recognized where none of the handlers takes it, and only where the configuration allows it: see `recognizer`."""

_INSTEAD: Final[Mapping[int, str]] = {
    stat.S_IFREG: "a regular file: its path outlives any process, preserve the path or copy the content into a memfd",
    stat.S_IFDIR: "a directory: open it again by its path",
    stat.S_IFBLK: "a block device: open it again by its path",
    stat.S_IFCHR: "a character device of a kind that luod doesn't know: open it again by its path",
    stat.S_IFIFO: "a named FIFO: open it again by its path",
}

_NAMED: Final[Mapping[str, str]] = {
    "[eventpoll]": "an epoll: make a new one and add the retrieved fds to it",
    "kvm-vm": "a KVM virtual machine, which works in the process that made it only: save its state in a memfd and make a new one",
    "kvm-vcpu": "a KVM vCPU, which works in the process that made it only: save its registers in a memfd and make a new one",
    "[io_uring]": "an io_uring: make a new one",
    "[userfaultfd]": "a userfaultfd, which belongs to one process's memory: make a new one",
    "[timerfd]": "a timerfd: make a new one",
    "[signalfd]": "a signalfd: make a new one",
    "[pidfd]": "a pidfd: open it again by the pid",
    "/secretmem (deleted)": "secret memory, which luod does not take: use a memfd",
    "net:[": "a network namespace: open it again by its path in /proc or /run/netns",
    "inotify": "an inotify: make a new one",
}


def recognize(probe: Probe) -> Handler:
    """The handler of the fd's kind, of all that need no configuration.

    Raises:
        Refusal: kind-not-supported, with what it seems to be and what to do instead.
    """
    handler = handler_of(probe)
    if handler is None:
        raise unknown(probe, [each.kind for each in HANDLERS])
    return handler


def handler_of(probe: Probe) -> Handler | None:
    """The handler that recognizes the fd, if there is one."""
    return next((handler for handler in HANDLERS if handler.recognize(probe)), None)


def unknown(probe: Probe, taken: Iterable[str]) -> Refusal:
    """The refusal of a fd that no handler recognizes."""
    return Refusal(Code.KIND_NOT_SUPPORTED, f"this fd is {_instead(probe)}. luod takes {', '.join(taken) or 'nothing'}")


def by_kind(kind: str) -> Handler | None:
    """The handler of `kind`."""
    return _BY_KIND.get(kind)


def kinds() -> dict[str, str]:
    """Every kind and its handler's `compatible`."""
    return {kind: handler.compatible for kind, handler in _BY_KIND.items()}


def _instead(probe: Probe) -> str:
    if not probe.opened:
        return "only the name of an object, opened with O_PATH: open it for use, or preserve the fd that it was made from"
    if probe.type == stat.S_IFSOCK:
        known = ", ".join(FAMILIES.values())
        return f"a socket of address family {family(probe.fd)}, of which luod knows nothing ({known} are taken): make a new one"
    name = probe.link.removeprefix("anon_inode:")
    for prefix, text in _NAMED.items():
        if name.startswith(prefix):
            return text
    return f"{name or 'unnamed':.200}, {_INSTEAD.get(probe.type, 'a kind that luod does not know: make a new one')}"
