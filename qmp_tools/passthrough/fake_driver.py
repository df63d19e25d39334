"""A user-space VFIO driver of the fake device, as QEMU is one: on iommufd or a legacy container."""

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
from .outcome import NotSupportedError

MEMORY_BYTES: Final = 8 << 20
IOVA: Final = 1 << 32


@dataclass(frozen=True)
class FakeDriver:
    """An open fake device, and `memory` that is mapped for its DMA at the IOVAs of `window`."""

    fake: FakeDevice
    device: VfioDevice
    memory: NDArray[np.uint8]
    container: Container | None = None

    @property
    def window(self) -> IovaRange:
        """The IOVAs at which the memory is mapped."""
        return IovaRange(IOVA, len(self.memory))


@contextlib.contextmanager
def _memory() -> Iterator[NDArray[np.uint8]]:
    mapping = mmap.mmap(-1, MEMORY_BYTES)
    # With huge pages, one IOMMU entry would cover many pages, and a lost page could hide in it.
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    yield np.frombuffer(mapping, dtype=np.uint8)
    # Python unmaps the memory when the last array on it is freed.


def open_iommufd() -> Iommufd:
    """Open iommufd.

    Raises:
        NotSupportedError: this kernel has no iommufd.
    """
    try:
        return Iommufd()
    except FileNotFoundError as error:
        raise NotSupportedError(f"iommufd: {error}") from error


@contextlib.contextmanager
def iommufd_driver() -> Iterator[FakeDriver]:
    """Open a new fake device through its own file, attached to an I/O address space of iommufd."""
    with fake_device() as fake, _memory() as memory, open_iommufd() as iommufd:
        ioas = iommufd.alloc_ioas()
        iommufd.map(ioas, IOVA, address_of(memory), len(memory))
        with VfioDevice.open_cdev(fake.sysfs, iommufd) as device:
            device.attach(ioas)
            yield FakeDriver(fake, device, memory)


@contextlib.contextmanager
def container_driver() -> Iterator[FakeDriver]:
    """Open a new fake device through its IOMMU group, in a legacy container with type1."""
    with (
        fake_device() as fake,
        _memory() as memory,
        Container() as container,
        container.open_device(fake.sysfs) as device,
    ):
        container.map(IOVA, address_of(memory), len(memory))
        yield FakeDriver(fake, device, memory, container)


def any_driver() -> AbstractContextManager[FakeDriver]:
    """Open a new fake device on iommufd if the kernel has it, else in a legacy container."""
    return iommufd_driver() if Path(IOMMUFD_PATH).exists() else container_driver()


DRIVERS: Final[dict[str, Callable[[], AbstractContextManager[FakeDriver]]]] = {
    "iommufd": iommufd_driver,
    "container": container_driver,
}
"""By the interface through which they open the device."""
