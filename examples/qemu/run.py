#!/usr/bin/env python3
"""A QEMU guest that changes its QEMU in mid-count. See README.md beside this; `--help` for the arguments."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Final

try:
    import attrs
    import guest
    import over_kexec
    from qemu import PROGRAM, Console, Qemu, QemuFault, identity, write_state
    from tabulate import tabulate

    import luod_client
    from luod_client.demo.checks import Check
    from luod_client.demo.lab import add_kexec_option, play_a_kexec
    from luod_client.demo.prctl import subreaper
    from luod_client.demo.processes import Daemons
    from luod_protocol.fds import OwnedFd
except ImportError as error:
    sys.exit(f"{error}: this needs luod: `pip install .` in luod's folder, or use .venv/bin/python there, which `make demo` makes")

INSTALL: Final = "on Debian: apt-get install --no-install-recommends qemu-system-x86"
MIB: Final = 1024 * 1024
SIZES_MIB: Final = (256, 4096)
COUNTS: Final = 300
"""How far the guest counts, under each QEMU, at about 1,000 a second."""

SMALLEST_MIB: Final = 64

STATE_AT_MOST: Final = 4 * MIB
"""A state larger than that has RAM in it."""

SESSION: Final = "guest"


@attrs.frozen(kw_only=True)
class Moved:
    """A guest's way from one QEMU to the next, as it was seen from outside. Times in milliseconds.

    `pause_ms` is from the word `stop` to the first new count, and of that: `out_ms` until luod had everything and the old QEMU had
    ended, `luod_ms` for luod's replacement, `in_ms` for all that the new QEMU needed, its start included. `ram_file` is the memfd, as
    device and inode; `*_mapped_bytes` is how much of it the two QEMUs had mapped. `holders` are processes that had it open in between.
    `in_use_bytes` is what the RAM takes of this machine. `last_before`, `first_after` and `last_after` are what the serial port said;
    `wrong` is what was lost or repeated, there or in RAM, else empty.
    """

    ram_bytes: int
    in_use_bytes: int
    state_bytes: int
    pause_ms: float
    out_ms: float
    luod_ms: float
    in_ms: float
    old_pid: int
    new_pid: int
    luod_pids: Sequence[int]
    ram_file: str
    ram_file_after: str
    old_mapped_bytes: int
    new_mapped_bytes: int
    holders: Sequence[int]
    last_before: str
    first_after: str
    last_after: str
    wrong: str

    def faults(self) -> list[str]:
        """What is not as it must be, in words."""
        mapped = (self.old_mapped_bytes, self.new_mapped_bytes)
        so = [
            (bool(self.wrong), self.wrong),
            (self.ram_file != self.ram_file_after, f"the RAM was file {self.ram_file} and is {self.ram_file_after}"),
            (
                set(mapped) != {self.ram_bytes},
                f"of {self.ram_bytes} bytes of RAM the old QEMU had {mapped[0]} mapped, the new one {mapped[1]}",
            ),
            (bool(self.holders), f"the RAM was open in processes {self.holders} when only luod should have had it"),
            (self.state_bytes > STATE_AT_MOST, f"the state has {self.state_bytes} bytes: RAM was copied"),
        ]
        return [fault for is_so, fault in so if is_so]


def holders(file: str) -> list[int]:
    """The processes that have the file with this `identity` open, as far as this user may look."""
    found: list[int] = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    stat = os.stat(f"/proc/{pid}/fd/{number}")
                    if f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x} {stat.st_ino}" == file:
                        found.append(int(pid))
                        break
    return found


def memfd(name: str, size: int = 0) -> OwnedFd:
    """A new memfd that can be sealed."""
    fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.truncate(fd.fileno(), size)
    return fd


def stop_and_preserve(qemu: Qemu, ram: int, console: int, runtime_dir: str) -> int:
    """Stop the guest, have its QEMU write its state, give everything to luod, and end that QEMU. Returns the state's size in bytes."""
    with memfd("guest-state") as state, luod_client.serialize(SESSION, runtime_dir=runtime_dir) as session:
        write_state(qemu, state.fileno())
        session.preserve({"ram": ram, "state": state.fileno(), "console": console}, needs={"state": ["ram"]})
        # Up to here `cont` would have the guest go on where it is.
        session.finalize(require={"daemon-upgrade"}, seal=guest.SEALS)
        qemu.quit()
        return os.fstat(state.fileno()).st_size


