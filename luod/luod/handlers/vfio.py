"""vfio (Documentation/driver-api/vfio.rst): devices in the hands of a process.

There are two ways to a device. The older: a *container* (/dev/vfio/vfio) has the DMA mappings, a *group* (/dev/vfio/N) is put into it, and
gives *device* fds (an anonymous inode). The newer: a *cdev* (/dev/vfio/devices/vfioN) is the device, bound to an iommufd.

Preserved: everything. The device keeps its state, its interrupts go on signalling the eventfds that they were given, DMA goes on, into
memory that the mappings keep pinned even after the process that mapped it is gone.

A device keeps its group and container, or its iommufd, alive in the kernel, but only whoever has *their* fds can change a mapping. So
preserve them with it, and say so: `needs` of a device names its group and container, or of a cdev its iommufd; and the memfds that are
mapped for DMA belong into the same session.

The client must: mmap the device's regions again, add group or cdev to the new KVM's vfio device (KVM_DEV_VFIO_FILE_ADD), register the
irqfds again, and have the pinned memory counted as its own (VFIO_DMA_UNMAP_FLAG_VADDR and VFIO_DMA_MAP_FLAG_VADDR, or see
`luod.handlers.iommufd`).

The last close resets the device and takes a while (0.3 s were seen), in a thread. No ioctl is ever done on one here.
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.anonymous import Anonymous, Told, text
from luod.handlers.character import Character, Placed


class VfioContainer(Character):
    """Containers. All of them share one inode, so one can't be told from another."""

    kind: ClassVar[str] = "vfio-container"
    compatible: ClassVar[str] = "vfio-container-v1"
    drivers: ClassVar[tuple[str, ...]] = ("misc/vfio",)


class VfioGroup(Placed):
    """Groups, those without an IOMMU as well. Told: its place in /sys, which ends with its number."""

    kind: ClassVar[str] = "vfio-group"
    compatible: ClassVar[str] = "vfio-group-v1"
    drivers: ClassVar[tuple[str, ...]] = ("vfio",)


class VfioDevice(Anonymous):
    """Devices that a group gave. Told: its place in /sys, which has the device's address on its bus (empty before Linux 6.17)."""

    kind: ClassVar[str] = "vfio-device"
    compatible: ClassVar[str] = "vfio-device-v1"
    inode: ClassVar[str] = "[vfio-device]"
    told: ClassVar[dict[str, Told]] = {
        "device": Told("vfio-device-syspath", lambda value: text(value).removeprefix("/sys/devices/"), "", fixed=False)
    }


class VfioCdev(Placed):
    """Devices by themselves, bound to an iommufd or not yet. Told: its place in /sys, which has the device's address on its bus."""

    kind: ClassVar[str] = "vfio-cdev"
    compatible: ClassVar[str] = "vfio-cdev-v1"
    drivers: ClassVar[tuple[str, ...]] = ("vfio-dev",)
