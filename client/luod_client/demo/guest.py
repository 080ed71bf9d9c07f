"""The virtual machine monitor that is replaced under its guest: its old process stops and preserves the guest, its new one goes on.

The old one gives luod two memfds, the guest's RAM and the state of its vCPU, and beside them what it saw last. `stop` and `go_on` are all
of it; the two roles below only call them when they are told to.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

import attrs

import luod_client
from luod_client.demo import counting, kvm
from luod_client.demo.processes import await_word, played, report
from luod_protocol.fds import OwnedFd

SESSION: Final = "guest"
RAM: Final = "ram"
STATE: Final = "state"
MORE_COUNTS: Final = 500
"""What the guest counts in its new process before it is looked at again."""

_BETWEEN_S: Final = 0.0002
_SEALS: Final = {RAM: ("grow", "shrink"), STATE: ("grow", "shrink", "write")}
"""A state is never written again; the RAM is, but keeps its size."""


@attrs.frozen(kw_only=True)
class Stopped:
    """What the old process saw last; it travels as the state's metadata.

    `count` is what came through the port, `register` and `in_ram` where else the guest keeps it; `wrong` is what it counted wrong until
    then. `stopped_s` is in seconds of the wall clock, which alone means the same in another process and after a kexec. `kernel` is which
    kernel that was, as its boot id.
    """

    count: int
    wrong: str
    register: int
    in_ram: int
    sha256: str
    identity: str
    stopped_s: float
    kernel: str = ""


@attrs.frozen(kw_only=True)
class Resumed:
    """What the new process found, and what the guest did there.

    `sha256` and `identity` are the RAM's before the guest went on. `first` and `last` are counts; `wrong` says what was lost or repeated
    on the way, in the port or in the guest's journal. `kernel` is the boot id here. Times in seconds: `pause_s` from the stop to the first
    new count, and of that `rebuild_s` to make the machine again.
    """

    sha256: str
    identity: str
    first: int
    last: int
    wrong: str
    pause_s: float
    rebuild_s: float
    kernel: str = ""


@attrs.frozen(kw_only=True)
class Moved:
    """A guest's way from one process to another."""

    stopped: Stopped
    resumed: Resumed

    @property
    def to_another_kernel(self) -> bool:
        """Whether the kernel was replaced on the way."""
        return self.stopped.kernel != self.resumed.kernel


class Guest:
    """A guest that counts: its RAM, which is owned, and the machine that runs it. Leaving the block ends both.

    Attributes:
        count: the last one that came through its port.
        wrong: the first thing that it counted wrong, else empty.
    """

    def __init__(self, ram: OwnedFd, machine: kvm.Machine, count: int = 0) -> None:
        self.ram = ram
        self.machine = machine
        self.count = count
        self.wrong = ""

    def step(self) -> int:
        """Let it count once more.

        Raises:
            KvmFault: it doesn't.
        """
        count = counting.next_count(self.machine)
        if count != self.count + 1 and not self.wrong:
            self.wrong = f"{count} came after {self.count}"
        self.count = count
        return count

    def until_told(self) -> None:
        """Let it count, at some thousands a second, until something can be read from stdin."""
        while not select.select([sys.stdin], [], [], _BETWEEN_S)[0]:
            self.step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.machine.close()
        self.ram.close()


def boot() -> Guest:
    """A new guest.

    Raises:
        KvmFault: KVM can't be used.
    """
    ram = OwnedFd(os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        return Guest(ram, counting.boot(ram.fileno()))
    except BaseException:
        ram.close()
        raise


def _identity(fd: int) -> str:
    stat = os.fstat(fd)
    return f"{stat.st_dev}:{stat.st_ino}"


def _kernel() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _sha256(ram: int) -> str:
    return hashlib.sha256(os.pread(ram, counting.RAM_BYTES, 0)).hexdigest()


def stop(guest: Guest, *, session: str = SESSION, runtime_dir: str | None = None, require: Iterable[str] = ("daemon-upgrade",)) -> Stopped:
    """Stop `guest` where it is and give it into luod's custody; it must not be run here any more.

    Args:
        session: its name.
        runtime_dir: where luod is; None: the usual place.
        require: what the session must survive.

    Raises:
        LuodError: KVM, or luod, refuses.
    """
    stopped_s = time.time()
    state = guest.machine.save()
    ram = guest.ram.fileno()
    stopped = Stopped(
        count=guest.count,
        wrong=guest.wrong,
        register=kvm.ebx(state),
        in_ram=counting.count_in(ram),
        sha256=_sha256(ram),
        identity=_identity(ram),
        stopped_s=stopped_s,
        kernel=_kernel(),
    )
    with (
        OwnedFd(os.memfd_create("guest-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as memfd,
        luod_client.serialize(session, runtime_dir=runtime_dir) as custody,
    ):
        os.pwrite(memfd.fileno(), state, 0)
        custody.preserve(
            {RAM: ram, STATE: memfd.fileno()},
            metadata={STATE: json.dumps(attrs.asdict(stopped)).encode()},
            needs={STATE: [RAM]},
        )
        custody.finalize(require=require, seal=_SEALS)
    return stopped


def go_on(*, session: str = SESSION, runtime_dir: str | None = None, counts: int = MORE_COUNTS) -> Moved:
    """Take the guest back, and let it go on for `counts` counts; luod lets go of it after the first.

    Returns:
        What the old process said, and what was seen here.

    Raises:
        LuodError: luod, or KVM, refuses; luod keeps the guest. Once it has counted, its state doesn't go with its RAM any more.
    """
    with luod_client.deserialize(runtime_dir=runtime_dir) as connection, connection.claim(session) as claim:
        fds = claim.retrieve(RAM, STATE)
        with fds[RAM] as ram, fds[STATE] as state:
            stopped = Stopped(**json.loads(claim.entries[STATE].metadata))
            sha256 = _sha256(ram.fileno())
            began = time.perf_counter()
            machine = kvm.Machine.resume(ram.fileno(), os.pread(state.fileno(), kvm.STATE_BYTES + 1, 0))
            rebuild_s = time.perf_counter() - began
            with Guest(ram, machine, stopped.count) as guest:
                first = guest.step()
                pause_s = time.time() - stopped.stopped_s
                claim.finish()
                for _ in range(counts - 1):
                    guest.step()
                lost = counting.wrong_in_journal(ram.fileno(), guest.count)
                resumed = Resumed(
                    sha256=sha256,
                    identity=_identity(ram.fileno()),
                    first=first,
                    last=guest.count,
                    wrong=guest.wrong or (f"its journal lacks {lost[0]}" if lost else ""),
                    pause_s=pause_s,
                    rebuild_s=rebuild_s,
                    kernel=_kernel(),
                )
    return Moved(stopped=stopped, resumed=resumed)


def before(runtime_dir: str) -> None:
    """The old process: report `counting`, or why not; told `stop`: preserve the guest, report `stopped`, end."""
    if left_out := kvm.works():
        report("counting", left_out=left_out)
        return
    with boot() as guest:
        guest.step()
        report("counting", left_out="")
        guest.until_told()
        await_word("stop")
        report("stopped", **attrs.asdict(stop(guest, runtime_dir=runtime_dir)))


def after(runtime_dir: str) -> None:
    """The new process: told `resume`: take the guest back, let it go on, report `resumed`."""
    await_word("resume")
    report("resumed", **attrs.asdict(go_on(runtime_dir=runtime_dir).resumed))


def main() -> None:
    """Play one of the two."""
    life, runtime_dir = played(sys.argv[1:])
    (before if life == "before" else after)(runtime_dir)


if __name__ == "__main__":
    main()