def move(ram_bytes: int, folder: str, runtime_dir: str) -> Moved:
    """Boot a guest, move it from one QEMU to another, and have luod replaced in between."""
    kernel = os.path.join(folder, "kernel")
    with open(kernel, "wb") as file:
        file.write(guest.kernel(ram_bytes))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        console = Console(ours)
        with memfd("guest-ram", ram_bytes) as ram, Qemu(kernel, ram=ram.fileno(), console=theirs.fileno(), incoming=False) as old:
            console.await_lines(COUNTS)
            ram_file = identity(ram.fileno())
            old_mapped = old.maps(ram_file)
            stopped_s = time.perf_counter()
            state_bytes = stop_and_preserve(old, ram.fileno(), theirs.fileno(), runtime_dir)
        theirs.close()
        out_s = time.perf_counter()
        console.drain()
        before = len(console.said)
        between = holders(ram_file)

        upgrade_s = time.perf_counter()
        with luod_client.control(runtime_dir=runtime_dir) as control:
            upgraded = control.upgrade()
        upgraded_s = time.perf_counter()

        with luod_client.deserialize(runtime_dir=runtime_dir) as luod, luod.claim(SESSION) as claim:
            fds = claim.retrieve()
            with (
                fds["ram"] as ram,
                fds["state"] as state,
                fds["console"] as port,
                Qemu(kernel, ram=ram.fileno(), console=port.fileno(), incoming=True) as new,
            ):
                os.lseek(state.fileno(), 0, os.SEEK_SET)
                new.tell("getfd", [state.fileno()], fdname="state")
                new.tell("migrate-incoming", uri="fd:state")
                new.migrated()
                new.tell("cont")
                console.await_lines(before + 1)
                counted_s = time.perf_counter()
                claim.finish()
                console.await_lines(before + COUNTS)
                new_mapped = new.maps(ram_file)
                new.tell("stop")
                new.quit()
                console.drain()
                return Moved(
                    ram_bytes=ram_bytes,
                    in_use_bytes=os.fstat(ram.fileno()).st_blocks * 512,
                    state_bytes=state_bytes,
                    pause_ms=(counted_s - stopped_s) * 1000,
                    out_ms=(out_s - stopped_s) * 1000,
                    luod_ms=(upgraded_s - upgrade_s) * 1000,
                    in_ms=(counted_s - upgraded_s) * 1000,
                    old_pid=old.pid,
                    new_pid=new.pid,
                    luod_pids=(upgraded.predecessor_pid, upgraded.pid),
                    ram_file=ram_file,
                    ram_file_after=identity(ram.fileno()),
                    old_mapped_bytes=old_mapped,
                    new_mapped_bytes=new_mapped,
                    holders=between,
                    last_before=console.said[before - 1],
                    first_after=console.said[before],
                    last_after=console.said[-1],
                    wrong=console.wrong() or guest.wrong_in_ram(ram.fileno(), len(console.said)),
                )


def told(runs: Sequence[Moved]) -> str:
    """What was seen, for a person."""
    rows = [
        (
            f"{moved.ram_bytes // MIB:,} MiB",
            f"{moved.in_use_bytes / MIB:.1f} MiB",
            f"{moved.state_bytes:,} bytes",
            f"{moved.pause_ms:,.0f} ms",
            f"{moved.out_ms:.0f} + {moved.luod_ms:.0f} + {moved.in_ms:.0f}",
            f"… {moved.last_before} | {moved.first_after} … {moved.last_after}",
            moved.ram_file_after,
        )
        for moved in runs
    ]
    headers = ["guest's RAM", "in use", "state written", "guest stood still", "out + luod + in", "serial port: old | new", "RAM is file"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def story(sizes_mib: Sequence[int], *, quiet: bool) -> list[Moved]:
    """Move one guest after another, each with RAM of another size; what was seen."""
    if shutil.which(PROGRAM) is None:
        raise QemuFault(f"{PROGRAM} is not installed: {INSTALL}")

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    runs: list[Moved] = []
    with subreaper(), tempfile.TemporaryDirectory(prefix="luod-qemu-") as folder, Daemons(folder) as _:
        for size in sizes_mib:
            say(f"A guest with {size:,} MiB of RAM, a memfd, boots in a QEMU and counts on its serial port.")
            moved = move(size * MIB, folder, folder)
            runs.append(moved)
            say(f"  QEMU {moved.old_pid}: … {moved.last_before}. Stopped; it wrote {moved.state_bytes:,} bytes of state, and ended.")
            say(f"  luod has RAM, state and serial port, and is replaced: process {moved.luod_pids[0]} by process {moved.luod_pids[1]}.")
            say(f"  QEMU {moved.new_pid}: {moved.first_after}, … {moved.last_after}.")
    return runs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A QEMU guest that changes its QEMU in mid-count.",
        epilog="Exit status: 0 done, 1 a step failed or something differs (it is said what), 2 usage.",
    )
    add_kexec_option(parser)
    parser.add_argument("--json", action="store_true", help="what was seen as one JSON document on stdout, and nothing else there")
    parser.add_argument(
        "--ram-mib",
        type=int,
        nargs="+",
        default=SIZES_MIB,
        metavar="N",
        help=f"the guests' RAM in MiB (default: {' '.join(map(str, SIZES_MIB))}); hardly any of it is used. With --kexec the first counts",
    )
    arguments = parser.parse_args()
    if min(arguments.ram_mib) < SMALLEST_MIB:
        parser.error(f"--ram-mib {min(arguments.ram_mib)}: at least {SMALLEST_MIB}")
    if arguments.kexec and arguments.json:
        parser.error("--kexec goes without --json")
    return arguments


def _judged(rows: Sequence[Check]) -> int:
    ok = all(row.ok for row in rows)
    print("", over_kexec.table(rows), "", "Everything as it must be." if ok else "NOT as it must be.", sep="\n")
    return 0 if ok else 1


def main() -> int:
    """Do what the command line says; the exit status."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    arguments = _arguments()
    try:
        match arguments.kexec:
            case "lab":
                play_a_kexec(__file__, ["--ram-mib", str(arguments.ram_mib[0])])
            case "before":
                return 0 if over_kexec.before(arguments.ram_mib[0] * MIB) else 1
            case "after":
                return _judged(over_kexec.after())
            case _:
                runs = story(arguments.ram_mib, quiet=arguments.json)
    except (luod_client.LuodError, OSError) as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    faults = [fault for moved in runs for fault in moved.faults()]
    if arguments.json:
        print(json.dumps({"ok": not faults, "faults": faults, "runs": [attrs.asdict(moved) for moved in runs]}))
    else:
        print("", told(runs), "", *faults, "NOT as it must be." if faults else "Everything as it must be.", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
