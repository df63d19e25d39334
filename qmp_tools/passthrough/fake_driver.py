"""A process that owns the fake device, as QEMU would: by iommufd, or by the legacy container."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof.iova_bitmap import IovaRange
from dmaproof.vfio.device import VfioDevice
from dmaproof.vfio.iommufd import PATH as IOMMUFD_PATH
from dmaproof.vfio.iommufd import Iommufd
from dmaproof.vfio.requests import address_of
from dmaproof.vfio.type1 import Container

from .fake_device import FakeDevice, fake_device
from .outcome import LackingError

MEMORY_BYTES: Final = 8 << 20
IOVA: Final = 1 << 32


@dataclass(frozen=True)
class FakeDriver:
    """The device, and `memory` that it can write under the IOVAs of `window`."""

    fake: FakeDevice
    device: VfioDevice
    memory: NDArray[np.uint8]
    container: Container | None = None

    @property
    def window(self) -> IovaRange:
        """The IOVAs of the memory."""
        return IovaRange(IOVA, len(self.memory))


@contextlib.contextmanager
def _memory() -> Iterator[NDArray[np.uint8]]:
    mapping = mmap.mmap(-1, MEMORY_BYTES)
    # With huge pages an IOMMU's entries would be coarse, and hide losses.
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    yield np.frombuffer(mapping, dtype=np.uint8)
    # Unmapped when the last view is gone.


def open_iommufd() -> Iommufd:
    """iommufd.

    Raises:
        LackingError: this kernel has none.
    """
    try:
        return Iommufd()
    except FileNotFoundError as error:
        raise LackingError(f"iommufd: {error}") from error


@contextlib.contextmanager
def by_iommufd() -> Iterator[FakeDriver]:
    """Through the device's own file and an I/O address space."""
    with fake_device() as fake, _memory() as memory, open_iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        iommufd.map(ioas, IOVA, address_of(memory), len(memory))
        with VfioDevice.open_cdev(fake.sysfs, iommufd) as device:
            device.attach(ioas)
            yield FakeDriver(fake, device, memory)


@contextlib.contextmanager
def by_container() -> Iterator[FakeDriver]:
    """Through the device's group and a container with type1."""
    with (
        fake_device() as fake,
        _memory() as memory,
        Container() as container,
        container.open_device(fake.sysfs) as device,
    ):
        container.map(IOVA, address_of(memory), len(memory))
        yield FakeDriver(fake, device, memory, container)


def by_either() -> AbstractContextManager[FakeDriver]:
    """By iommufd, or where the kernel has none by the container."""
    return by_iommufd() if Path(IOMMUFD_PATH).exists() else by_container()


OWNERS: Final[dict[str, Callable[[], AbstractContextManager[FakeDriver]]]] = {
    "iommufd": by_iommufd,
    "container": by_container,
}
