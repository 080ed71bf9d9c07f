"""The vfio stand-in: a device that DMAs into its owner's memory and resets when the last copy of its fd is closed.

Theory. A vfio device goes on with what it was told to do for as long as anybody holds its fd, whoever that is, and is reset at the last
close (drivers/vfio/vfio_main.c, vfio_df_device_last_close). That is why a process which drives one can't just be replaced, and why luod
keeps the fd. Not every machine has a device to spare, so this is a process that has the same property by the same means: its *device fd*
is one end of a unix SEQPACKET socket, and the kernel tells the other end when the last copy is gone. luod preserves it as a socket.

    launcher --node--> device process <--device fd-- whoever holds it
                             |
                             +--> memfd: counter, time, counter

The *node* is a second socket, the launcher's, for what /dev/vfio/N is to a real device: `open` gives the device fd. It is the witness
too: who holds it can see from outside how many resets there were, without holding the device.

Happy path: `with Device() as device`; `device.open()` gives the device fd; `start_dma(fd, memfd)` maps the first page of a memfd, like
VFIO_IOMMU_MAP_DMA, and starts: every `TICK_S` the device adds one to a 64-bit counter and writes it there, with the time. `query(fd)` asks
the device, `sample(memfd)` reads the memory, `device.state()` asks from outside. All three can be told to wait for something to happen.

Unhappy paths:
1. The last copy of the device fd is closed: DMA stops, the memory is unmapped, the counter goes back to 0, `resets` goes up by one. The
   device can be opened again.
2. A request that can't be granted (open when it is open, no memfd, a page too short): `DeviceFault`, nothing changed.
3. The device doesn't answer in time, or is gone: `DeviceFault`.
4. The launcher dies or closes the node: the device process ends.
5. A process dies between its request and the answer: the answer stays in the queue for whoever has the fd next, who skips it by its tag.

Invariants: one thread does everything in order, so an answer is the truth: a close that happened before a question was asked is in the
answer. A reset happens at the last close and at no other time. The device holds no copy of its own device fd.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

import attrs

from luod_client.demo.prctl import die_with
from luod_protocol import wire
from luod_protocol.codec import as_map, pack, unpack
from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd

TICK_S: Final = 0.0002
"""Time between two writes of the device, at least."""

PAGE_BYTES: Final = mmap.PAGESIZE
"""The memfd's first page, which the device maps, must be there."""

_TIMEOUT_S: Final = 20.0
_COUNTER, _TIME, _COUNTER_AGAIN = range(3)
"""The 64-bit words that the device writes, in this order."""


class DeviceFault(LuodError):
    """The device refused, or doesn't answer."""


@attrs.frozen(kw_only=True)
class State:
    """What the device says of itself: its counter (0 after a reset), resets since it was made, whether it DMAs, whether its fd is held."""

    counter: int
    resets: int
    dma: bool
    held: bool


@attrs.frozen(kw_only=True)
class Sample:
    """What the device wrote last: the counter, and when, in nanoseconds of CLOCK_MONOTONIC."""

    counter: int
    at_ns: int


def _ask(fd: int, op: str, fds: Sequence[int], timeout: float, **fields: int) -> tuple[State, list[OwnedFd]]:
    tag = secrets.randbits(63)
    sock = socket.socket(fileno=fd)
    deadline = time.monotonic() + timeout
    try:
        wire.send(sock, pack({"op": op, "tag": tag, **fields}), fds)
        while select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
            packet = wire.receive(sock, flags=socket.MSG_DONTWAIT)
            if packet is None:
                raise DeviceFault(f"the device ended before it answered {op}")
            with packet:
                reply = as_map(unpack(packet.data))
                if reply.pop("tag") != tag:
                    continue
                if "error" in reply:
                    raise DeviceFault(f"the device refused {op}: {reply['error']}")
                return State(**reply), packet.take_fds()
    except OSError as error:
        raise DeviceFault(f"the device can't be asked to {op}: {error.strerror}") from error
    finally:
        sock.detach()
    raise DeviceFault(f"the device did not answer {op} within {timeout:g} s")


def start_dma(device: int, memfd: int) -> State:
    """Map the first page of the borrowed `memfd` and start to write there; in place of what was mapped before.

    Raises:
        DeviceFault: unhappy paths 2 and 3.
    """
    return _ask(device, "dma", [memfd], _TIMEOUT_S)[0]


def query(device: int, *, counter: int = 0, timeout: float = _TIMEOUT_S) -> State:
    """The state of the device whose fd is borrowed, as soon as its counter has reached `counter`; `timeout` in seconds.

    Raises:
        DeviceFault: unhappy path 3.
    """
    return _ask(device, "query", [], timeout, counter=counter)[0]


def sample(memfd: int) -> Sample:
    """What the device wrote last into the borrowed `memfd`."""
    with mmap.mmap(memfd, PAGE_BYTES, prot=mmap.PROT_READ) as memory, memoryview(memory) as view, view.cast("Q") as words:
        while True:
            again, at_ns, counter = words[_COUNTER_AGAIN], words[_TIME], words[_COUNTER]
            if counter == again:
                return Sample(counter=counter, at_ns=at_ns)


