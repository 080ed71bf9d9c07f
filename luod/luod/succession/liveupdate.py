"""The kernel's Live Update Orchestrator: /dev/liveupdate and its sessions, as typed calls.

Theory. A kernel session is a fd with a name. In the old kernel fds are preserved in it under tokens; the reboot into a kernel that was
loaded with kexec takes all kernel sessions along that are open at that moment. In the new kernel each is retrieved by its name, once,
its fds by their tokens, any number of times; `finish` makes them ordinary. The kernel tells nobody which sessions there are.

Happy path: `Device.open`, `create`, `preserve`...; the kexec; `Device.open`, `retrieve`, `retrieve`..., `finish`.

Unhappy paths:
1. There is no such device, or it isn't switched on: `LiveUpdateFault` says what the kernel needs.
2. Another process has the device open (it has one opener): tried again for `PATIENCE_S`, then `LiveUpdateFault`.
3. The kernel refuses: `LiveUpdateFault` with what the errno means for this call.

Invariants: closing a created session unpreserves all that is in it; closing a retrieved one finishes it. So who owns a session fd decides.

Sources: include/uapi/linux/liveupdate.h and kernel/liveupdate/luo_session.c, luo_file.c of Linux 7.3. The ioctls are the same since 6.19.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Protocol, Self

from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd

PATH: Final = "/dev/liveupdate"
PATIENCE_S: Final = 10.0
"""How long the device may be in use by somebody else, in seconds."""
PAUSE_S: Final = 0.05

MAX_NAME_BYTES: Final = 63
"""LIVEUPDATE_SESSION_NAME_LENGTH less the NUL."""
MAX_FILES: Final = 128
"""Of one kernel session: LUO_FILE_MAX of kernel/liveupdate/luo_file.c."""
MAX_SESSIONS: Final = 744
"""Of one kernel, everybody's together: LUO_SESSION_MAX of kernel/liveupdate/luo_session.c."""

_TYPE: Final = 0xBA
_CREATE, _RETRIEVE = _TYPE << 8 | 0x00, _TYPE << 8 | 0x01
_PRESERVE_FD, _RETRIEVE_FD, _FINISH = _TYPE << 8 | 0x40, _TYPE << 8 | 0x41, _TYPE << 8 | 0x42
_NAMED: Final = struct.Struct("<Ii64s")
"""Size, fd, name."""
_TOKEN: Final = struct.Struct("<IiQ")
"""Size, fd, token."""
_BARE: Final = struct.Struct("<II")
"""Size, 0."""

_MEANINGS: Final[Mapping[tuple[int, int], str]] = {
    (_CREATE, errno.EEXIST): "a kernel session of this name exists already",
    (_CREATE, errno.ENOMEM): f"the kernel has no memory for it, or as many kernel sessions as it takes ({MAX_SESSIONS})",
    (_CREATE, errno.EINVAL): "the kernel doesn't take this name",
    (_RETRIEVE, errno.ENOENT): "the last kernel left no kernel session of this name",
    (_RETRIEVE, errno.EINVAL): "it was retrieved already, by somebody who still has it",
    (_PRESERVE_FD, errno.ENOENT): "this kernel can't carry fds of this kind",
    (_PRESERVE_FD, errno.EOPNOTSUPP): "this kernel can't carry this fd: of its kind it takes not all",
    (_PRESERVE_FD, errno.EINVAL): "this kernel can't carry this fd: of its kind it takes not all (no memfds of huge pages, for one)",
    (_PRESERVE_FD, errno.EEXIST): "this token is used already",
    (_PRESERVE_FD, errno.EBUSY): "a kernel session has it already",
    (_PRESERVE_FD, errno.ENOSPC): f"this kernel session is full ({MAX_FILES} fds)",
    (_PRESERVE_FD, errno.ENOMEM): "the kernel has no memory to carry it",
    (_RETRIEVE_FD, errno.ENOENT): "this kernel session has no such token",
    (_FINISH, errno.EBUSY): "some of its fds can't be finished yet",
}
"""What an errno means for a call; where nothing is said it means what errno(3) says."""

_GENERAL: Final[Mapping[int, str]] = {
    errno.ENOTTY: "this kernel doesn't know the call",
    errno.E2BIG: "this kernel knows an older form of the call",
    errno.EOVERFLOW: "a number is too large",
}


class LiveUpdateFault(LuodError):
    """The kernel's live update can't do what was asked.

    Args:
        message: what, and why.
        number: errno(3); 0 where none was given.
        reason: only why; empty: the message.
    """

    def __init__(self, message: str, number: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.errno = number
        self.reason = reason or message

    @property
    def is_absent(self) -> bool:
        """Whether it is only that there is no such thing: no device, no kernel session, no handler for a kind of fd."""
        return self.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)


