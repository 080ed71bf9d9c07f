"""A device that does DMA for one process goes on doing it for another, without a reset: the story of two examples.

Theory. When the last fd of a vfio device is closed the kernel resets it; even of one that can't be reset it clears bus mastering, the bit
in the command register without which a device does no DMA. So process A gives the device to luod before it ends, and process B gets
it from there. That nothing was reset is seen from outside, by a process that has no fd of the device and reads its command register in /sys
throughout: the bit can't have been cleared and set again, for B doesn't set it.

The device is QEMU's `edu`. The memory is a memfd of `PAGES` pages:

    page 0   A's pattern, which A has the device read into its own buffer
    page 1   the buffer, written by the device for A
    page 2   the same, started by A as the last thing that it does; done when A is gone and only luod has the device
    page 3   the same, for B, of the buffer that A had filled
    page 4   B's pattern, which B has the device read
    page 5   and write here

How the device is had (`acquire`), and what B does to have it as its own (`resume`), are the example's: a `Way`.

Happy path: `story` returns its checks, all of them ok.

Unhappy paths:
1. A step fails, or the device doesn't answer: a `LuodError` says which; the processes are ended.
2. A's last transfer is done before A has ended, on a busy machine. Then a process gets the device from luod, starts it again, and ends
   without finish, which leaves the session preserved; at most `TRIES` times.

Invariants: the director, who forks all others, never has a fd of the device. After `story` nobody has one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, NoReturn, Protocol

import attrs
from tabulate import tabulate

import luod_client
from luod_client.demo import vfio
from luod_client.demo.checks import Check, same
from luod_client.demo.edu import TRANSFER_BYTES, Edu
from luod_client.demo.prctl import die_with, subreaper
from luod_client.demo.processes import Daemons
from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd

LAB_DEVICE: Final = "0000:00:10.0"
SESSION: Final = "vm"
CONTROL: Final = "control"
PAGE_BYTES: Final = mmap.PAGESIZE
PAGES: Final = 6
MEMORY_BYTES: Final = PAGES * PAGE_BYTES
TRIES: Final = 10

_SAMPLED_EVERY_MS: Final = 10
_BUS_MASTER: Final = 0x4
_CONFIG: Final = "[handover]\nmeet_s = 200\ncopy_s = 200\nfreeze_s = 60\ncommit_s = 60\n"
"""The lab is slow."""


@attrs.frozen(kw_only=True)
class Held:
    """A device as A has it.

    Attributes:
        fds: entry name -> fd; `device` is among them, the rest is what it needs.
        addresses: of the memory's pages, as the device sees them.
    """

    fds: Mapping[str, OwnedFd]
    addresses: Sequence[int]


class Way(Protocol):
    """How a device is had."""

    def acquire(self, device: str, memory: int) -> Held:
        """Get the PCI device at the address `device`, and let it see the memfd `memory`."""
        ...

    def resume(self, fds: Mapping[str, OwnedFd], memory: int, addresses: Sequence[int]) -> list[Check]:
        """Have it as one's own, after it was retrieved; what must be so."""
        ...


def say(text: str) -> None:
    """A line, to whoever looks on, from this process."""
    print(f"process {os.getpid()}: {text}", flush=True)


# ---- processes


class _Forked:
    """A child process that runs a function, which reports at most once; leaving the block kills it if it is still there."""

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        hear, tell = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(hear)
            _play(parent, tell, function, arguments)
        os.close(tell)
        self._hear = OwnedFd(hear)
        self._ended = False

    def join(self) -> Any:
        """Wait for its end; what it reported.

        Raises:
            VfioFault: it failed.
        """
        with os.fdopen(self._hear.take(), "rb") as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended = True
        if status:
            raise vfio.VfioFault(f"process {self.pid} has failed, with status {status}")
        return json.loads(said) if said else None

    def __enter__(self) -> _Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self._hear.close()
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _play(parent: int, tell: int, function: Callable[..., None], arguments: Sequence[object]) -> NoReturn:
    """In the child: it ends here, at once and whatever happens."""

    def report(value: object) -> None:
        os.write(tell, json.dumps(value).encode())

    status = 1
    try:
        die_with(parent)
        function(report, *arguments)
        status = 0
    except LuodError as error:
        say(f"FAILED: {error}")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _run(function: Callable[..., None], *arguments: object) -> Any:
    with _Forked(function, *arguments) as child:
        return child.join()


_Report = Callable[[object], object]


# ---- A, B, and who looks on


def _page(memory: int, number: int) -> bytes:
    """What transfers have to do with in a page."""
    return os.pread(memory, TRANSFER_BYTES, number * PAGE_BYTES)


def _whose(found: object, pattern: object, name: str) -> str:
    return f"as {name}'s" if found == pattern else "different"