class Device:
    """A device process, seen by its launcher, which holds the node. Leaving the block ends it.

    Raises:
        OSError: it can't be started.
    """

    def __init__(self) -> None:
        self._node, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            number = str(other.fileno())
            command = [sys.executable, "-P", "-m", __spec__.name, "--node", number, "--parent", str(os.getpid())]
            try:
                # Not in the terminal's foreground group: Ctrl-C is for its launcher.
                self._process = subprocess.Popen(command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, process_group=0)
            except BaseException:
                self._node.close()
                raise

    @property
    def pid(self) -> int:
        """The device's process."""
        return self._process.pid

    def open(self) -> OwnedFd:
        """The device fd; the caller owns it. One opener at a time, like /dev/vfio/N.

        Raises:
            DeviceFault: it is held by somebody, or unhappy path 3.
        """
        _, (fd,) = _ask(self._node.fileno(), "open", [], _TIMEOUT_S)
        return fd

    def state(self, *, resets: int = 0, counter: int = 0, timeout: float = _TIMEOUT_S) -> State:
        """The state seen from outside, as soon as there were `resets` and the counter has reached `counter`; `timeout` in seconds.

        Raises:
            DeviceFault: unhappy path 3.
        """
        return _ask(self._node.fileno(), "query", [], timeout, resets=resets, counter=counter)[0]

    def close(self) -> None:
        """End the device and wait for it."""
        self._process.kill()
        self._process.wait()
        self._node.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@attrs.frozen(kw_only=True)
class _Question:
    sock: socket.socket
    tag: int
    counter: int
    resets: int


def _readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


class _Machine:
    """The device itself."""

    def __init__(self, node: socket.socket) -> None:
        self._node = node
        self._device: socket.socket | None = None
        self._memory: mmap.mmap | None = None
        self._counter = 0
        self._resets = 0
        self._questions: list[_Question] = []

    def run(self) -> None:
        """Work until the node is closed."""
        while True:
            socks = [self._node] if self._device is None else [self._node, self._device]
            ready = select.select(socks, [], [], None if self._memory is None else TICK_S)[0]
            # Looked at anew, after the node was found ready: what happened to the device fd before a question came is done first.
            while self._device is not None and _readable(self._device):
                if not self._serve(self._device):
                    self._reset(self._device)
            if self._node in ready and not self._serve(self._node):
                return
            if self._memory is not None:
                self._tick(self._memory)
            self._answer()

    def _tick(self, memory: mmap.mmap) -> None:
        self._counter += 1
        with memoryview(memory) as view, view.cast("Q") as words:
            words[_COUNTER] = self._counter
            words[_TIME] = time.monotonic_ns()
            words[_COUNTER_AGAIN] = self._counter

    def _reset(self, device: socket.socket) -> None:
        device.close()
        self._device = None
        self._questions = [question for question in self._questions if question.sock is not device]
        self._unmap()
        self._counter = 0
        self._resets += 1

    def _unmap(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _serve(self, sock: socket.socket) -> bool:
        """Take one request; False at the end of the connection."""
        packet = wire.receive(sock)
        if packet is None:
            return False
        with packet:
            request = as_map(unpack(packet.data))
            tag = request["tag"]
            try:
                match request["op"]:
                    case "open" if sock is self._node:
                        with self._open() as given:
                            self._reply(sock, tag, [given.fileno()])
                    case "dma" if sock is self._device:
                        (memfd,) = packet.fds
                        memory = mmap.mmap(memfd.fileno(), PAGE_BYTES)
                        self._unmap()
                        self._memory = memory
                        self._reply(sock, tag)
                    case "query":
                        counter, resets = request.get("counter", 0), request.get("resets", 0)
                        self._questions.append(_Question(sock=sock, tag=tag, counter=counter, resets=resets))
                    case op:
                        raise ValueError(f"{op} isn't known here")
            except (ValueError, OSError) as error:
                self._send(sock, {"tag": tag, "error": str(error)})
        return True

    def _open(self) -> OwnedFd:
        if self._device is not None:
            raise ValueError("it is open: the last copy of its fd must be closed first")
        self._device, given = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return OwnedFd(given.detach())

    def _answer(self) -> None:
        for question in self._questions[:]:
            if self._counter >= question.counter and self._resets >= question.resets:
                self._questions.remove(question)
                self._reply(question.sock, question.tag)

    def _reply(self, sock: socket.socket, tag: int, fds: Sequence[int] = ()) -> None:
        state = State(counter=self._counter, resets=self._resets, dma=self._memory is not None, held=self._device is not None)
        self._send(sock, {"tag": tag, **attrs.asdict(state)}, fds)

    def _send(self, sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        # Who asked may be gone, or never read: the device doesn't wait for it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
            wire.send(sock, pack(message), fds, flags=socket.MSG_DONTWAIT)


def main(argv: Sequence[str]) -> int:
    """Be the device. Args: --node FD (a SEQPACKET socket, owned from here), --parent PID."""
    parser = argparse.ArgumentParser(prog="luod-demo-device")
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args(argv)
    die_with(arguments.parent)
    with socket.socket(fileno=arguments.node) as node:
        _Machine(node).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
