"""The clock and the few things luod asks the machine, in one record that tests can replace."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import attrs


@attrs.frozen(kw_only=True)
class Process:
    """A process, told from a later one with the same pid by when it started (clock ticks since boot; 0: not known)."""

    pid: int
    start: int


def process(pid: int) -> Process:
    """The process that has this pid now; `start` is 0 when it can't be seen."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # proc_pid_stat(5): the name, field 2, may contain anything; field 22 is the start time, 3 the state.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return Process(pid=pid, start=0)
    dead = fields[0] in (b"Z", b"X")
    return Process(pid=pid, start=0 if dead else int(fields[19]))


def _is_alive(known: Process) -> bool:
    return known.start != 0 and process(known.pid) == known


def cgroup(pid: int) -> str:
    """The cgroups(7) of a process, as /proc tells them; empty when it can't be seen."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="ascii", errors="backslashreplace") as file:
            return file.read()
    except OSError:
        return ""


def _kexec_loaded() -> bool:
    try:
        with open("/sys/kernel/kexec_loaded", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@attrs.frozen(kw_only=True)
class System:
    """What the daemon needs to know of the world.

    `now` is in seconds since 1970, `monotonic_us` in microseconds of CLOCK_MONOTONIC, which all processes of a machine share.
    `kexec_loaded` is whether a kernel is loaded to reboot into.
    """

    now: Callable[[], float] = time.time
    monotonic_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000
    process: Callable[[int], Process] = process
    is_alive: Callable[[Process], bool] = _is_alive
    cgroup: Callable[[int], str] = cgroup
    kexec_loaded: Callable[[], bool] = _kexec_loaded
    boot_id: str = attrs.field(factory=_boot_id)
    pid: int = attrs.field(factory=os.getpid)
    uid: int = attrs.field(factory=os.geteuid)
