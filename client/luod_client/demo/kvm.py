"""A minimal virtual machine monitor over /dev/kvm: one vCPU, its RAM in a memfd, its state in bytes.

Theory. A guest can't be passed on as it is: the fds of a VM and of its vCPUs answer EIO in every process but the one that made them
(virt/kvm/kvm_main.c). What can be passed on is what the guest consists of. Its RAM is a memfd, which is mapped and not copied; what its
vCPU holds is read out, put beside it, and loaded into a new vCPU of a new VM on the same RAM.

Happy path: `Machine(ram)` maps the memfd; `start(address)` has the vCPU begin there in real mode; each `run()` lets it go on until it
writes to a port. `save()` gives the vCPU's state. In another process `Machine.resume(ram, state)` is the same guest, and `run()` goes on.

Unhappy paths:
1. KVM can't be used here, or refuses: `KvmFault`; `works()` says beforehand why.
2. The state is none, of another version, or doesn't belong to this RAM: `KvmFault`, before KVM is asked for anything.
3. The guest does what this monitor has no device for, or crashes: `KvmFault`.

Saved are the general and the special registers. Not saved is what a guest as small as this never touches: the FPU and vector registers,
the MSRs and the time-stamp counter, the debug registers, CPUID (the one that a fresh vCPU has). There are no devices with a state: no
interrupt controller is made, so no interrupt is ever pending and a vCPU is always runnable; the port only shows what is written to it. A
monitor for a real guest saves all these, and its devices.

Invariants: in a saved state no instruction is half done. The machine borrows the memfd, never grows it, and holds nothing else of the
process when it is closed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from types import TracebackType
from typing import Final, Self

import attrs

from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd

PATH: Final = "/dev/kvm"
VERSION: Final = 1
"""Of the saved state's format."""

# include/uapi/linux/kvm.h
_GET_API_VERSION: Final = 0xAE00
_CREATE_VM: Final = 0xAE01
_CHECK_EXTENSION: Final = 0xAE03
_GET_VCPU_MMAP_SIZE: Final = 0xAE04
_CREATE_VCPU: Final = 0xAE41
_SET_USER_MEMORY_REGION: Final = 0x4020AE46
_SET_TSS_ADDR: Final = 0xAE47
_RUN: Final = 0xAE80
_GET_REGS: Final = 0x8090AE81
_SET_REGS: Final = 0x4090AE82
_GET_SREGS: Final = 0x8138AE83
_SET_SREGS: Final = 0x4138AE84
_API_VERSION: Final = 12
_CAP_IMMEDIATE_EXIT: Final = 136
_EXIT_IO: Final = 2
_EXIT_HLT: Final = 5
_IO_OUT: Final = 1

_MEMORY_REGION: Final = struct.Struct("<IIQQQ")
"""Slot, flags, guest address, bytes, address in this process."""

_IMMEDIATE_EXIT: Final = 1
_EXIT_REASON: Final = struct.Struct("<8xI")
_EXIT_PORT: Final = struct.Struct("<32xBBHIQ")
"""Of struct kvm_run: direction, bytes of each value, port, how many values, where they are."""

# arch/x86/include/uapi/asm/kvm.h: struct kvm_regs, struct kvm_sregs
_REGS_BYTES: Final = 144
_SREGS_BYTES: Final = 312
_RBX_AT: Final = 8
_RIP_RFLAGS: Final = struct.Struct("<QQ")
_RIP_AT: Final = 128
_RFLAGS_AT_RESET: Final = 2
_CS: Final = struct.Struct("<QIH")
"""The first segment of the special registers: base, limit, selector."""

_TSS_ADDRESS: Final = 0x7FFF0000
"""Three pages that Intel processors need for real mode; anywhere but in the RAM."""

_MAGIC: Final = b"luod-kvm"
_HEADER: Final = struct.Struct("<8sIIQ")
"""Magic, version, 0, bytes of RAM. The registers and the special registers follow."""

STATE_BYTES: Final = _HEADER.size + _REGS_BYTES + _SREGS_BYTES


class KvmFault(LuodError):
    """KVM, a saved state or the guest isn't as it must be."""