def _call(fd: int, request: int, argument: bytearray, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        number = error.errno or 0
        meaning = _MEANINGS.get((request, number)) or _GENERAL.get(number) or error.strerror
        raise LiveUpdateFault(f"{what}: {meaning}", number, str(meaning)) from None


class Sessions(Protocol):
    """What luod needs of the device, open; close it soon."""

    def create(self, name: str) -> Kept: ...

    def retrieve(self, name: str) -> Kept: ...

    def close(self) -> None: ...


class Kept(Protocol):
    """What luod needs of a kernel session; who owns it decides when it ends."""

    @property
    def name(self) -> str: ...

    def preserve(self, fd: int, token: int) -> None: ...

    def retrieve(self, token: int) -> OwnedFd: ...

    def finish(self) -> None: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Opening(Protocol):
    """Opens the device, waiting for at most so many seconds while another process has it; `Device.open` is one.

    Raises:
        LiveUpdateFault: it can't be opened.
    """

    def __call__(self, *, patience_s: float) -> Sessions: ...


class KernelSession:
    """A kernel session's fd, owned. See the module's invariants before closing it."""

    def __init__(self, name: str, fd: OwnedFd) -> None:
        self._name: Final = name
        self.fd: Final = fd

    @property
    def name(self) -> str:
        """As it was created or retrieved."""
        return self._name

    def preserve(self, fd: int, token: int) -> None:
        """Have the kernel carry the borrowed `fd` under `token`.

        Raises:
            LiveUpdateFault: it can't.
        """
        _call(self.fd.fileno(), _PRESERVE_FD, bytearray(_TOKEN.pack(_TOKEN.size, fd, token)), f"{self.name}, token {token}")

    def retrieve(self, token: int) -> OwnedFd:
        """The fd under `token`, from the last kernel; any number of times. The caller owns it.

        Raises:
            LiveUpdateFault: there is none, or the kernel failed to bring it, which is for ever.
        """
        argument = bytearray(_TOKEN.pack(_TOKEN.size, -1, token))
        _call(self.fd.fileno(), _RETRIEVE_FD, argument, f"{self.name}, token {token}")
        return _received(_TOKEN.unpack(argument)[1])

    def finish(self) -> None:
        """Have the kernel let go: what was retrieved is the retrievers' alone, what wasn't is dropped.

        Raises:
            LiveUpdateFault: not yet; nothing was let go of.
        """
        _call(self.fd.fileno(), _FINISH, bytearray(_BARE.pack(_BARE.size, 0)), self.name)

    def fileno(self) -> int:
        """Its fd, borrowed. A copy of it keeps the kernel session as it is."""
        return self.fd.fileno()

    def close(self) -> None:
        """Close it: see the module's invariants."""
        self.fd.close()


class Device:
    """/dev/liveupdate, open. Others can't open it meanwhile, systemd among them: not longer than needed."""

    def __init__(self, fd: OwnedFd) -> None:
        self._fd = fd

    @classmethod
    def open(cls, *, path: str = PATH, patience_s: float = PATIENCE_S, sleep: Callable[[float], None] = time.sleep) -> Self:
        """Open it. Blocks for up to `patience_s` seconds.

        Raises:
            LiveUpdateFault: unhappy paths 1 and 2.
        """
        waited_s = 0.0
        while True:
            try:
                return cls(OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC)))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise LiveUpdateFault(_no_device(path, error), error.errno or 0) from None
                if waited_s >= patience_s:
                    raise LiveUpdateFault(f"{path} has been in use by another process for {patience_s:g} s", errno.EBUSY) from None
            sleep(PAUSE_S)
            waited_s += PAUSE_S

    def create(self, name: str) -> KernelSession:
        """A new kernel session, for the next kernel.

        Raises:
            LiveUpdateFault: it can't be.
        """
        return self._named(_CREATE, name)

    def retrieve(self, name: str) -> KernelSession:
        """The kernel session that the last kernel left under `name`.

        Raises:
            LiveUpdateFault: there is none (ENOENT), or somebody has it.
        """
        return self._named(_RETRIEVE, name)

    def _named(self, request: int, name: str) -> KernelSession:
        encoded = name.encode("ascii")
        if len(encoded) > MAX_NAME_BYTES:
            raise ValueError(f"{name!r} has more than {MAX_NAME_BYTES} bytes")
        argument = bytearray(_NAMED.pack(_NAMED.size, -1, encoded))
        _call(self._fd.fileno(), request, argument, f"kernel session {name}")
        return KernelSession(name, _received(_NAMED.unpack(argument)[1]))

    def close(self) -> None:
        """Let others open it."""
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _received(fd: int) -> OwnedFd:
    owned = OwnedFd(fd)
    os.set_inheritable(fd, False)
    return owned


def _no_device(path: str, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return (
                f"there is no {path}: the kernel needs CONFIG_LIVEUPDATE (Linux 6.19 or later) and `kho=on liveupdate=on` on its "
                "command line"
            )
        case errno.EACCES | errno.EPERM:
            return f"luod may not open {path}: systemd/60-luod.rules gives it to the user luod"
        case _:
            return f"{path} can't be opened: {error.strerror}"
