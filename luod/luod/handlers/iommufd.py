"""iommufds (Documentation/userspace-api/iommufd.rst), /dev/iommu.

Preserved: the context with its address spaces, mappings, page tables, and the devices that are bound to it; DMA goes on. Only mappings of
files (IOMMU_IOAS_MAP_FILE) can change owners: after the old process is gone the new one calls IOMMU_IOAS_CHANGE_PROCESS, and the pinned
memory counts as its own. Ids stay; the client keeps its own record of them.

All iommufds share the inode of /dev/iommu, so one can't be told from another. The minor number is given out at run time.
"""

from __future__ import annotations

from typing import ClassVar

from luod.handlers.character import Character


class Iommufd(Character):
    """iommufds."""

    kind: ClassVar[str] = "iommufd"
    compatible: ClassVar[str] = "iommufd-v1"
    drivers: ClassVar[tuple[str, ...]] = ("misc/iommu",)