@attrs.frozen(kw_only=True)
class Out:
    """What the guest wrote to a port."""

    port: int
    value: int


def works(path: str = PATH) -> str:
    """Why no guest can run here, for a person to read; empty when one can, which is tried."""
    if platform.machine() != "x86_64":
        return f"the guest is for x86_64, this machine is {platform.machine()}"
    with OwnedFd(os.memfd_create("probe", os.MFD_CLOEXEC)) as ram:
        os.truncate(ram.fileno(), mmap.PAGESIZE)
        os.pwrite(ram.fileno(), b"\xf4", 0)  # hlt
        try:
            with Machine(ram.fileno(), path) as machine:
                machine.start(0)
                out = machine.run()
        except KvmFault as fault:
            return str(fault)
    return "" if out is None else f"{path}: a guest that should halt wrote {out.value} to port {out.port:#x}"


def _open(path: str) -> OwnedFd:
    try:
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        match error.errno:
            case errno.EACCES | errno.EPERM:
                do = ": be root, or in the group that it belongs to"
            case errno.ENOENT | errno.ENODEV | errno.ENXIO:
                do = ": load the kernel's module kvm_intel or kvm_amd; in a virtual machine or a container, have its host pass KVM on"
            case _:
                do = ""
        raise KvmFault(f"{path} can't be opened: {error.strerror}{do}") from error


