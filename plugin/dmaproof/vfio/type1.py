"""The legacy way to VFIO: a container with type1 as its IOMMU, and groups of devices in it."""

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
    """An open /dev/vfio/vfio with type1 v2; it knows its own `mappings`, sorted.

    Raises:
        OSError: this kernel has no legacy container, or it may not be opened.
        TrackerError: it is none that we know.
    """

    def __init__(self, path: str = "/dev/vfio/vfio") -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self._groups: list[int] = []
        self.mappings: list[IovaRange] = []
        version = request(self.fd, abi.GET_API_VERSION)
        if version != _API_VERSION or not request(self.fd, abi.CHECK_EXTENSION, abi.TYPE1V2_IOMMU):
            self.close()
            raise TrackerError(f"{path} (API version {version}) has no type1 v2")

    def close(self) -> None:
        """Let go of everything. Twice is harmless."""
        for group in self._groups:
            os.close(group)
        self._groups = []
        super().close()

    def open_device(self, sysfs: Path) -> VfioDevice:
        """Open the device with the folder `sysfs`, through its group, which joins the container.

        Raises:
            OSError: the device is not bound to VFIO, or somebody else has its group.
            VfioError: the group is not viable, or has another container.
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
        """Let devices read and write `length` bytes of ours at `address` under `iova`.

        Raises:
            VfioError: it is mapped already, or not aligned.
        """
        flags = abi.MAP_READ | abi.MAP_WRITE
        size = abi.TYPE1_DMA_MAP.size
        data = abi.TYPE1_DMA_MAP.pack(size, flags, address, iova, length)
        request(self.fd, abi.IOMMU_MAP_DMA, bytearray(data))
        self.mappings = sorted((*self.mappings, IovaRange(iova, length)))

    def unmap(self, iova: int, length: int) -> None:
        """Take one mapping back.

        Raises:
            VfioError: the range cuts a mapping.
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
        """What is dirty of `length` bytes from `iova` on, and forget it.

        The range must be whole mappings, the page size the smallest one. Unlike the other
        interfaces, type1 overwrites `bits`.

        Raises:
            VfioError: one of these is not so, or tracking is not on.
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
