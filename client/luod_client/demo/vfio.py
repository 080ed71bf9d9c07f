"""What vfio and iommufd are asked here: include/uapi/linux/vfio.h, include/uapi/linux/iommufd.h.

There are two ways to a PCI device, see Documentation/driver-api/vfio.rst: through its group, which is put into a container, or by itself
(cdev), bound to an iommufd. Without an IOMMU (vfio.enable_unsafe_noiommu_mode=1) a device uses physical addresses, and nothing keeps it
from any memory of the machine. fds that a function takes are borrowed; those that it returns are the caller's.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

from luod_protocol.errors import LuodError
from luod_protocol.fds import OwnedFd

CONTAINER: Final = "/dev/vfio/vfio"
IOMMU: Final = "/dev/iommu"
BAR0: Final = 0
CONFIG: Final = 7
"""Regions of a PCI device."""

# _IO(';', 100 + n) of vfio, _IO(';', 0x80 + n) of iommufd: no size is in them.
_SET_IOMMU: Final = 0x3B66
_GROUP_SET_CONTAINER: Final = 0x3B68
_GROUP_GET_DEVICE_FD: Final = 0x3B6A
_DEVICE_GET_REGION_INFO: Final = 0x3B6C
_DEVICE_SET_IRQS: Final = 0x3B6E
_DEVICE_BIND_IOMMUFD: Final = 0x3B76
_DEVICE_ATTACH_IOMMUFD_PT: Final = 0x3B77
_IOAS_ALLOC: Final = 0x3B81
_IOAS_MAP_FILE: Final = 0x3B8F
_IOAS_CHANGE_PROCESS: Final = 0x3B92

_NOIOMMU_IOMMU: Final = 8
_IRQ_MSI: Final = 1
_IRQ_DATA_EVENTFD_TRIGGER: Final = 4 | 32
_MAP_FIXED_RW: Final = 1 | 2 | 4
_REGION_INFO: Final = struct.Struct("<IIIIQQ")
_MAP_FILE: Final = struct.Struct("<IIIiQQQ")


class VfioFault(LuodError):
    """A device can't be had, or doesn't do as it should."""


def _ioctl(what: str, fd: int, request: int, argument: bytes | bytearray | int) -> int:
    """ioctl(2), and what it returns; a bytearray is changed as the kernel does."""
    try:
        return fcntl.ioctl(fd, request, bytearray(argument) if isinstance(argument, bytes) else argument)
    except OSError as error:
        raise VfioFault(f"{what}: {error.strerror}") from error


def _open(path: str) -> OwnedFd:
    try:
        return OwnedFd(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise VfioFault(f"{path} can't be opened: {error.strerror}") from error


def _sysfs(device: str) -> str:
    return f"/sys/bus/pci/devices/{device}"


def find(vendor: int, device: int) -> list[str]:
    """The addresses (0000:00:03.0) of the PCI devices with these ids."""
    found: list[str] = []
    for address in sorted(os.listdir("/sys/bus/pci/devices")):
        ids: list[int] = []
        for name in ("vendor", "device"):
            with open(f"{_sysfs(address)}/{name}", encoding="ascii") as file:
                ids.append(int(file.read(), 16))
        if ids == [vendor, device]:
            found.append(address)
    return found


def bind(device: str) -> None:
    """Give the PCI device at the address `device` to the driver vfio-pci.

    Raises:
        VfioFault: it isn't there, or can't be given.
    """
    folder = _sysfs(device)
    driver = f"{folder}/driver"
    if os.path.islink(driver) and os.path.basename(os.readlink(driver)) == "vfio-pci":
        return
    try:
        if os.path.islink(driver):
            _write(f"{driver}/unbind", device)
        _write(f"{folder}/driver_override", "vfio-pci")
        _write("/sys/bus/pci/drivers_probe", device)
        ok = os.path.basename(os.readlink(driver)) == "vfio-pci"
    except OSError as error:
        raise VfioFault(f"{device} can't be given to vfio-pci: {error.filename}: {error.strerror}") from error
    if not ok:
        raise VfioFault(f"{device} is not taken by vfio-pci")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def command(device: str) -> int:
    """The command register of a PCI device, as anybody may read it who has no fd of it. Bit 2 is bus mastering: whether it may do DMA."""
    with open(f"{_sysfs(device)}/config", "rb", buffering=0) as file:
        return int.from_bytes(file.read(6)[4:], "little")


# ---- by group and container


def open_group(device: str) -> OwnedFd:
    """The group of a device that vfio-pci has, with or without an IOMMU.

    Raises:
        VfioFault: there is none; without an IOMMU this needs vfio.enable_unsafe_noiommu_mode=1.
    """
    try:
        number = os.path.basename(os.readlink(f"{_sysfs(device)}/iommu_group"))
    except OSError:
        raise VfioFault(f"{device} has no group: no IOMMU, and no vfio.enable_unsafe_noiommu_mode=1") from None
    path = f"/dev/vfio/noiommu-{number}"
    return _open(path if os.path.exists(path) else f"/dev/vfio/{number}")


def open_container() -> OwnedFd:
    """An empty container."""
    return _open(CONTAINER)


def put_without_iommu(group: int, container: int) -> None:
    """Put a group into a container that has no IOMMU. Needs CAP_SYS_RAWIO."""
    _ioctl("the group can't be put into the container", group, _GROUP_SET_CONTAINER, struct.pack("<i", container))
    _ioctl("the container can't be set to no IOMMU", container, _SET_IOMMU, _NOIOMMU_IOMMU)


def device_of(group: int, device: str) -> OwnedFd:
    """The device, of its group."""
    return OwnedFd(_ioctl(f"the group doesn't give {device}", group, _GROUP_GET_DEVICE_FD, device.encode() + b"\0"))


# ---- by cdev and iommufd


def open_cdev(device: str) -> OwnedFd:
    """The device by itself.

    Raises:
        VfioFault: vfio-pci doesn't have it, or without an IOMMU that is there only under another name.
    """
    folder = f"{_sysfs(device)}/vfio-dev"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if not names:
        raise VfioFault(f"{device} is no device of its own: bind it to vfio-pci, in a kernel with CONFIG_VFIO_DEVICE_CDEV")
    return _open(f"/dev/vfio/devices/{names[0]}")


def open_iommufd() -> OwnedFd:
    """An empty iommufd."""
    return _open(IOMMU)


def attach(cdev: int, iommufd: int) -> int:
    """Bind a device to an iommufd, and attach it to a new address space in it, whose id is returned."""
    _ioctl("the device can't be bound to the iommufd", cdev, _DEVICE_BIND_IOMMUFD, struct.pack("<IIiI", 16, 0, iommufd, 0))
    allocated = bytearray(struct.pack("<III", 12, 0, 0))
    _ioctl("the iommufd gives no address space", iommufd, _IOAS_ALLOC, allocated)
    (ioas,) = struct.unpack_from("<I", allocated, 8)
    _ioctl("the device can't be attached to the address space", cdev, _DEVICE_ATTACH_IOMMUFD_PT, struct.pack("<III", 12, 0, ioas))
    return int(ioas)


def map_file(iommufd: int, ioas: int, memfd: int, size: int, iova: int) -> None:
    """Let devices in the address space `ioas` see the first `size` bytes of a memfd at the address `iova`."""
    mapping = _MAP_FILE.pack(_MAP_FILE.size, _MAP_FIXED_RW, ioas, memfd, 0, size, iova)
    _ioctl("the memfd can't be mapped for the device", iommufd, _IOAS_MAP_FILE, mapping)


def change_process(iommufd: int) -> None:
    """Have the memory that the iommufd's mappings pin counted for this process, instead of for the one that mapped it."""
    _ioctl("this process can't have the pinned memory counted for it", iommufd, _IOAS_CHANGE_PROCESS, struct.pack("<II", 8, 0))


