"""Which driver a character device belongs to, by its number.

Some numbers are fixed for ever (Documentation/admin-guide/devices.txt), most are given out at run time; /proc/devices and /proc/misc say
to whom. They go on saying so while a fd is open, whatever becomes of the device: a driver can't be unloaded then. The device's own entry in
/sys goes when a network interface is deleted or a PCI device is unplugged, so it may tell people something, and proves nothing.

The names are the kernel's own, with one exception: a program that may open /dev/cuse (root, by default) makes devices with names of its
choice (fs/fuse/cuse.c), even with a line feed in them. So a device of CUSE is told by /sys, and a number with several names has none.

Unhappy paths:
1. /proc shows processes only (`subset=pid` of proc(5), ProcSubset=pid of systemd), or there is no /sys: the driver is unknown, and devices
   are refused.
"""

from __future__ import annotations

import os
from typing import Final

from luod.handlers.kernel import printable

_MISC: Final = 10
"""The major number of all "misc" devices; the minor tells which."""


def driver(number: int) -> str:
    """The name of the driver that has the device `number`, a device number as in st_rdev.

    Returns:
        `pts`, `vfio` and so on as /proc/devices has it, `misc/tun` and so on for misc devices, `cuse` for whatever a process serves;
        empty when it is unknown.
    """
    if sysfs(number).startswith("virtual/cuse/"):
        return "cuse"
    try:
        if os.major(number) == _MISC:
            name = named(_read("/proc/misc"), os.minor(number))
            return name and f"misc/{name}"
        return named(_read("/proc/devices").partition("\nBlock devices:")[0], os.major(number))
    except OSError:
        return ""


def named(table: str, number: int) -> str:
    """The name of `number` in a table of numbers and names; empty when there is none, or several."""
    names = {name.strip() for key, _, name in (line.strip().partition(" ") for line in table.splitlines()) if key == str(number)}
    return names.pop() if len(names) == 1 else ""


def sysfs(number: int) -> str:
    """Where the device is in /sys/devices, such as `pci0000:00/0000:00:04.0/vfio-dev/vfio0`. Parts of it a client may have chosen (the name
    of a network interface). Empty when it isn't there, or not any more."""
    try:
        path = printable(os.readlink(b"/sys/dev/char/%d:%d" % (os.major(number), os.minor(number))))
    except OSError:
        return ""
    return path.removeprefix("../../devices/")


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read().decode("utf-8", "backslashreplace")
