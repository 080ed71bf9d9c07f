"""Specimens of what mostly a VMM has. What the machine lacks, or doesn't let this user have, is left out; `recorded` has it all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import termios
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from conformance.making import HOSTILE, Maker, Refused, Specimen, available, making
from luod_protocol.fds import OwnedFd, close_all, own
from processes import until

_libc = ctypes.CDLL(None, use_errno=True)
_MACHINE: Final = 0 if os.uname().machine == "x86_64" else 1
SYSCALLS: Final = {"bpf": (321, 280)[_MACHINE], "userfaultfd": (323, 282)[_MACHINE]}
"""Numbers of system calls that libc has no function for: x86_64, and everybody else (asm-generic/unistd.h)."""


def called(result: int) -> int:
    """What a call of libc returned, unless it failed.

    Raises:
        OSError: it did.
    """
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# ---- timerfd

_CLOEXEC: Final = os.O_CLOEXEC


def _timerfd(clock: int) -> Maker:
    return making(lambda: called(_libc.timerfd_create(clock, _CLOEXEC)))


def _arm(fd: int) -> None:
    called(_libc.timerfd_settime(fd, 0, struct.pack("4q", 3600, 0, 3600, 0), None))


TIMERFDS: Final = (
    Specimen(name="timerfd", kind="timerfd", make=_timerfd(1), facts={"clock": "monotonic"}, use=_arm, unlike=("timerfd-realtime",)),
    Specimen(name="timerfd-realtime", kind="timerfd", make=_timerfd(0), facts={"clock": "realtime"}, unlike=("timerfd",)),
    Specimen(name="timerfd-boottime", kind="timerfd", make=_timerfd(7), facts={"clock": "boottime"}),
)

# ---- signalfd


def _mask(*signals: int) -> bytes:
    return sum(1 << number - 1 for number in signals).to_bytes(128, "little")


def _more_signals(fd: int) -> None:
    called(_libc.signalfd(fd, _mask(signal.SIGUSR1, signal.SIGUSR2), 0))


SIGNALFDS: Final = (
    Specimen(
        name="signalfd",
        kind="signalfd",
        make=making(lambda: called(_libc.signalfd(-1, _mask(signal.SIGUSR1), _CLOEXEC))),
        facts={"signals": f"{1 << signal.SIGUSR1 - 1:016x}"},
        use=_more_signals,
    ),
)

# ---- inotify


def _inotify(watches: int) -> Maker:
    """One that watches directories with names of a client's choice, and has an event for each."""

    @contextmanager
    def make() -> Generator[int]:
        with OwnedFd(called(_libc.inotify_init1(_CLOEXEC))) as fd, tempfile.TemporaryDirectory() as folder:
            for each in range(watches):
                path = os.fsencode(folder) + b"/%d" % each + HOSTILE
                os.mkdir(path)
                called(_libc.inotify_add_watch(fd.fileno(), path, 0x100))  # IN_CREATE
                os.mkdir(path + b"/new")
            yield fd.fileno()

    return make


def _read_all(fd: int) -> None:
    os.read(fd, 65536)


def _watch(fd: int) -> None:
    called(_libc.inotify_add_watch(fd, b"/", 0x100))


INOTIFIES: Final = (
    Specimen(name="inotify", kind="inotify", make=_inotify(0), facts={}, use=_watch),
    Specimen(name="inotify-watching", kind="inotify", make=_inotify(50), facts={}, use=_read_all),
)

# ---- pidfd


@contextmanager
def _child() -> Generator[int]:
    """A process that ends when it is told to."""
    process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    with process, OwnedFd(os.pidfd_open(process.pid)) as fd:
        yield fd.fileno()


def _end_it(fd: int) -> None:
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, fd, os.WEXITED)


def _waited_for() -> int:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        return os.pidfd_open(process.pid)


PIDFDS: Final = (
    Specimen(
        name="pidfd",
        kind="pidfd",
        make=making(lambda: os.pidfd_open(os.getpid())),
        facts={"pid": os.getpid()},
        unlike=("pidfd-of-another",),
    ),
    Specimen(name="pidfd-of-another", kind="pidfd", make=_child, facts={}, use=_end_it, unlike=("pidfd",)),
    Specimen(name="pidfd-waited-for", kind="pidfd", make=making(_waited_for), facts={"pid": -1}),
)

# ---- pty


def _waiting(fd: int) -> int:
    """Bytes that can be read."""
    count: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    return count


def _pty(end: int, before: int = 0) -> Maker:
    @contextmanager
    def make() -> Generator[int]:
        with ExitStack() as stack:
            for _ in range(before):
                for each in own(os.openpty()):
                    stack.enter_context(each)
            ends = [stack.enter_context(each) for each in own(os.openpty())]
            os.write(ends[0].fileno(), b"typed\n")
            os.write(ends[1].fileno(), b"unread")
            # The kernel carries them over in its own time.
            until(lambda: _waiting(ends[0].fileno()) == len(b"typed\r\nunread") and _waiting(ends[1].fileno()), "all is there to be read")
            yield ends[end].fileno()

    return make


