"""Guest RAM as a device sees it: memory slots mapped from QEMU's file descriptors.

This module uses three address spaces:

GPA
    guest-physical address, used by the guest's CPUs and by QEMU's dirty log.
HVA
    address in QEMU's own process, used by vhost-user for the rings (SET_VRING_ADDR).
IOVA
    address that the device puts on the bus. The driver writes IOVAs into descriptors, and a dirty
    tracker records them. Without a virtual IOMMU an IOVA equals the GPA.

`GuestMemory` holds the slots and is addressed by GPA. A `Bus` translates IOVAs to GPAs: it is an
`IovaMap`, or an `Iotlb` behind a virtual IOMMU. `GuestMemory` and `Bus` refuse an access of which
any byte is not mapped, before a byte is written.
"""

from __future__ import annotations

import ctypes
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from ._mapping import SharedMapping
from .errors import MemoryAccessError, ProtocolError
from .iova_bitmap import IovaRange
from .units import PAGE_BYTES

READ: Final = 1
WRITE: Final = 2
"""The access rights of a device, as bits: those of vhost's VHOST_ACCESS_RO, WO and RW."""

_ADDRESS_SPACE = 1 << 64


@dataclass(frozen=True)
class MemorySlot:
    """A contiguous range of guest RAM, backed by a file (vhost-user: one memory region)."""

    gpa: int
    """The guest-physical address of the slot."""
    length: int
    """The length of the slot in bytes."""
    hva: int
    """The slot's address in QEMU's process; 0 without QEMU."""
    file_offset: int
    """The byte of the file at which the slot begins."""
    device: int
    """The number of the file system of the file (`st_dev`)."""
    inode: int
    """The inode number of the file (`st_ino`)."""
    mapping: SharedMapping
    """The mapping of the file in this process."""
    bytes: memoryview
    """The bytes of the slot."""

    @property
    def end(self) -> int:
        """The first GPA after the slot."""
        return self.gpa + self.length

    @property
    def address(self) -> int:
        """The address of the slot in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))


def map_slot(fd: int, *, gpa: int, length: int, hva: int, file_offset: int) -> MemorySlot:
    """Map a part of a file as guest RAM.

    Args:
        fd: the file, which may be closed afterwards.
        gpa: the guest-physical address of the slot.
        length: the length of the slot in bytes.
        hva: the slot's address in QEMU's process; 0 without QEMU.
        file_offset: the byte of the file at which the slot begins.

    Returns:
        The slot.

    Raises:
        MemoryAccessError: the slot is empty, does not consist of whole 4 KiB pages, leaves the
            64-bit space or reaches beyond the file's end; or the file cannot be mapped.

    Example:
        >>> import os
        >>> fd = os.memfd_create("ram")
        >>> os.ftruncate(fd, 1 << 20)
        >>> memory = GuestMemory([map_slot(fd, gpa=0, length=1 << 20, hva=0, file_offset=0)])
        >>> os.close(fd)
        >>> memory.view(0x5000, 2)[:] = b"ok"
        >>> bytes(memory.view(0x5000, 2))
        b'ok'
    """
    name = f"memory slot GPA {gpa:#x} + {length:#x}"
    if length == 0 or gpa + length > _ADDRESS_SPACE or hva + length > _ADDRESS_SPACE:
        raise MemoryAccessError(f"{name}: empty, or leaves the 64-bit address space")
    if (gpa | length) % PAGE_BYTES:
        raise MemoryAccessError(f"{name}: expected whole pages of {PAGE_BYTES} bytes")
    status = os.fstat(fd)
    if file_offset + length > status.st_size:
        raise MemoryAccessError(
            f"{name}: needs bytes {file_offset:#x} to {file_offset + length:#x} of a file that has "
            f"only {status.st_size:#x} bytes"
        )
    try:
        mapping = SharedMapping(fd, length, file_offset)
    except OSError as error:
        raise MemoryAccessError(f"{name}: its file cannot be mapped: {error}") from error
    return MemorySlot(
        gpa=gpa,
        length=length,
        hva=hva,
        file_offset=file_offset,
        device=status.st_dev,
        inode=status.st_ino,
        mapping=mapping,
        bytes=memoryview(mapping),
    )


class GuestMemory:
    """The guest's RAM, addressed by guest-physical addresses (GPA).

    Args:
        slots: the memory slots, in any order.

    Raises:
        MemoryAccessError: two slots overlap.
    """

    def __init__(self, slots: Iterable[MemorySlot]) -> None:
        self.slots: tuple[MemorySlot, ...] = tuple(sorted(slots, key=lambda slot: slot.gpa))
        """The slots, in the order of their GPAs."""
        for low, high in zip(self.slots, self.slots[1:], strict=False):
            if low.end > high.gpa:
                raise MemoryAccessError(
                    f"memory slots overlap: GPA {low.gpa:#x} + {low.length:#x} reaches into the "
                    f"slot at {high.gpa:#x}"
                )
        self._starts = [slot.gpa for slot in self.slots]

    @property
    def end(self) -> int:
        """The first GPA after the highest slot; 0 without slots."""
        return self.slots[-1].end if self.slots else 0

    def check(self) -> None:
        """Check that the slots' files are still whole.

        Raises:
            ProtocolError: a file was truncated while it was mapped. Data read from the slot or
                written to it since then is void.
        """
        for slot in self.slots:
            if slot.mapping.lost:
                raise ProtocolError(
                    f"memory slot GPA {slot.gpa:#x} + {slot.length:#x}: its file was truncated, or "
                    "the host ran out of memory for it, while the slot was in use"
                )

    def view(self, gpa: int, length: int) -> memoryview:
        """Open a writable view on guest RAM.

        Args:
            gpa: the first guest-physical address.
            length: the number of bytes.

        Returns:
            The view. A write to it is neither journalled nor tracked; see `Dma.write`.

        Raises:
            MemoryAccessError: the bytes do not lie in one slot.
        """
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0:
            slot = self.slots[index]
            offset = gpa - slot.gpa
            if offset + length <= slot.length:
                return slot.bytes[offset : offset + length]
        raise MemoryAccessError(
            f"GPA {gpa:#x} + {length:#x} is not inside one memory slot ({self.describe()})"
        )

    def gpa_of_hva(self, hva: int, length: int) -> int:
        """Translate an address of QEMU's process.

        Args:
            hva: the first address.
            length: the number of bytes.

        Returns:
            The guest-physical address.

        Raises:
            MemoryAccessError: the bytes do not lie in one slot.
        """
        for slot in self.slots:
            if slot.hva <= hva and hva + length <= slot.hva + slot.length:
                return slot.gpa + hva - slot.hva
        raise MemoryAccessError(
            f"HVA {hva:#x} + {length:#x} is not inside one memory slot ({self.describe()})"
        )

    def describe(self) -> str:
        """Describe the slots in one line, for error messages."""
        if not self.slots:
            return "the guest has no slots"
        return "slots: " + ", ".join(f"{slot.gpa:#x}-{slot.end - 1:#x}" for slot in self.slots)


class IovaMapping(NamedTuple):
    """A range of IOVAs that leads to a range of guest RAM."""

    iova: int
    """The first IOVA."""
    gpa: int
    """The guest-physical address to which the first IOVA leads."""
    length: int
    """The number of bytes."""


class Bus(Protocol):
    """The translation of a device's accesses from IOVA to GPA."""

    @property
    def mappings(self) -> Sequence[IovaMapping]:
        """The current mappings, in the order of their IOVAs."""

    @property
    def ranges(self) -> Sequence[IovaRange]:
        """The IOVA ranges that a tracker has to watch; they contain every mapping."""

    def translate(self, iova: int, length: int, access: int = READ) -> list[tuple[int, int]]:
        """Translate a range of IOVAs.

        Args:
            iova: the first IOVA.
            length: the number of bytes.
            access: the access that the device wants, as bits: 1 to read and 2 to write.

        Returns:
            The (GPA, length in bytes) pieces that make up the range, in order.

        Raises:
            MemoryAccessError: some byte is not mapped, or not for `access`.
        """

    def require(
        self, readable: Iterable[tuple[int, int]], writable: Iterable[tuple[int, int]]
    ) -> None:
        """Check that all ranges of a request are mapped before any part of it is carried out.

        Args:
            readable: the (IOVA, length in bytes) ranges that will be read.
            writable: the (IOVA, length in bytes) ranges that will be written.

        Raises:
            IotlbMissError: a mapping is missing and has to be requested from the IOMMU.
        """


