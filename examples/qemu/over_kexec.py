"""The same guest, whose QEMU ends in one kernel, and goes on under a new QEMU in the next.

What travels are RAM and state, two memfds. A socket can't: so the serial port has another end in the next kernel, and what the guest had
said goes along as the state's metadata.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Generator, Sequence
from typing import Final

import attrs
import guest
from qemu import Console, Qemu, write_state

import luod_client
from luod_client import cli
from luod_client.demo.checks import Check, same
from luod_client.demo.prctl import subreaper
from luod_client.demo.processes import Daemons
from luod_protocol.fds import OwnedFd

SESSION: Final = "guest"
COUNTS: Final = 60
"""How far the guest counts, under each QEMU: in the lab it has a few in a second."""
PATIENCE_S: Final = 300.0
"""How long anything may take: in the lab one QEMU translates another."""


@attrs.frozen(kw_only=True)
class Told:
    """The state's metadata. `said` is how many lines came through the serial port, `begun` what came of the next one; `ram_bytes` and
    `state_bytes` are sizes; `stopped_s` is in seconds of the wall clock; `pid` is the old QEMU's."""

    said: int
    begun: str
    ram_bytes: int
    state_bytes: int
    stopped_s: float
    pid: int


@contextlib.contextmanager
def _luod() -> Generator[str]:
    with subreaper(), tempfile.TemporaryDirectory(prefix="luod-qemu-") as folder, Daemons(folder):
        yield folder


def _kernel(folder: str, ram_bytes: int) -> str:
    path = os.path.join(folder, "kernel")
    with open(path, "wb") as file:
        file.write(guest.kernel(ram_bytes))
    return path


def _memfd(name: str, size: int = 0) -> OwnedFd:
    fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.truncate(fd.fileno(), size)
    return fd


def before(ram_bytes: int) -> bool:
    """Boot a guest, stop it, give RAM and state to luod, and go to the kernel that is loaded. Returns only when something fails."""
    with _luod() as folder:
        ours, theirs = socket.socketpair()
        with ours, theirs, _memfd("guest-ram", ram_bytes) as ram, _memfd("guest-state") as state:
            console = Console(ours, PATIENCE_S)
            print(f"A guest with {ram_bytes >> 20:,} MiB of RAM, a memfd, boots in a QEMU and counts on its serial port.", flush=True)
            kernel = _kernel(folder, ram_bytes)
            with Qemu(kernel, ram=ram.fileno(), console=theirs.fileno(), incoming=False, patience_s=PATIENCE_S) as qemu:
                console.await_lines(COUNTS)
                stopped_s = time.time()
                write_state(qemu, state.fileno())
                console.drain()
                told = Told(
                    said=len(console.said),
                    begun=console.begun.decode(),
                    ram_bytes=ram_bytes,
                    state_bytes=os.fstat(state.fileno()).st_size,
                    stopped_s=stopped_s,
                    pid=qemu.pid,
                )
                _preserve(folder, ram.fileno(), state.fileno(), told)
                qemu.quit()
            if console.wrong():
                raise luod_client.LuodError(console.wrong())
        print(f"  QEMU {told.pid}: … {told.said}. Stopped; it wrote {told.state_bytes:,} bytes of state, and ended.", flush=True)
        print("The machine goes to the next kernel: luoctl kexec run --now", flush=True)
        cli.main(["--runtime-dir", folder, "kexec", "run", "--now"])
        return False


def _preserve(folder: str, ram: int, state: int, told: Told) -> None:
    with luod_client.serialize(SESSION, runtime_dir=folder) as session:
        metadata = {"state": json.dumps(attrs.asdict(told)).encode()}
        session.preserve({"ram": ram, "state": state}, metadata=metadata, needs={"state": ["ram"]})
        # Up to here `cont` would have the guest go on where it is.
        session.finalize(require={"kexec"}, seal=guest.SEALS)


def after() -> list[Check]:
    """In the next kernel: take RAM and state back, let the guest go on in a new QEMU, and say what must be so of it."""
    with _luod() as folder, luod_client.deserialize(runtime_dir=folder) as luod, luod.claim(SESSION) as claim:
        update = luod.update()
        fds = claim.retrieve("ram", "state")
        told = Told(**json.loads(claim.entries["state"].metadata))
        ours, theirs = socket.socketpair()
        with ours, theirs, fds["ram"] as ram, fds["state"] as state:
            console = Console(ours, PATIENCE_S, begun=told.begun.encode())
            rows = [
                same("sessions that came from the last kernel", 1, update.arrived),
                same("RAM: bytes", told.ram_bytes, os.fstat(ram.fileno()).st_size),
                same("RAM: what is wrong in it", "nothing", guest.wrong_in_ram(ram.fileno(), told.said) or "nothing"),
                same("state: bytes", told.state_bytes, os.fstat(state.fileno()).st_size),
            ]
            kernel = _kernel(folder, told.ram_bytes)
            with Qemu(kernel, ram=ram.fileno(), console=theirs.fileno(), incoming=True, patience_s=PATIENCE_S) as qemu:
                os.lseek(state.fileno(), 0, os.SEEK_SET)
                qemu.tell("getfd", [state.fileno()], fdname="state")
                qemu.tell("migrate-incoming", uri="fd:state")
                qemu.migrated()
                qemu.tell("cont")
                console.await_lines(1)
                pause_s = time.time() - told.stopped_s
                claim.finish()
                console.await_lines(COUNTS)
                qemu.tell("stop")
                qemu.quit()
                console.drain()
            print(f"  QEMU {qemu.pid}, under the next kernel: {console.said[0]}, … {console.said[-1]}.", flush=True)
            last = told.said + len(console.said)
            rows += [
                same("first count under the new QEMU", str(told.said + 1), console.said[0]),
                same("counts lost or repeated", "none", console.wrong(told.said + 1) or guest.wrong_in_ram(ram.fileno(), last) or "none"),
            ]
    steps = ", ".join(f"{name} {us / 1000:.0f} ms" for name, us in update.steps_us.items())
    print(f"The guest stood still for {pause_s:.1f} s (known to a second). Of that, the way through the kexec: {steps}.", flush=True)
    return rows


def table(rows: Sequence[Check]) -> str:
    """What was seen, for a person."""
    from tabulate import tabulate

    lines = [[row.what, row.expected, row.seen, "ok" if row.ok else "DIFFERS"] for row in rows]
    return str(tabulate(lines, headers=["what", "expected", "seen", ""], disable_numparse=True))
