"""A VFIO device: its regions, its migration and its DMA logging."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import TrackerError
from ..iova_bitmap import IovaRange
from . import abi
from .abi import Feature, MigrationFlag, MigrationState
from .iommufd import Iommufd
from .requests import Bits, KernelFile, VfioError, address_of, bitmap_for, feature, request


@dataclass(frozen=True)
class Region:
    """A part of the device's file: `size` bytes from `offset` on."""

    index: int
    offset: int
    size: int


class VfioDevice(KernelFile):
    """An open device; closing it resets it.

    `number` is iommufd's number of the device, if the device is bound to an iommufd. The number of
    an emulated device cannot be used to make a page table.
    """

    def __init__(self, fd: int, number: int | None = None) -> None:
        super().__init__(fd)
        self.number = number

    @classmethod
    def open_cdev(cls, sysfs: Path, iommufd: Iommufd) -> VfioDevice:
        """Open the VFIO device file of the sysfs folder `sysfs`, and bind it to `iommufd`.

        Raises:
            TrackerError: the device is not bound to VFIO, or the kernel has no device files.
            OSError: the device file cannot be opened.
            VfioError: the device file is already bound.
        """
        names = sorted(sysfs.glob("vfio-dev/vfio*"))
        if not names:
            raise TrackerError(
                f"{sysfs} has no VFIO device file: bind it to a VFIO driver; the kernel needs "
                "CONFIG_VFIO_DEVICE_CDEV (6.6 or newer)"
            )
        fd = os.open(f"/dev/vfio/devices/{names[0].name}", os.O_RDWR | os.O_CLOEXEC)
        data = bytearray(abi.BIND_IOMMUFD.pack(abi.BIND_IOMMUFD.size, 0, iommufd.fd, 0))
        try:
            request(fd, abi.DEVICE_BIND_IOMMUFD, data)
        except VfioError:
            os.close(fd)
            raise
        return cls(fd, int(abi.BIND_IOMMUFD.unpack(data)[3]))

    def attach(self, page_table: int) -> None:
        """Attach the device to an IOAS or a hardware page table of its iommufd.

        Raises:
            VfioError: the page table does not exist, or does not fit the device.
        """
        data = abi.ATTACH_PT.pack(abi.ATTACH_PT.size, 0, page_table)
        request(self.fd, abi.DEVICE_ATTACH_PT, bytearray(data))

    # Regions ------------------------------------------------------------------------------------

    def region(self, index: int) -> Region:
        """Return the place of region `index` in the device's file; size 0 if it is unimplemented.

        Raises:
            VfioError: the device has no region with this index.
        """
        data = bytearray(abi.REGION_INFO.pack(abi.REGION_INFO.size, 0, index, 0, 0, 0))
        request(self.fd, abi.DEVICE_GET_REGION_INFO, data)
        *_, size, offset = abi.REGION_INFO.unpack(data)
        return Region(index, offset, size)

    def info(self) -> tuple[int, int, int]:
        """Return (flags, number of regions, number of interrupt indexes)."""
        data = bytearray(abi.DEVICE_INFO.pack(abi.DEVICE_INFO.size, 0, 0, 0, 0, 0))
        request(self.fd, abi.DEVICE_GET_INFO, data)
        _, flags, regions, irqs, _, _ = abi.DEVICE_INFO.unpack(data)
        return flags, regions, irqs

    def read(self, region: Region, offset: int, length: int) -> bytes:
        """Read from a region."""
        return os.pread(self.fd, length, region.offset + offset)

    def write(self, region: Region, offset: int, data: bytes) -> None:
        """Write to a region."""
        os.pwrite(self.fd, data, region.offset + offset)

    def reset(self) -> None:
        """Reset the device: it then runs, without data transfers and logs.

        Raises:
            VfioError: the device cannot be reset.
        """
        request(self.fd, abi.DEVICE_RESET)

    # Migration ----------------------------------------------------------------------------------

    def migration(self) -> MigrationFlag:
        """Return what the device's migration supports; no flags if it cannot migrate."""
        try:
            data = feature(self.fd, Feature.MIGRATION, abi.FEATURE_GET, bytes(8))
        except VfioError:
            return MigrationFlag(0)
        return MigrationFlag(abi.DATA_MIGRATION.unpack(data)[0])

    @property
    def state(self) -> MigrationState:
        """The device's migration state."""
        data = feature(self.fd, Feature.MIG_DEVICE_STATE, abi.FEATURE_GET, bytes(8))
        return MigrationState(abi.DATA_MIG_STATE.unpack(data)[0])

    def set_state(self, state: MigrationState) -> int | None:
        """Move the device to `state`, through the intermediate states.

        Returns the file descriptor of the data transfer that begins in that state, or None. The
        caller closes the file descriptor.

        Raises:
            VfioError: the state cannot be reached, or the device failed.
        """
        data = feature(
            self.fd, Feature.MIG_DEVICE_STATE, abi.FEATURE_SET, abi.DATA_MIG_STATE.pack(state, -1)
        )
        fd = int(abi.DATA_MIG_STATE.unpack(data)[1])
        return fd if fd >= 0 else None

    def stop_copy_bytes(self) -> int:
        """Return the device's estimate of the bytes of state to transfer."""
        data = feature(self.fd, Feature.MIG_DATA_SIZE, abi.FEATURE_GET, bytes(8))
        return int(abi.DATA_MIG_SIZE.unpack(data)[0])

    # DMA logging --------------------------------------------------------------------------------

    def can_log(self) -> bool:
        """Return whether the device can log its DMA."""
        try:
            feature(self.fd, Feature.DMA_LOGGING_START, abi.FEATURE_SET | abi.FEATURE_PROBE)
        except VfioError:
            return False
        return True

    def start_logging(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        """Start to log DMA into `ranges`, and return the page size that the device uses.

        Raises:
            VfioError: the ranges or the page size are invalid, or logging is already on.
        """
        packed = bytearray().join(abi.DATA_LOGGING_RANGE.pack(*iova_range) for iova_range in ranges)
        array = np.frombuffer(packed or bytearray(1), dtype=np.uint8)
        data = abi.DATA_LOGGING_CONTROL.pack(page_size, len(ranges), 0, address_of(array))
        answer = feature(self.fd, Feature.DMA_LOGGING_START, abi.FEATURE_SET, data)
        return int(abi.DATA_LOGGING_CONTROL.unpack(answer)[0])

    def stop_logging(self) -> None:
        """Stop logging and discard the log."""
        feature(self.fd, Feature.DMA_LOGGING_STOP, abi.FEATURE_SET)

    def report(self, iova: int, length: int, page_size: int, bits: Bits | None = None) -> Bits:
        """Read and clear the pages that the device wrote in `length` bytes from `iova` on.

        Bit n of the uint64 words is the n-th page from `iova` on. The kernel ORs into `bits`, if
        given. After an error the caller must treat all pages as dirty, since the log may be
        corrupt.

        Raises:
            VfioError: logging is not on, or the page size is invalid.
        """
        bits = bitmap_for(length, page_size) if bits is None else bits
        data = abi.DATA_LOGGING_REPORT.pack(iova, length, page_size, address_of(bits))
        feature(self.fd, Feature.DMA_LOGGING_REPORT, abi.FEATURE_GET, data)
        return bits


def precopy_bytes(data_fd: int) -> tuple[int, int]:
    """Return the (initial, dirty) bytes that a data transfer offers in PRE_COPY.

    Raises:
        VfioError: the device is not in a PRE_COPY state.
    """
    data = bytearray(abi.PRECOPY_INFO.pack(abi.PRECOPY_INFO.size, 0, 0, 0))
    request(data_fd, abi.MIG_GET_PRECOPY_INFO, data)
    _, _, initial, dirty = abi.PRECOPY_INFO.unpack(data)
    return initial, dirty
