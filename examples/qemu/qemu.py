"""A QEMU process on RAM that it was given, and the words that it is told over QMP.

Theory. QEMU opens `/proc/self/fd/N`, an inherited memfd, as the file behind its RAM, and maps it shared. With the migration capability
`x-ignore-shared` its migration stream then leaves RAM out: what remains is the state of the processor and the devices, some hundred
kilobytes. QMP's `getfd` takes a fd over the same socket (SCM_RIGHTS), which `migrate` writes to and `migrate-incoming` reads from.

Invariant: no QEMU outlives the block of its `Qemu`, or the process that started it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

from luod_client.demo.prctl import die_with
from luod_protocol.errors import LuodError

PROGRAM: Final = "qemu-system-x86_64"
PATIENCE_S: Final = 30.0
"""How long QEMU may take for anything."""

_READ_BYTES: Final = 65536


class QemuFault(LuodError):
    """QEMU, or its guest, doesn't do what it should."""


def identity(fd: int) -> str:
    """The file behind the borrowed `fd`, as proc(5) writes it in maps: device and inode."""
    stat = os.fstat(fd)
    return f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x} {stat.st_ino}"


class Qemu:
    """QEMU without KVM, running `kernel`; leaving the block kills it if it is still there.

    Args:
        kernel: path of a multiboot kernel. One that waits for a predecessor's state doesn't load it, but has the same machine.
        ram: memfd, borrowed, of the RAM's size.
        console: connected socket, borrowed: what the guest's serial port is connected to.
        incoming: whether to wait for a predecessor's state, instead of booting.
        patience_s: how long it may take for anything, in seconds.

    Raises:
        QemuFault: it doesn't start; why is on stderr.
    """

    def __init__(self, kernel: str, *, ram: int, console: int, incoming: bool, patience_s: float = PATIENCE_S) -> None:
        size = os.fstat(ram).st_size
        self._qmp, theirs = socket.socketpair()
        self._read = b""
        self._patience_s = patience_s
        # fmt: off
        command = [
            PROGRAM, "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "pc,memory-backend=ram,hpet=off", "-m", f"{size}B",
            "-object", f"memory-backend-file,id=ram,size={size}B,share=on,mem-path=/proc/self/fd/{ram}",
            "-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console",
            "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control",
            "-kernel", kernel,
            *(("-S", "-incoming", "defer") if incoming else ()),
        ]
        # fmt: on
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(ram, console, theirs.fileno()),
                    process_group=0,
                    preexec_fn=functools.partial(die_with, os.getpid()),
                )
        except BaseException:
            self._qmp.close()
            raise
        self.pid = self._process.pid
        try:
            self._hear("QMP")
            self.tell("qmp_capabilities")
            self._have("x-ignore-shared", "events")
        except BaseException:
            self._end()
            raise

    def _have(self, *capabilities: str) -> None:
        self.tell("migrate-set-capabilities", capabilities=[{"capability": each, "state": True} for each in capabilities])

    def tell(self, execute: str, fds: Sequence[int] = (), **arguments: object) -> Any:
        """Have it execute a command of QMP; what it returns.

        Args:
            execute: the command.
            fds: borrowed; they go with it.
            arguments: the command's.

        Raises:
            QemuFault: it refuses, or has ended.
        """
        message = json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n"
        try:
            socket.send_fds(self._qmp, [message], fds)
        except OSError as error:
            raise self._lost(f"told {execute!r}", error.strerror) from error
        return self._hear("return")["return"]

    def migrated(self) -> None:
        """Wait for the end of a migration.

        Raises:
            QemuFault: it failed.
        """
        while True:
            event = self._hear("event")
            if event["event"] == "MIGRATION" and (status := event["data"]["status"]) in ("completed", "failed"):
                if status == "failed":
                    raise QemuFault(
                        f"QEMU (pid {self.pid}): the migration failed: {self.tell('query-migrate').get('error-desc', 'why is above')}"
                    )
                return

    def _hear(self, kind: str) -> dict[str, Any]:
        """Its next message of this kind: `QMP`, `return` or `event`. Other events are passed over."""
        while True:
            while b"\n" not in self._read:
                if not select.select([self._qmp], [], [], self._patience_s)[0]:
                    raise self._lost(f"{kind!r} was due", f"nothing came within {self._patience_s:.0f} s")
                part = b""
                with contextlib.suppress(ConnectionResetError):  # it has ended with a word of ours unread
                    part = self._qmp.recv(_READ_BYTES)
                if not part:
                    raise self._lost(f"{kind!r} was due", "it has ended")
                self._read += part
            line, self._read = self._read.split(b"\n", 1)
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise QemuFault(f"QEMU (pid {self.pid}): {message['error']['desc']}")
            if kind in message:
                return message

    def _lost(self, when: str, what: str | None) -> QemuFault:
        return QemuFault(f"QEMU (pid {self.pid}): {when}, and {what}")

    def maps(self, file: str) -> int:
        """How many bytes of the file with this `identity` the process has mapped shared, as the kernel says."""
        mapped = 0
        with open(f"/proc/{self.pid}/maps", encoding="utf-8") as maps:
            for line in maps:
                addresses, access, _, device, inode, *_ = line.split()
                if f"{device} {inode}" == file and access == "rw-s":
                    first, end = (int(each, 16) for each in addresses.split("-"))
                    mapped += end - first
        return mapped

    def quit(self) -> None:
        """Have it end, and wait for that.

        Raises:
            QemuFault: it ends badly, or not at all.
        """
        self.tell("quit")
        try:
            status = self._process.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            raise self._lost("told to quit", f"it is still there after {self._patience_s:.0f} s") from None
        if status != 0:
            raise self._lost("told to quit", f"it ended with {status}")

    def _end(self) -> None:
        self._qmp.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