class Machine:
    """A VM with one vCPU on the RAM `ram`, a borrowed memfd of whole pages, at most 2 GiB. For one thread; leaving the block ends it.

    Raises:
        KvmFault: unhappy path 1.
    """

    def __init__(self, ram: int, path: str = PATH) -> None:
        self._size = os.fstat(ram).st_size
        with _open(path) as kvm:
            try:
                self._make(kvm.fileno(), ram)
            except OSError as error:
                raise KvmFault(f"{path} doesn't make a virtual machine: {error.strerror}") from error

    def _make(self, kvm: int, ram: int) -> None:
        version = fcntl.ioctl(kvm, _GET_API_VERSION)
        if version != _API_VERSION or not fcntl.ioctl(kvm, _CHECK_EXTENSION, _CAP_IMMEDIATE_EXIT):
            raise KvmFault(f"KVM's version {version} can't be used: Linux 4.13 or later has what is needed")
        with OwnedFd(fcntl.ioctl(kvm, _CREATE_VM)) as vm:
            fcntl.ioctl(vm.fileno(), _SET_TSS_ADDR, _TSS_ADDRESS)
            with OwnedFd(fcntl.ioctl(vm.fileno(), _CREATE_VCPU)) as vcpu:
                self._shared = mmap.mmap(vcpu.fileno(), fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE))
                self._ram = mmap.mmap(ram, self._size)
                # The mapping's address. The view that it needs is gone at the end of the line, so that the mapping can be closed.
                address = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
                fcntl.ioctl(vm.fileno(), _SET_USER_MEMORY_REGION, _MEMORY_REGION.pack(0, 0, 0, self._size, address))
                self._vcpu = OwnedFd(vcpu.take())
            self._vm = OwnedFd(vm.take())

    @classmethod
    def resume(cls, ram: int, state: bytes, path: str = PATH) -> Self:
        """The guest whose vCPU was saved as `state`, on its RAM, a borrowed memfd. It goes on with `run`.

        Raises:
            KvmFault: unhappy paths 1 and 2.
        """
        regs, sregs = _parse(state, os.fstat(ram).st_size)
        machine = cls(ram, path)
        try:
            machine._load(regs, sregs)
        except BaseException:
            machine.close()
            raise
        return machine

    def start(self, address: int) -> None:
        """Have the vCPU begin at `address`, below 64 KiB, in real mode, with interrupts off and every register 0."""
        sregs = self._get(_GET_SREGS, _SREGS_BYTES)
        _CS.pack_into(sregs, 0, 0, 0xFFFF, 0)
        regs = bytearray(_REGS_BYTES)
        _RIP_RFLAGS.pack_into(regs, _RIP_AT, address, _RFLAGS_AT_RESET)
        self._load(bytes(regs), bytes(sregs))

    def run(self) -> Out | None:
        """Let the guest run until it writes to a port; None when it halts. Signals are served on the way.

        Raises:
            KvmFault: unhappy path 3.
        """
        while not self._enter():
            pass
        (reason,) = _EXIT_REASON.unpack_from(self._shared)
        if reason == _EXIT_HLT:
            return None
        if reason == _EXIT_IO:
            direction, size, port, count, at = _EXIT_PORT.unpack_from(self._shared)
            if direction == _IO_OUT and count == 1:
                return Out(port=port, value=int.from_bytes(self._shared[at : at + size], "little"))
        rip, _ = _RIP_RFLAGS.unpack_from(self._get(_GET_REGS, _REGS_BYTES), _RIP_AT)
        raise KvmFault(f"the guest stopped at {rip:#x} for what nothing is there to serve: exit reason {reason} of KVM_RUN")

    def _enter(self) -> bool:
        """KVM_RUN; whether the guest is the reason of the return, and not a signal."""
        try:
            fcntl.ioctl(self._vcpu.fileno(), _RUN)
        except InterruptedError:
            return False
        except OSError as error:
            raise KvmFault(f"KVM can't run the guest: {error.strerror}") from error
        return True

    def save(self) -> bytes:
        """The vCPU's state, `STATE_BYTES` long. The guest can go on afterwards, here or where it is resumed, but not in both places.

        Raises:
            KvmFault: KVM doesn't give it.
        """
        # The instruction whose OUT `run` returned is completed by the next KVM_RUN only (Documentation/virt/kvm/api.rst, KVM_EXIT_IO).
        # This one does that and returns EINTR before the guest executes anything.
        self._shared[_IMMEDIATE_EXIT] = 1
        try:
            if self._enter():
                raise KvmFault("the guest ran on where it should only have completed its last instruction")
        finally:
            self._shared[_IMMEDIATE_EXIT] = 0
        header = _HEADER.pack(_MAGIC, VERSION, 0, self._size)
        return header + self._get(_GET_REGS, _REGS_BYTES) + self._get(_GET_SREGS, _SREGS_BYTES)

    def _get(self, request: int, size: int) -> bytearray:
        data = bytearray(size)
        try:
            fcntl.ioctl(self._vcpu.fileno(), request, data)
        except OSError as error:
            raise KvmFault(f"KVM doesn't give the vCPU's registers: {error.strerror}") from error
        return data

    def _load(self, regs: bytes, sregs: bytes) -> None:
        try:
            fcntl.ioctl(self._vcpu.fileno(), _SET_SREGS, sregs)
            fcntl.ioctl(self._vcpu.fileno(), _SET_REGS, regs)
        except OSError as error:
            raise KvmFault(f"KVM doesn't take the vCPU's registers: {error.strerror}") from error

    def close(self) -> None:
        """End the machine; the RAM is left as it is."""
        self._vcpu.close()
        self._vm.close()
        self._shared.close()
        self._ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def ebx(state: bytes) -> int:
    """The register EBX in a saved state."""
    (value,) = struct.unpack_from("<I", state, _HEADER.size + _RBX_AT)
    return int(value)


def _parse(state: bytes, ram_size: int) -> tuple[bytes, bytes]:
    """The registers and the special registers in a saved state; what isn't one, or isn't for this RAM, is refused."""
    if len(state) < _HEADER.size or not state.startswith(_MAGIC):
        raise KvmFault(f"this is no saved vCPU: {len(state)} bytes that don't begin with {_MAGIC.decode()!r} and a header")
    _, version, _, size = _HEADER.unpack_from(state)
    if version != VERSION:
        raise KvmFault(f"the vCPU was saved in version {version}, only {VERSION} is known here: resume it with what saved it")
    if len(state) != STATE_BYTES:
        raise KvmFault(f"the saved vCPU has {len(state)} bytes, where version {VERSION} has {STATE_BYTES}: it is damaged")
    if size != ram_size:
        raise KvmFault(f"the vCPU was saved with {size} bytes of RAM, this RAM has {ram_size}: they don't belong together")
    at = _HEADER.size + _REGS_BYTES
    return state[_HEADER.size : at], state[at:]