def _resize(fd: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", 50, 132, 0, 0))
    os.write(fd, b"more")


def _hang_up(fd: int) -> None:
    """vhangup(2), which root may do: afterwards not even a master tells much."""
    try:
        fcntl.ioctl(fd, 0x5437)  # TIOCVHANGUP
    except PermissionError:
        os.write(fd, b"more")


PTYS: Final = (
    Specimen(name="pty-master", kind="pty", make=_pty(0), facts={"end": "master"}, use=_resize, unlike=("pty-slave", "pty-second")),
    Specimen(name="pty-slave", kind="pty", make=_pty(1), facts={"end": "slave"}, use=_resize, unlike=("pty-master",)),
    Specimen(name="pty-second", kind="pty", make=_pty(0, before=1), facts={"end": "master"}, use=_hang_up, unlike=("pty-master",)),
    Specimen(name="pty-slave-hung-up", kind="pty", make=_pty(1), facts={"end": "slave"}, use=_hang_up),
)

# ---- tap

_TUNSETIFF: Final = 0x400454CA
_TAP: Final = struct.pack("16sH22x", b"luod%d", 0x1002)  # IFF_TAP, IFF_NO_PI
_CLONE_NEWNET: Final = 0x40000000


def _attach(fd: int) -> None:
    fcntl.ioctl(fd, _TUNSETIFF, _TAP)


def _tun() -> int:
    return os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)


def _tap() -> int:
    with OwnedFd(_tun()) as fd:
        _attach(fd.fileno())
        return fd.take()


def _elsewhere(act: Callable[[], None]) -> None:
    """Do something in a network namespace of its own, which ends with all that refers to it."""
    failed: list[OSError] = []

    def inside() -> None:
        try:
            called(_libc.unshare(_CLONE_NEWNET))
            act()
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def _ip(*words: str) -> None:
    if shutil.which("ip") is None or subprocess.run(["ip", *words], stderr=subprocess.DEVNULL, check=False).returncode:
        raise OSError(f"ip {' '.join(words)} failed")


def _leads_to(path: str) -> str:
    """Where a symlink leads; empty when it is gone: other tests make and delete devices at the same time."""
    with suppress(FileNotFoundError):
        return os.readlink(path)
    return ""


@contextmanager
def _macvtap(*, delete: bool = False) -> Generator[int]:
    """One in another network namespace, through a device node of another name; with `delete` without its interface."""
    opened: list[OwnedFd] = []

    def inside() -> None:
        name = f"luod{threading.get_native_id()}"
        _ip("tuntap", "add", "dev", "lower", "mode", "tap")
        _ip("link", "add", "link", "lower", "name", name, "type", "macvtap")
        number = next(each for each in os.listdir("/sys/dev/char") if f"/net/{name}/macvtap/" in _leads_to(f"/sys/dev/char/{each}"))
        with tempfile.TemporaryDirectory() as folder:
            major, minor = map(int, number.split(":"))
            os.mknod(f"{folder}/disk", 0o20600, os.makedev(major, minor))
            opened.append(OwnedFd(os.open(f"{folder}/disk", os.O_RDWR | os.O_CLOEXEC)))
        if delete:
            _ip("link", "delete", name)

    try:
        _elsewhere(inside)
        yield opened[0].fileno()
    finally:
        close_all(opened)


TAPS: Final = (
    Specimen(name="tap", kind="tap", make=making(_tap), facts={}),
    Specimen(name="tap-not-attached", kind="tap", make=making(_tun), facts={}, use=_attach),
    Specimen(name="macvtap", kind="macvtap", make=_macvtap, facts={}),
    Specimen(name="macvtap-deleted", kind="macvtap", make=lambda: _macvtap(delete=True), facts={"device": ""}),
)

# ---- BPF

_RETURN_0: Final = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
"""r0 = 0; exit."""


def _bpf(command: int, attributes: bytes) -> int:
    return called(_libc.syscall(SYSCALLS["bpf"], command, ctypes.create_string_buffer(attributes, 144), 144))


def _bpf_map(kind: int) -> Maker:
    return making(lambda: _bpf(0, struct.pack("5I", kind, 4, 8, 3, 0)))


def _put(fd: int) -> None:
    key, value = ctypes.create_string_buffer(4), ctypes.create_string_buffer(8)
    _bpf(2, struct.pack("I4xQQQ", fd, ctypes.addressof(key), ctypes.addressof(value), 0))


def _program(kind: int) -> int:
    code, license_ = ctypes.create_string_buffer(_RETURN_0), ctypes.create_string_buffer(b"GPL")
    return _bpf(5, struct.pack("IIQQ", kind, 2, ctypes.addressof(code), ctypes.addressof(license_)))