def write_state(qemu: Qemu, state: int) -> None:
    """Stop the guest and have its QEMU write the state, without RAM, to the memfd `state` (borrowed). `cont` has the guest go on."""
    qemu.tell("stop")
    qemu.tell("getfd", [state], fdname="state")
    qemu.tell("migrate", uri="fd:state")
    qemu.migrated()


class Console:
    """The other end of the guest's serial port. It stays here while QEMU is replaced, connected all the time.

    Args:
        sock: borrowed.
        patience_s: how long the guest may say nothing, in seconds.
        begun: what came of its next line already.

    Attributes:
        said: every whole line that came.
        begun: what came of the next one.
    """

    def __init__(self, sock: socket.socket, patience_s: float = PATIENCE_S, begun: bytes = b"") -> None:
        self._sock = sock
        self._patience_s = patience_s
        self.begun = begun
        self.said: list[str] = []

    def _take(self) -> None:
        part = self._sock.recv(_READ_BYTES)
        if not part:
            raise QemuFault("the guest's serial port was hung up")
        *lines, self.begun = (self.begun + part).split(b"\n")
        self.said += (line.decode(errors="replace") for line in lines)

    def await_lines(self, number: int) -> None:
        """Read until so many have come, from the beginning.

        Raises:
            QemuFault: nothing comes any more.
        """
        while len(self.said) < number:
            if not select.select([self._sock], [], [], self._patience_s)[0]:
                last = self.said[-1] if self.said else "nothing"
                raise QemuFault(f"the guest said {last}, and no more: it halts when its registers or its RAM are not what they were")
            self._take()

    def drain(self) -> None:
        """Read what is there."""
        while select.select([self._sock], [], [], 0)[0]:
            self._take()

    def wrong(self, first: int = 1) -> str:
        """The first line that isn't the next number, from `first` on, else empty."""
        for due, line in enumerate(self.said, start=first):
            if line != str(due):
                return f"the guest said {line!r} where {due} was due"
        return ""
