"""systemd, as luoctl needs it for an update of the kernel: whether it can take luod's sessions along, and the reboot that it does itself.

systemd 261 and later carry the kernel's sessions that lie in the store of descriptors of a unit with FileDescriptorStorePreserve=yes
through `systemctl kexec`. Sources: systemd.service(5), systemctl(1), src/shared/luo-util.c of systemd 262.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from luod_protocol.errors import Code, Refusal

FIRST: Final = 261
"""The first release that carries them."""
NAME: Final = "systemd"
"""What luod calls it."""

_RUNS: Final = Path("/run/systemd/system")
"""sd_booted(3)."""

Ask = Callable[[Sequence[str]], str]


def unit_of(pid: int) -> str:
    """The service that a process is in, by its cgroups(7): `systemctl whoami` needs a D-Bus broker. Empty when it is in none."""
    try:
        last = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").strip().rpartition("/")[2]
    except OSError:
        return ""
    return last if last.endswith(".service") else ""


def ask(words: Sequence[str]) -> str:
    """What `systemctl` says to these words; empty when it fails."""
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def why_not(manager: str, unit: str, *, runs: Path = _RUNS, ask: Ask = ask) -> str:
    """Why systemd can't take along what a luod has; empty where it can.

    Args:
        manager: the service manager that luod says it has.
        unit: the unit that luod is in, if it is in one.
        runs: the folder that is there where systemd is PID 1.
        ask: asks systemctl.
    """
    if not runs.is_dir():
        return "the machine doesn't run systemd"
    text = ask(["show", "--property=Version", "--value"])
    version = re.match(r"\d+", text)
    if version is None or int(version[0]) < FIRST:
        return f"systemd {text or 'of an unknown version'} runs here, and {FIRST} is the first that carries what the kernel preserves"
    if manager != NAME:
        return f"luod does not run as a service of systemd, but {f'under {manager}' if manager else 'on its own'}"
    kept = ask(["show", unit, "--property=FileDescriptorStorePreserve", "--value"]) if unit else ""
    if kept != "yes":
        return f"systemd doesn't keep the descriptors of {unit or 'luod'} when it stops it: FileDescriptorStorePreserve=yes in the unit"
    return ""


def kexec() -> None:
    """Have systemd stop everything and go to the loaded kernel. Returns when it has begun.

    Raises:
        Refusal: it doesn't.
    """
    try:
        done = subprocess.run(["systemctl", "kexec"], stderr=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise Refusal(Code.SYSTEM_ERROR, f"systemctl can't be run: {error.strerror}") from None
    if done.returncode:
        raise Refusal(Code.SYSTEM_ERROR, f"systemctl kexec failed: {done.stderr.strip() or f'status {done.returncode}'}")