def _own(report: _Report, way: Way, device: str, interrupt: int, runtime_dir: str) -> None:
    """A: set the device up, use it, give it to luod, start one more transfer and end."""
    memory = os.memfd_create("dma", os.MFD_CLOEXEC)
    os.ftruncate(memory, MEMORY_BYTES)
    pattern, secret = os.urandom(TRANSFER_BYTES), int.from_bytes(os.urandom(4), "little")
    os.pwrite(memory, pattern, 0)
    held = way.acquire(device, memory)
    fd = held.fds["device"].fileno()
    vfio.set_bus_master(fd)
    vfio.interrupt_by(fd, interrupt)
    edu = Edu(fd, interrupt)
    edu.remember(secret)
    edu.transfer(held.addresses[0], to_memory=False)
    edu.transfer(held.addresses[1], to_memory=True)
    say(f"has the device {device}: it has read a page of my memory by DMA, and written it to another")
    with luod_client.serialize(SESSION, runtime_dir=runtime_dir) as session:
        session.preserve(
            {**{name: each.fileno() for name, each in held.fds.items()}, "memory": memory, "interrupt": interrupt},
            metadata={"memory": json.dumps(held.addresses).encode()},
            needs={"device": [*(name for name in held.fds if name != "device"), "memory", "interrupt"]},
        )
        session.finalize(require={"daemon-upgrade"})
    say(f"luod has {', '.join(held.fds)}, memory and interrupt. I start one more transfer, and end in the middle of it")
    report({"pattern": pattern.hex(), "secret": secret, "written": _page(memory, 1).hex()})
    edu.start(held.addresses[2], to_memory=True)


def _start_again(report: _Report, interrupt: int, runtime_dir: str) -> None:
    """A once more: the last transfer was done before A had ended."""
    with luod_client.deserialize(runtime_dir=runtime_dir) as luod, luod.claim(SESSION, force=True) as claim:
        fds = claim.retrieve("device", "memory")
        addresses = json.loads(claim.entries["memory"].metadata)
        os.pwrite(fds["memory"].fileno(), bytes(TRANSFER_BYTES), 2 * PAGE_BYTES)
        edu = Edu(fds["device"].fileno(), interrupt)
        edu.wait()
    report(None)
    edu.start(addresses[2], to_memory=True)


def _take_over(report: _Report, way: Way, said: Mapping[str, Any], runtime_dir: str) -> None:
    """B: take everything from luod, use it, and give it back for the control case."""
    pattern = bytes.fromhex(said["pattern"])
    rows: list[Check] = []
    with luod_client.deserialize(runtime_dir=runtime_dir) as luod, luod.claim(SESSION, force=True) as claim:
        fds = claim.retrieve()
        addresses: list[int] = json.loads(claim.entries["memory"].metadata)
        claim.finish()
    memory, edu = fds["memory"].fileno(), Edu(fds["device"].fileno(), fds["interrupt"].fileno())
    say("has got everything from luod")
    rows.append(same("DMA while only luod had the device: interrupts", 1, edu.wait()))
    rows.append(same("DMA while only luod had the device: the page", "as A's", _whose(_page(memory, 2), pattern, "A")))
    rows.append(same("device: the register that A had set", f"{said['secret']:#010x}", f"{edu.remembered():#010x}"))
    rows += way.resume(fds, memory, addresses)
    edu.transfer(addresses[3], to_memory=True)
    rows.append(same("device: its buffer, by DMA for B", "as A's", _whose(_page(memory, 3), pattern, "A")))
    new = os.urandom(TRANSFER_BYTES)
    os.pwrite(memory, new, 4 * PAGE_BYTES)
    edu.transfer(addresses[4], to_memory=False)
    edu.transfer(addresses[5], to_memory=True)
    rows.append(same("DMA from and to B's memory: the page", "as B's", _whose(_page(memory, 5), new, "B")))
    say("DMA goes on; nothing was set up anew")
    with luod_client.serialize(CONTROL, runtime_dir=runtime_dir) as session:
        session.preserve({name: each.fileno() for name, each in fds.items() if name != "memory"})
        session.finalize()
    report([attrs.asdict(row) for row in rows])


def _sample(report: _Report, device: str, until: int) -> None:
    """Who looks on: sample the bus master bit until the pipe `until` ends; how often it was looked at, and how often it was clear."""
    samples, clear = 0, 0
    poll = select.poll()
    poll.register(until, select.POLLIN)
    while not poll.poll(_SAMPLED_EVERY_MS):
        samples += 1
        clear += not vfio.command(device) & _BUS_MASTER
    report([samples, clear])


