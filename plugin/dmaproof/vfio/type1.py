"""The legacy VFIO interface: a container with type1 as its IOMMU, and groups of devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ..errors import TrackerError
from ..iova_bitmap import IovaRange
from . import abi
from .device import VfioDevice
from .requests import Bits, KernelFile, address_of, bitmap_for, request

_API_VERSION: Final = 0


class Container(KernelFile):
    """An open /dev/vfio/vfio with type1 v2; `mappings` are its mappings, sorted.

    Raises:
        OSError: this kernel has no legacy container, or the file cannot be opened.
        TrackerError: the container has an unknown API version or no type1 v2.
    """

    def __init__(self, path: str = "/dev/vfio/vfio") -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self._groups: list[int] = []
        self.mappings: list[IovaRange] = []
        version = request(self.fd, abi.GET_API_VERSION)
        if version != _API_VERSION or not request(self.fd, abi.CHECK_EXTENSION, abi.TYPE1V2_IOMMU):
            self.close()
            raise TrackerError(
                f"{path} (API version {version}) does not support VFIO_TYPE1v2_IOMMU of API "
                f"version {_API_VERSION}"
            )

    def close(self) -> None:
        """Close the container and its groups; a second call does nothing."""
        for group in self._groups:
            os.close(group)
        self._groups = []
        super().close()

    def open_device(self, sysfs: Path) -> VfioDevice:
        """Open the device with the sysfs folder `sysfs`, and add its group to the container.

        Raises:
            OSError: the device is not bound to VFIO, or another process has opened its group.
            TrackerError: the group is not viable.
            VfioError: the group already has a container.
        """
        number = (sysfs / "iommu_group").resolve().name
        group = os.open(f"/dev/vfio/{number}", os.O_RDWR | os.O_CLOEXEC)
        first = not self._groups
        self._groups.append(group)
        status = bytearray(abi.GROUP_STATUS.pack(abi.GROUP_STATUS.size, 0))
        request(group, abi.GROUP_GET_STATUS, status)
        if not abi.GROUP_STATUS.unpack(status)[1] & abi.GROUP_FLAGS_VIABLE:
            raise TrackerError(
                f"IOMMU group {number} is not viable: bind all of its devices to VFIO"
            )
        request(group, abi.GROUP_SET_CONTAINER, bytearray(self.fd.to_bytes(4, "little")))
        if first:
            request(self.fd, abi.SET_IOMMU, abi.TYPE1V2_IOMMU)
        name = bytearray(sysfs.name.encode() + b"\0")
        return VfioDevice(request(group, abi.GROUP_GET_DEVICE_FD, name))

    def map(self, iova: int, address: int, length: int) -> None:
        """Map `length` bytes of this process at `address` to `iova`, readable and writable.

        Raises:
            VfioError: the range is already mapped or not aligned.
        """
        flags = abi.MAP_READ | abi.MAP_WRITE
        size = abi.TYPE1_DMA_MAP.size
        data = abi.TYPE1_DMA_MAP.pack(size, flags, address, iova, length)
        request(self.fd, abi.IOMMU_MAP_DMA, bytearray(data))
        self.mappings = sorted((*self.mappings, IovaRange(iova, length)))

    def unmap(self, iova: int, length: int) -> None:
        """Remove one mapping.

        Raises:
            VfioError: the range splits a mapping.
        """
        size = abi.TYPE1_DMA_UNMAP.size
        request(
            self.fd, abi.IOMMU_UNMAP_DMA, bytearray(abi.TYPE1_DMA_UNMAP.pack(size, 0, iova, length))
        )
        self.mappings.remove(IovaRange(iova, length))

    def set_dirty_tracking(self, enable: bool) -> None:
        """Start or stop tracking in the whole container."""
        flag = abi.DIRTY_PAGES_START if enable else abi.DIRTY_PAGES_STOP
        data = abi.TYPE1_DIRTY_BITMAP.pack(abi.TYPE1_DIRTY_BITMAP.size, flag)
        request(self.fd, abi.IOMMU_DIRTY_PAGES, bytearray(data))

    def get_dirty_bitmap(
        self, iova: int, length: int, page_size: int, bits: Bits | None = None
    ) -> Bits:
        """Read and clear the dirty pages of `length` bytes from `iova` on.

        The range must consist of whole mappings, and the page size must be the smallest one. Unlike
        the other interfaces, type1 overwrites `bits`.

        Raises:
            VfioError: the range or the page size is invalid, or tracking is not on.
        """
        bits = bitmap_for(length, page_size) if bits is None else bits
        data = abi.TYPE1_DIRTY_BITMAP_GET.pack(
            abi.TYPE1_DIRTY_BITMAP_GET.size,
            abi.DIRTY_PAGES_GET,
            iova,
            length,
            page_size,
            bits.nbytes,
            address_of(bits),
        )
        request(self.fd, abi.IOMMU_DIRTY_PAGES, bytearray(data))
        return bits
