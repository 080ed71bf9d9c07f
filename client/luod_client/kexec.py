"""kexec, as luoctl does it: load a kernel, and jump into it. For root (CAP_SYS_BOOT).

Sources: kexec_file_load(2), reboot(2), Documentation/ABI/testing/sysfs-kernel-kexec-kdump, Documentation/admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from typing import Final

from luod_protocol.errors import Code, Refusal
from luod_protocol.fds import OwnedFd

_NUMBERS: Final[Mapping[str, int]] = {"x86_64": 320, "aarch64": 294, "riscv64": 294, "ppc64le": 382, "s390x": 381}
"""kexec_file_load, for which the C library has no function."""
_NO_INITRAMFS: Final = 4
_REBOOT_KEXEC: Final = 0x45584543
_SWITCHES: Final = ("kho", "liveupdate")
_ON: Final = ("on", "1", "y", "yes", "true")

_WHY: Final[Mapping[int, str]] = {
    errno.EPERM: "only root can (CAP_SYS_BOOT), and not on a machine that is locked down or has kernel.kexec_load_disabled",
    errno.ENOEXEC: "it is no kernel image that this kernel can load",
    errno.EBUSY: "another process is loading one",
    errno.EKEYREJECTED: "its signature is not accepted here",
    errno.ENOSYS: "this kernel has no kexec (CONFIG_KEXEC_FILE)",
    errno.EINVAL: "no kernel is loaded",
}

_libc: Final = ctypes.CDLL(None, use_errno=True)


def running_command_line() -> str:
    """The command line of the running kernel."""
    with open("/proc/cmdline", encoding="utf-8", errors="surrogateescape") as file:
        return file.read().strip()


def is_loaded() -> bool:
    """Whether a kernel is loaded to jump into."""
    try:
        with open("/sys/kernel/kexec_loaded", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def missing_switches(command_line: str, running: str) -> Sequence[str]:
    """What the running kernel was told to switch on for live updates and `command_line` doesn't say: that kernel would bring nothing."""
    return [f"{name}=on" for name in _SWITCHES if _is_on(name, running) and not _is_on(name, command_line)]


def _is_on(name: str, command_line: str) -> bool:
    values = [word.partition("=")[2] for word in command_line.split() if word.partition("=")[0] == name]
    return bool(values) and values[-1] in _ON


def load(kernel: str, initrd: str | None, command_line: str) -> None:
    """Load a kernel to jump into.

    Args:
        kernel: path of its image.
        initrd: path of its initial ram disk, or None.
        command_line: for it.

    Raises:
        OSError: a file can't be opened.
        Refusal: the kernel doesn't load it.
    """
    number = _NUMBERS.get(os.uname().machine)
    if number is None:
        raise Refusal(Code.BAD_REQUEST, f"luoctl can't load kernels on {os.uname().machine}: use kexec(8)")
    text = command_line.encode("utf-8", "surrogateescape") + b"\0"
    with OwnedFd(os.open(kernel, os.O_RDONLY | os.O_CLOEXEC)) as image:
        ramdisk = OwnedFd(os.open(os.devnull if initrd is None else initrd, os.O_RDONLY | os.O_CLOEXEC))
        with ramdisk:
            flags = _NO_INITRAMFS if initrd is None else 0
            fds = (ctypes.c_int(image.fileno()), ctypes.c_int(ramdisk.fileno() if initrd is not None else -1))
            size, bits = ctypes.c_ulong(len(text)), ctypes.c_ulong(flags)
            if _libc.syscall(ctypes.c_long(number), *fds, size, ctypes.c_char_p(text), bits):
                raise _refused(f"{kernel} can't be loaded", ctypes.get_errno())


def jump() -> None:
    """Reboot into the loaded kernel, at once: no service is stopped and no file system unmounted. Doesn't return.

    Raises:
        Refusal: the kernel doesn't; everything runs on.
    """
    _libc.reboot(ctypes.c_int(_REBOOT_KEXEC))
    raise _refused("the machine did not go to another kernel", ctypes.get_errno())


def _refused(what: str, number: int) -> Refusal:
    code = Code.NOT_PERMITTED if number == errno.EPERM else Code.SYSTEM_ERROR
    return Refusal(code, f"{what}: {_WHY.get(number) or os.strerror(number)}")