class _Onlooker:
    """A process that samples the bus master bit of `device` until it is asked what it saw."""

    def __init__(self, stack: contextlib.ExitStack, device: str) -> None:
        hear, tell = os.pipe2(os.O_CLOEXEC)
        self._tell = stack.enter_context(OwnedFd(tell))
        with OwnedFd(hear):
            self._child = stack.enter_context(_Forked(_sample, device, hear))

    def seen(self) -> tuple[int, int]:
        """How often it looked, and how often the bit was clear."""
        os.write(self._tell.fileno(), b".")
        samples, clear = self._child.join()
        return samples, clear


# ---- the director


@contextlib.contextmanager
def _luod() -> Generator[str]:
    """A luod for the example alone, in a folder of its own."""
    with subreaper(), tempfile.TemporaryDirectory(prefix="luod-dma-") as folder:
        config = f"{folder}/luod.toml"
        with open(config, "w", encoding="ascii") as file:
            file.write(_CONFIG)
        with Daemons(folder, "--config", config):
            yield folder


def _mastering(device: str) -> str:
    return "set" if vfio.command(device) & _BUS_MASTER else "clear"


def _signalled(eventfd: int, timeout_s: float = 0.0) -> bool:
    return bool(select.select([eventfd], [], [], timeout_s)[0])


def story(way: Way, device: str) -> list[Check]:
    """Play it with the PCI device at the address `device`, which is given to vfio-pci.

    Raises:
        LuodError: a step failed.
    """
    vfio.bind(device)
    rows = [same("before: bus master bit", "clear", _mastering(device))]
    with contextlib.ExitStack() as stack:
        runtime_dir = stack.enter_context(_luod())
        interrupt = stack.enter_context(OwnedFd(os.eventfd(0, os.EFD_CLOEXEC))).fileno()
        said = _run(_own, way, device, interrupt, runtime_dir)
        onlooker = _Onlooker(stack, device)
        done_before, tries = _signalled(interrupt), 1  # asked once for each try: it may be done a moment later
        while done_before and tries < TRIES:
            tries += 1
            _run(_start_again, interrupt, runtime_dir)
            done_before = _signalled(interrupt)
        rows.append(same("DMA from and to A's memory: the page", "as A's", _whose(said["written"], said["pattern"], "A")))
        rows.append(same("A has ended: its last transfer", "under way", "done before" if done_before else "under way"))
        say("nobody but luod has the device; its transfer goes on")
        _signalled(interrupt, 60.0)
        with luod_client.control(runtime_dir=runtime_dir) as control:
            upgraded = control.upgrade()
        say(f"luod is replaced: process {upgraded.predecessor_pid} by process {upgraded.pid}")
        rows += [Check(**row) for row in _run(_take_over, way, said, runtime_dir)]
        samples, clear = onlooker.seen()
        rows.append(
            Check(
                what="bus master bit, from outside, throughout",
                expected="set",
                seen=f"set {samples - clear} times of {samples}",
                ok=samples > 0 and clear == 0,
            )
        )
        rows.append(same("control: B has ended, luod has the device: the bit", "set", _mastering(device)))
        with luod_client.deserialize(runtime_dir=runtime_dir) as luod:
            luod.discard(CONTROL, force=True)
        rows.append(same("control: the session is dropped: the bit", "clear", _mastering(device)))
    return rows


# ---- as a command


def main(way: Way, run: str, qemu: str, append: str) -> int:
    """The command line of an example; the exit status.

    Args:
        run: the example's file, two folders below the checkout.
        qemu, append: for the lab, so that it has the device at `LAB_DEVICE`.
    """
    parser = argparse.ArgumentParser(
        prog=f"{os.path.basename(os.path.dirname(run))}/run.py",
        description="A device goes on doing DMA for another process, without a reset. Boots the lab for it, unless there is --device.",
        epilog="Exit status: 0 done, 1 a step failed or something differs (it is said what), 2 usage, 125 the lab can't be booted.",
    )
    parser.add_argument("--device", metavar="ADDRESS", help="use this device of this machine: a QEMU edu, such as 0000:00:05.0 (lspci -D)")
    device: str | None = parser.parse_args().device
    if device is None:
        print("booting the lab ...", flush=True)
        words = ["--qemu", qemu, "--append", append, "--", sys.executable, run, "--device", LAB_DEVICE]
        vm = os.path.join(os.path.dirname(run), "..", "..", "tests", "lab", "vm.py")
        os.execv(sys.executable, [sys.executable, vm, *words])
    try:
        rows = story(way, device)
    except LuodError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    table = [[row.what, row.expected, row.seen, "ok" if row.ok else "DIFFERS"] for row in rows]
    print("", tabulate(table, headers=["what", "expected", "seen", ""], disable_numparse=True), "", sep="\n")
    ok = all(row.ok for row in rows)
    print("Everything as it must be." if ok else "NOT as it must be.", flush=True)
    return 0 if ok else 1