class IovaMap:
    """A `Bus` with fixed mappings.

    Args:
        mappings: the mappings, in any order.

    Raises:
        MemoryAccessError: two mappings overlap in IOVA.

    Example:
        >>> bus = IovaMap([IovaMapping(iova=0x10000, gpa=0x4000, length=0x2000)])
        >>> bus.translate(0x11000, 16)
        [(20480, 16)]
    """

    def __init__(self, mappings: Iterable[IovaMapping]) -> None:
        self.mappings: tuple[IovaMapping, ...] = tuple(sorted(mappings))
        """The mappings, in the order of their IOVAs."""
        for low, high in zip(self.mappings, self.mappings[1:], strict=False):
            if low.iova + low.length > high.iova:
                raise MemoryAccessError(
                    f"IOVA mappings overlap: {low.iova:#x} + {low.length:#x} reaches into the "
                    f"mapping at {high.iova:#x}"
                )
        self._starts = [mapping.iova for mapping in self.mappings]

    @classmethod
    def identity(cls, memory: GuestMemory) -> IovaMap:
        """Make the map of a guest without a virtual IOMMU, where every IOVA equals its GPA.

        Args:
            memory: the guest's RAM.

        Returns:
            A map with one mapping for each slot.
        """
        return cls(IovaMapping(slot.gpa, slot.gpa, slot.length) for slot in memory.slots)

    @property
    def ranges(self) -> Sequence[IovaRange]:
        """The mapped IOVA ranges, in order."""
        return [IovaRange(mapping.iova, mapping.length) for mapping in self.mappings]

    def translate(self, iova: int, length: int, access: int = READ) -> list[tuple[int, int]]:
        """Translate a range of IOVAs, as `Bus.translate`; every mapping may be read and written."""
        index = bisect_right(self._starts, iova) - 1
        if index >= 0:
            mapping = self.mappings[index]
            offset = iova - mapping.iova
            if offset + length <= mapping.length:
                return [(mapping.gpa + offset, length)]
        return list(self._pieces(iova, length))

    def require(
        self, readable: Iterable[tuple[int, int]], writable: Iterable[tuple[int, int]]
    ) -> None:
        """Do nothing: without an IOMMU, no mapping has to be requested."""

    def _pieces(self, iova: int, length: int) -> Iterator[tuple[int, int]]:
        position, end = iova, iova + length
        while position < end:
            index = bisect_right(self._starts, position) - 1
            mapping = self.mappings[index] if index >= 0 else None
            if mapping is None or position >= mapping.iova + mapping.length:
                raise MemoryAccessError(
                    f"IOVA {iova:#x} + {length:#x}: nothing is mapped at {position:#x}"
                )
            piece = min(end, mapping.iova + mapping.length) - position
            yield mapping.gpa + position - mapping.iova, piece
            position += piece