# ---- a device's fd, from either


class Region:
    """A part of a device's fd: the registers in BAR0, or its configuration space."""

    def __init__(self, device: int, index: int) -> None:
        info = bytearray(_REGION_INFO.pack(_REGION_INFO.size, 0, index, 0, 0, 0))
        _ioctl(f"the device has no region {index}", device, _DEVICE_GET_REGION_INFO, info)
        self._device = device
        self._offset = int(_REGION_INFO.unpack(info)[5])

    def read(self, at: int, size: int = 4) -> int:
        """A register of `size` bytes."""
        return int.from_bytes(os.pread(self._device, size, self._offset + at), "little")

    def write(self, at: int, value: int, size: int = 4) -> None:
        """Set a register of `size` bytes."""
        os.pwrite(self._device, value.to_bytes(size, "little"), self._offset + at)


def set_bus_master(device: int) -> None:
    """Allow the device to do DMA."""
    config = Region(device, CONFIG)
    config.write(4, config.read(4, 2) | 0x4, 2)


def interrupt_by(device: int, eventfd: int) -> None:
    """Have the device's message-signalled interrupt (MSI) signal an eventfd."""
    _ioctl(
        "the device's interrupt can't be had",
        device,
        _DEVICE_SET_IRQS,
        struct.pack("<IIIIIi", 24, _IRQ_DATA_EVENTFD_TRIGGER, _IRQ_MSI, 0, 1, eventfd),
    )
