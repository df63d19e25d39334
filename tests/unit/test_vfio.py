"""The kernel's interfaces without a kernel: structures against its headers, errors, trackers."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from struct import Struct

import numpy as np
import pytest

from dmaproof.dirty_tracker import DirtyTracker
from dmaproof.errors import TrackerError
from dmaproof.iova_bitmap import IovaBitmap, IovaRange
from dmaproof.units import PAGE_BYTES as PAGE
from dmaproof.vfio import abi
from dmaproof.vfio.abi import MigrationState, Request
from dmaproof.vfio.device import VfioDevice, precopy_bytes
from dmaproof.vfio.iommufd import Iommufd
from dmaproof.vfio.requests import Bits, VfioError, bitmap_for, request
from dmaproof.vfio.trackers import DmaLogging, HwptTracker, Type1Tracker
from dmaproof.vfio.type1 import Container

IOMMUFD_SIZES: list[tuple[Struct, int]] = [
    (abi.DESTROY_DATA, 8),
    (abi.IOAS_ALLOC_DATA, 12),
    (abi.IOAS_MAP_DATA, 40),
    (abi.IOAS_UNMAP_DATA, 24),
    (abi.OPTION_DATA, 24),
    (abi.HWPT_ALLOC_DATA, 48),
    (abi.SET_DIRTY_TRACKING_DATA, 16),
    (abi.GET_DIRTY_BITMAP_DATA, 48),
    (abi.BIND_IOMMUFD, 16),
    (abi.ATTACH_PT, 12),
    (abi.PRECOPY_INFO, 24),
    (abi.TYPE1_DIRTY_BITMAP_GET, 8 + 40),
]
"""Definitions missing from older kernels' headers, from those of Linux 7.3."""


@pytest.mark.parametrize(("structure", "size"), IOMMUFD_SIZES)
def test_structures_have_the_kernels_sizes(structure: Struct, size: int) -> None:
    assert structure.size == size


def test_iommufd_requests_have_the_kernels_numbers() -> None:
    assert abi.HWPT_GET_DIRTY_BITMAP.number == 0x3B8C
    assert abi.HWPT_SET_DIRTY_TRACKING.number == 0x3B8B
    assert abi.IOAS_MAP.number == 0x3B85
    assert abi.DEVICE_BIND_IOMMUFD.number == 0x3B00 | 118
    assert abi.DEVICE_ATTACH_PT.number == 0x3B00 | 119


def test_a_refusal_names_request_errno_and_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, number: int, data: object) -> int:
        raise OSError(errno.E2BIG, "Argument list too long")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with pytest.raises(VfioError, match=r"DMA_LOGGING_START: E2BIG: .*256") as caught:
        VfioDevice(-1).start_logging([IovaRange(0, PAGE)], PAGE)
    assert caught.value.number == errno.E2BIG


def test_a_file_that_is_not_a_device_is_reported() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(VfioError, match="ENOTTY: this kernel or this device does not know"):
            request(fd, abi.HWPT_GET_DIRTY_BITMAP, bytearray(48))
        assert not VfioDevice(fd).can_log()
        assert not VfioDevice(fd).migration()
        with pytest.raises(VfioError):
            precopy_bytes(fd)
    finally:
        os.close(fd)


def test_every_explained_errno_exists() -> None:
    requests = [value for value in vars(abi).values() if isinstance(value, Request)]
    assert len(requests) > 20
    for rules in (*(known.rules for known in requests), *abi.FEATURE_RULES.values()):
        assert all(number in errno.errorcode and text for number, text in rules.items())


def test_a_device_that_is_not_bound_to_vfio_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match="bind it to a VFIO driver"):
        VfioDevice.open_cdev(tmp_path, Iommufd("/dev/null"))