def _link() -> int:
    """A program at a raw tracepoint, which does nothing there."""
    name = ctypes.create_string_buffer(b"sys_enter")
    with OwnedFd(_program(17)) as program:
        return _bpf(17, struct.pack("QI", ctypes.addressof(name), program.fileno()))


def _types() -> int:
    kinds, names = struct.pack("4I", 1, 1 << 24, 4, 1 << 24 | 32), b"\0int\0"
    head = struct.pack("HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(kinds), len(kinds), len(names))
    blob = ctypes.create_string_buffer(head + kinds + names)
    return _bpf(18, struct.pack("QQIII", ctypes.addressof(blob), 0, len(head + kinds + names), 0, 0))


BPF: Final = (
    Specimen(
        name="bpf-map",
        kind="bpf-map",
        make=_bpf_map(2),
        facts={"type": 2, "key_size": 4, "value_size": 8, "max_entries": 3},
        use=_put,
        unlike=("bpf-map-hash",),
    ),
    Specimen(name="bpf-map-hash", kind="bpf-map", make=_bpf_map(1), facts={"type": 1}, unlike=("bpf-map",)),
    Specimen(name="bpf-prog", kind="bpf-prog", make=making(lambda: _program(1)), facts={"type": 1}, unlike=("bpf-prog-trace",)),
    Specimen(name="bpf-prog-trace", kind="bpf-prog", make=making(lambda: _program(17)), facts={"type": 17}, unlike=("bpf-prog",)),
    Specimen(name="bpf-link", kind="bpf-link", make=making(_link), facts={}),
    Specimen(name="bpf-btf", kind="bpf-btf", make=making(_types), facts={}),
)

SPECIMENS: Final = tuple(
    specimen for specimen in (*TIMERFDS, *SIGNALFDS, *INOTIFIES, *PIDFDS, *PTYS, *TAPS, *BPF) if available(specimen.make)
)

# ---- refused

_CREATE_VM: Final = 0xAE01
_CREATE_VCPU: Final = 0xAE41
_CREATE_DEVICE: Final = 0xC00CAEE0
_CREATE_GUEST_MEMFD: Final = 0xC040AED4


def _kvm(make: Callable[[int], int]) -> Maker:
    """Something of a new virtual machine, of which `make` is given the fd."""

    @contextmanager
    def made() -> Generator[int]:
        with (
            OwnedFd(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)) as kvm,
            OwnedFd(fcntl.ioctl(kvm.fileno(), _CREATE_VM, 0)) as machine,
            OwnedFd(make(machine.fileno())) as fd,
        ):
            yield fd.fileno()

    return made


def _kvm_device(machine: int) -> int:
    request = bytearray(struct.pack("3I", 4, 0, 0))  # KVM_DEV_TYPE_VFIO
    fcntl.ioctl(machine, _CREATE_DEVICE, request)
    fd: int = struct.unpack("3I", request)[1]
    return fd


def _guest_memfd(machine: int) -> int:
    fd: int = fcntl.ioctl(machine, _CREATE_GUEST_MEMFD, bytearray(struct.pack("QQ48x", 4096, 0)))
    return fd


def _userfaultfd() -> int:
    return called(_libc.syscall(SYSCALLS["userfaultfd"], os.O_CLOEXEC))


def _io_uring() -> int:
    return called(_libc.syscall(425, 1, ctypes.create_string_buffer(120)))


def _opened(path: str) -> Maker:
    return making(lambda: os.open(path, os.O_RDWR | os.O_CLOEXEC))


REFUSED: Final = tuple(
    refused
    for refused in (
        Refused(name="kvm", make=_opened("/dev/kvm"), words=("/dev/kvm", "open it again")),
        Refused(name="kvm-vm", make=_kvm(os.dup), words=("a KVM virtual machine", "in a memfd", "make a new one")),
        Refused(
            name="kvm-vcpu",
            make=_kvm(lambda machine: fcntl.ioctl(machine, _CREATE_VCPU, 0)),
            words=("a KVM vCPU", "registers in a memfd", "make a new one"),
        ),
        Refused(name="kvm-device", make=_kvm(_kvm_device), words=("a device of a KVM", "in a memfd", "make a new one")),
        Refused(name="guest-memfd", make=_kvm(_guest_memfd), words=("a guest_memfd", "in a memfd")),
        Refused(name="userfaultfd", make=making(_userfaultfd), words=("a userfaultfd", "make a new one")),
        Refused(name="io-uring", make=making(_io_uring), words=("an io_uring", "make a new one")),
        Refused(name="vhost-net", make=_opened("/dev/vhost-net"), words=("a vhost device", "VHOST_SET_OWNER", "open the device again")),
        Refused(name="vhost-vsock", make=_opened("/dev/vhost-vsock"), words=("a vhost device", "VHOST_SET_OWNER", "open the device again")),
        Refused(name="fuse", make=_opened("/dev/fuse"), words=("FUSE", "mount it again")),
    )
    if available(refused.make)
)
