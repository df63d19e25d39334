"""VFIO's and iommufd's requests: numbers, structures, flags, and what each errno means.

The source is include/uapi/linux/vfio.h and iommufd.h of Linux 7.3; all of it is stable ABI.
Structures are little-endian with explicit padding. The explanations of an errno follow the kernel
functions that are named.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

VFIO_TYPE: Final = ord(";")
"""Both interfaces use this ioctl type; VFIO numbers start at 100, iommufd numbers at 0x80."""


@dataclass(frozen=True)
class Request:
    """An ioctl: its command `number`, and `rules`, which explain each errno."""

    name: str
    number: int
    rules: Mapping[int, str] = field(default_factory=dict)


def _vfio(name: str, number: int, **rules: str) -> Request:
    return _request(name, 100 + number, rules)


def _iommufd(name: str, number: int, **rules: str) -> Request:
    return _request(name, number, rules)


def _request(name: str, number: int, rules: Mapping[str, str]) -> Request:
    by_number = {getattr(errno, rule): text for rule, text in rules.items()}
    return Request(name, VFIO_TYPE << 8 | number, by_number)


# VFIO: container and group -----------------------------------------------------------------------

GET_API_VERSION: Final = _vfio("VFIO_GET_API_VERSION", 0)
CHECK_EXTENSION: Final = _vfio("VFIO_CHECK_EXTENSION", 1)
SET_IOMMU: Final = _vfio("VFIO_SET_IOMMU", 2, EINVAL="the container has no group")
GROUP_GET_STATUS: Final = _vfio("VFIO_GROUP_GET_STATUS", 3)
GROUP_SET_CONTAINER: Final = _vfio(
    "VFIO_GROUP_SET_CONTAINER", 4, EINVAL="the group already has a container"
)
GROUP_GET_DEVICE_FD: Final = _vfio(
    "VFIO_GROUP_GET_DEVICE_FD",
    6,
    ENODEV="the group has no device of this name",
    EINVAL="the group's container has no IOMMU set",
)
GROUP_STATUS: Final = Struct("<II")
GROUP_FLAGS_VIABLE: Final = 1

TYPE1V2_IOMMU: Final = 3
IOMMU_MAP_DMA: Final = _vfio(
    "VFIO_IOMMU_MAP_DMA",
    13,
    EEXIST="the range is already mapped",
    EINVAL="address, IOVA or length is not page-aligned, or the range is reserved",
    ENOSPC="there are more mappings than dma_entry_limit allows",
    ENOMEM="the locked-memory limit (RLIMIT_MEMLOCK) is reached",
)
TYPE1_DMA_MAP: Final = Struct("<IIQQQ")
MAP_READ: Final = 1
MAP_WRITE: Final = 2
IOMMU_UNMAP_DMA: Final = _vfio(
    "VFIO_IOMMU_UNMAP_DMA", 14, EINVAL="the range splits a mapping, or is not page-aligned"
)
TYPE1_DMA_UNMAP: Final = Struct("<IIQQ")
IOMMU_DIRTY_PAGES: Final = _vfio(
    "VFIO_IOMMU_DIRTY_PAGES",
    17,
    EINVAL="tracking was not started, the page size is not the smallest one, the bitmap has the "
    "wrong size (at most 2**31 pages), or the range splits a mapping",
    ENOENT="nothing is mapped in the range",
)
TYPE1_DIRTY_BITMAP: Final = Struct("<II")
TYPE1_DIRTY_BITMAP_GET: Final = Struct("<IIQQQQQ")
DIRTY_PAGES_START: Final = 1
DIRTY_PAGES_STOP: Final = 2
DIRTY_PAGES_GET: Final = 4

# VFIO: devices -----------------------------------------------------------------------------------

DEVICE_GET_INFO: Final = _vfio("VFIO_DEVICE_GET_INFO", 7)
DEVICE_INFO: Final = Struct("<IIIIII")
DEVICE_FLAGS_RESET: Final = 1
DEVICE_FLAGS_PCI: Final = 2
DEVICE_GET_REGION_INFO: Final = _vfio(
    "VFIO_DEVICE_GET_REGION_INFO", 8, EINVAL="the device has no region with this index"
)
REGION_INFO: Final = Struct("<IIIIQQ")
DEVICE_GET_IRQ_INFO: Final = _vfio(
    "VFIO_DEVICE_GET_IRQ_INFO", 9, EINVAL="the device has no interrupt with this index"
)
IRQ_INFO: Final = Struct("<IIII")
DEVICE_RESET: Final = _vfio("VFIO_DEVICE_RESET", 11, EINVAL="the device cannot be reset")
DEVICE_BIND_IOMMUFD: Final = _vfio(
    "VFIO_DEVICE_BIND_IOMMUFD",
    18,
    EINVAL="the device file is already bound, or another process has opened its group",
    EPERM="the platform cannot isolate interrupts (iommufd.allow_unsafe_interrupts)",
)
BIND_IOMMUFD: Final = Struct("<IIiI")
DEVICE_ATTACH_PT: Final = _vfio(
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT", 19, ENOENT="the IOAS or page table does not exist in iommufd"
)
ATTACH_PT: Final = Struct("<III")

DEVICE_FEATURE: Final = Struct("<II")
FEATURE_GET: Final = 1 << 16
FEATURE_SET: Final = 1 << 17
FEATURE_PROBE: Final = 1 << 18
MIG_GET_PRECOPY_INFO: Final = _vfio(
    "VFIO_MIG_GET_PRECOPY_INFO",
    21,
    EINVAL="the device is not in a PRE_COPY state",
    ENODEV="the data transfer of this file has ended",
)
PRECOPY_INFO: Final = Struct("<IIQQ")


class Feature(IntEnum):
    """`VFIO_DEVICE_FEATURE_…`"""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    MIG_DATA_SIZE = 9


FEATURE_RULES: Final[Mapping[Feature, Mapping[int, str]]] = {
    Feature.MIG_DEVICE_STATE: {
        errno.EINVAL: "the device cannot change between these migration states, or the loaded data "
        "is not a device state",
        errno.EIO: "the device failed, and stays in state ERROR until it is reset",
    },
    Feature.DMA_LOGGING_START: {
        errno.EINVAL: "no range is given, a range is not aligned to the page size, or two ranges "
        "overlap",
        errno.E2BIG: "there are more ranges than fit into a page (256 in 4 KiB)",
        errno.EOVERFLOW: "a range ends at 2**64 or beyond",
        errno.EBUSY: "logging was already started",
    },
    Feature.DMA_LOGGING_REPORT: {
        errno.EINVAL: "logging is not on, or the page size is below 4 KiB or not a power of two",
        errno.EOVERFLOW: "the range ends at 2**64 or beyond",
        errno.EFAULT: "the bitmap is not in writable memory",
        errno.EOPNOTSUPP: "the kernel was built without iova_bitmap (CONFIG_IOMMUFD_DRIVER)",
    },
}
"""`vfio_ioctl_device_feature_…` and `vfio_mig_get_next_state` of drivers/vfio/vfio_main.c."""

DATA_MIGRATION: Final = Struct("<Q")
DATA_MIG_STATE: Final = Struct("<Ii")
DATA_MIG_SIZE: Final = Struct("<Q")
DATA_LOGGING_CONTROL: Final = Struct("<QIIQ")
DATA_LOGGING_RANGE: Final = Struct("<QQ")
DATA_LOGGING_REPORT: Final = Struct("<QQQQ")


class MigrationFlag(IntFlag):
    """The capabilities of a device's migration."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