def test_start_logging_passes_ranges_and_returns_the_page_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []

    def answer(fd: int, number: int, data: bytearray) -> int:
        seen.append(abi.DATA_LOGGING_CONTROL.unpack_from(data, abi.DEVICE_FEATURE.size))
        abi.DATA_LOGGING_CONTROL.pack_into(data, abi.DEVICE_FEATURE.size, 2 * PAGE, 2, 0, 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", answer)
    ranges = [IovaRange(0, PAGE), IovaRange(4 * PAGE, PAGE)]
    assert VfioDevice(-1).start_logging(ranges, PAGE) == 2 * PAGE
    assert seen[0][:3] == (PAGE, 2, 0)


def test_set_state_returns_the_data_transfers_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(fd: int, number: int, data: bytearray) -> int:
        abi.DATA_MIG_STATE.pack_into(data, abi.DEVICE_FEATURE.size, MigrationState.PRE_COPY, 17)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", answer)
    assert VfioDevice(-1).set_state(MigrationState.PRE_COPY) == 17
    assert VfioDevice(-1).state is MigrationState.PRE_COPY


# Trackers, on a simulated kernel ----------------------------------------------------------------


class Kernel:
    """A simulated kernel's dirty pages, read and cleared by whole pages.

    `mappings` are those of type1: a range that splits one is refused, as by type1.
    """

    def __init__(self, mappings: Sequence[IovaRange] = ()) -> None:
        self.dirty: set[int] = set()
        self.on = False
        self.mappings = list(mappings)
        self.clears_too_much = False

    def read(self, iova: int, length: int, page_size: int) -> Bits:
        assert self.on
        assert iova % page_size == length % page_size == 0
        if self.mappings:
            assert IovaRange(iova, length) in self.mappings, "EINVAL: the range splits a mapping"
        bits = bitmap_for(length, page_size)
        first = iova // page_size
        for page in sorted(self.dirty):
            if first <= page < first + length // page_size:
                bits[(page - first) // 64] |= np.uint64(1 << (page - first) % 64)
                self.dirty.discard(page)
        if self.clears_too_much:
            self.dirty.clear()
        return bits


class SimulatedDevice(VfioDevice):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__(-1)
        self.kernel = kernel

    def start_logging(self, ranges: Sequence[IovaRange], page_size: int) -> int:
        self.kernel.on = True
        return page_size

    def stop_logging(self) -> None:
        self.kernel.on = False

    def report(self, iova: int, length: int, page_size: int, bits: Bits | None = None) -> Bits:
        return self.kernel.read(iova, length, page_size)


class SimulatedIommufd(Iommufd):
    def __init__(self, kernel: Kernel) -> None:
        self.fd = -1
        self.kernel = kernel

    def set_dirty_tracking(self, hwpt: int, enable: bool) -> None:
        self.kernel.on = enable

    def get_dirty_bitmap(
        self,
        hwpt: int,
        iova: int,
        length: int,
        page_size: int,
        *,
        clear: bool = True,
        bits: Bits | None = None,
    ) -> Bits:
        return self.kernel.read(iova, length, page_size)


class SimulatedContainer(Container):
    def __init__(self, kernel: Kernel) -> None:
        self.fd = -1
        self._groups = []
        self.mappings = kernel.mappings
        self.kernel = kernel

    def set_dirty_tracking(self, enable: bool) -> None:
        self.kernel.on = enable

    def get_dirty_bitmap(
        self, iova: int, length: int, page_size: int, bits: Bits | None = None
    ) -> Bits:
        return self.kernel.read(iova, length, page_size)


RANGES = [IovaRange(0, 100 * PAGE), IovaRange(1 << 32, 300 * PAGE)]


def simulated(name: str) -> tuple[Kernel, DirtyTracker]:
    if name == "type1":
        kernel = Kernel(RANGES)
        return kernel, Type1Tracker(SimulatedContainer(kernel))
    kernel = Kernel()
    if name == "hwpt":
        return kernel, HwptTracker(SimulatedIommufd(kernel), 1)
    return kernel, DmaLogging(SimulatedDevice(kernel))


def collect(tracker: DirtyTracker, pieces: Sequence[IovaRange]) -> set[int]:
    """Return the pages that the tracker reports for `pieces`."""
    reported: set[int] = set()
    for iova, length in pieces:
        bits = bitmap_for(length + PAGE, PAGE)
        with IovaBitmap(iova, length, PAGE, bits) as bitmap:
            tracker.read_and_clear(bitmap, iova, length)
            for dirty in bitmap.ranges():
                last = (dirty.iova + dirty.length - 1) // PAGE
                reported.update(range(dirty.iova // PAGE, last + 1))
    return reported


def cut(choose: random.Random, whole: IovaRange, pieces: int) -> list[IovaRange]:
    """Split `whole` into unaligned pieces."""
    edges = sorted(
        {0, whole.length, *(choose.randrange(1, whole.length) for _ in range(pieces - 1))}
    )
    return [IovaRange(whole.iova + low, high - low) for low, high in pairwise(edges)]


@pytest.mark.parametrize("name", ["dma-logging", "hwpt", "type1"])
def test_no_page_is_lost_whatever_range_is_read(name: str) -> None:
    choose = random.Random(7)
    kernel, tracker = simulated(name)
    assert tracker.start(RANGES, PAGE) == PAGE
    everywhere = [
        page for whole in RANGES for page in range(whole.iova // PAGE, sum(whole) // PAGE)
    ]
    for _ in range(50):
        written = set(choose.sample(everywhere, 40))
        kernel.dirty |= written
        asked = [piece for whole in RANGES for piece in cut(choose, whole, choose.randint(1, 6))]
        choose.shuffle(asked)
        reported = collect(tracker, asked)
        assert written <= reported
        # Pages that two pieces share may be reported again, but no page is reported unwritten.
        assert collect(tracker, RANGES) <= reported | written
        assert not collect(tracker, RANGES)
    tracker.stop()
    assert not kernel.on


def test_bits_that_the_kernel_loses_are_missing_in_the_bitmap() -> None:
    kernel, tracker = simulated("dma-logging")
    tracker.start(RANGES, PAGE)
    kernel.clears_too_much = True
    kernel.dirty = {1, (1 << 32) // PAGE}
    assert collect(tracker, RANGES) != {1, (1 << 32) // PAGE}


@pytest.mark.parametrize("name", ["dma-logging", "hwpt", "type1"])
def test_calls_in_the_wrong_order_are_refused(name: str) -> None:
    kernel, tracker = simulated(name)
    with pytest.raises(TrackerError, match="not tracking: call start first"):
        collect(tracker, RANGES)
    tracker.stop()
    tracker.start(RANGES, PAGE)
    with pytest.raises(TrackerError, match="already"):
        tracker.start(RANGES, PAGE)
    kernel.dirty = {3}
    tracker.stop()
    tracker.start(RANGES, PAGE)
    assert collect(tracker, RANGES) == {3}  # from the kernel, not from the tracker before the stop
