"""The kinds of fds that luod takes: the table of handlers. docs/kinds.md has what each means for a client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from luod.handlers.base import Handler, Probe
from luod.handlers.bpf import BpfBtf, BpfLink, BpfMap, BpfProg
from luod.handlers.eventfd import Eventfd
from luod.handlers.file import File
from luod.handlers.inotify import Inotify
from luod.handlers.iommufd import Iommufd
from luod.handlers.memfd import Memfd
from luod.handlers.pidfd import Pidfd
from luod.handlers.pipe import Pipe
from luod.handlers.pty import Pty
from luod.handlers.refused import instead
from luod.handlers.signalfd import Signalfd
from luod.handlers.socket import Socket
from luod.handlers.tap import Macvtap, Tap
from luod.handlers.timerfd import Timerfd
from luod.handlers.vfio import VfioCdev, VfioContainer, VfioDevice, VfioGroup
from luod_protocol.errors import Code, Refusal

HANDLERS: Final[tuple[Handler, ...]] = (
    Memfd(),
    Socket(),
    Pipe(),
    Eventfd(),
    Timerfd(),
    Signalfd(),
    Inotify(),
    Pidfd(),
    Pty(),
    Tap(),
    Macvtap(),
    VfioContainer(),
    VfioGroup(),
    VfioDevice(),
    VfioCdev(),
    Iommufd(),
    BpfMap(),
    BpfProg(),
    BpfLink(),
    BpfBtf(),
)
"""Asked in this order; exactly one recognizes a fd, so the order is for speed only."""

_BY_KIND: Final[Mapping[str, Handler]] = {handler.kind: handler for handler in (*HANDLERS, File())}
"""A file is recognized where none of the handlers takes it, and only where the configuration allows it: see `recognizer`."""


def recognize(probe: Probe) -> Handler:
    """The handler of the fd's kind, of all that need no configuration.

    Raises:
        Refusal: kind-not-supported, with what it seems to be and what to do instead.
    """
    handler = handler_of(probe)
    if handler is None:
        raise unknown(probe)
    return handler


def handler_of(probe: Probe) -> Handler | None:
    """The handler that recognizes the fd, if there is one."""
    return next((handler for handler in HANDLERS if handler.recognize(probe)), None)


def unknown(probe: Probe) -> Refusal:
    """The refusal of a fd that no handler recognizes."""
    return Refusal(Code.KIND_NOT_SUPPORTED, f"this fd is {instead(probe)} (`luoctl capabilities` lists the kinds that luod takes)")


def by_kind(kind: str) -> Handler | None:
    """The handler of `kind`."""
    return _BY_KIND.get(kind)


def kinds() -> dict[str, str]:
    """Every kind and its handler's `compatible`."""
    return {kind: handler.compatible for kind, handler in _BY_KIND.items()}