class MigrationState(IntEnum):
    """enum vfio_device_mig_state."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


# iommufd -----------------------------------------------------------------------------------------

DESTROY: Final = _iommufd(
    "IOMMU_DESTROY", 0x80, ENOENT="the object does not exist", EBUSY="the object is in use"
)
DESTROY_DATA: Final = Struct("<II")
IOAS_ALLOC: Final = _iommufd("IOMMU_IOAS_ALLOC", 0x81)
IOAS_ALLOC_DATA: Final = Struct("<III")
IOAS_MAP: Final = _iommufd(
    "IOMMU_IOAS_MAP",
    0x85,
    EEXIST="the range is already mapped",
    EINVAL="address, IOVA or length is not aligned as the IOAS requires, or the IOVA is reserved",
    EFAULT="the memory is not mapped in this process",
    EOVERFLOW="the range ends beyond 2**64",
)
IOAS_MAP_DATA: Final = Struct("<IIIIQQQ")
IOAS_MAP_FIXED: Final = 1
IOAS_MAP_WRITEABLE: Final = 2
IOAS_MAP_READABLE: Final = 4
IOAS_UNMAP: Final = _iommufd(
    "IOMMU_IOAS_UNMAP", 0x86, ENOENT="nothing is mapped in the range, or it splits a mapping"
)
IOAS_UNMAP_DATA: Final = Struct("<IIQQ")
OPTION: Final = _iommufd("IOMMU_OPTION", 0x87, EOPNOTSUPP="the option does not exist")
OPTION_DATA: Final = Struct("<IIHHIQ")
OPTION_HUGE_PAGES: Final = 1
HWPT_ALLOC: Final = _iommufd(
    "IOMMU_HWPT_ALLOC",
    0x89,
    EOPNOTSUPP="the IOMMU cannot track dirty pages, or not with these flags",
    ENOENT="the device or IOAS does not exist in iommufd",
)
HWPT_ALLOC_DATA: Final = Struct("<IIIIIIIIQII")
HWPT_DIRTY_TRACKING: Final = 2
HWPT_SET_DIRTY_TRACKING: Final = _iommufd(
    "IOMMU_HWPT_SET_DIRTY_TRACKING",
    0x8B,
    EOPNOTSUPP="the page table was not made with dirty tracking",
    ENOENT="the hardware page table does not exist",
)
SET_DIRTY_TRACKING_DATA: Final = Struct("<IIII")
DIRTY_TRACKING_ENABLE: Final = 1
HWPT_GET_DIRTY_BITMAP: Final = _iommufd(
    "IOMMU_HWPT_GET_DIRTY_BITMAP",
    0x8C,
    EINVAL="tracking is not on, the length is 0, or IOVA or length is not aligned to the page size "
    "and to the IOAS's alignment",
    EOVERFLOW="the range ends beyond 2**64",
    EOPNOTSUPP="the page table was not made with dirty tracking, or the flags are unknown",
    EFAULT="the bitmap is not in writable memory",
)
GET_DIRTY_BITMAP_DATA: Final = Struct("<IIIIQQQQ")
DIRTY_BITMAP_NO_CLEAR: Final = 1
