"""The bare guest's virtqueue driver for tests: guests/bare, compiled for this machine.

The driver uses pointers as guest-physical addresses, so the guest-physical address of guest RAM is
its address in this process.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from dmaproof.guest_memory import GuestMemory
from dmaproof.virtqueue import RingAddresses, Segment
from qmp_tools.guest.build import compile_c, sources
from qmp_tools.testbed.ring_driver import PAGE, WRITE, guest_memory, ram_fd

RAM_BYTES: Final = 128 * PAGE
DATA: Final = 64 * PAGE
"""The offset from which RAM is not the driver's own."""
GAVE_UP: Final = -2


class _Piece(ctypes.Structure):
    """struct piece of virtqueue.h."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("length", ctypes.c_uint32),
        ("flags", ctypes.c_uint16),
    )


def build(folder: Path) -> ctypes.CDLL:
    """Compile the driver for tests."""
    target = folder / "bare_ring.so"
    names = ("virtqueue", "split_ring", "packed_ring")
    files = [Path(__file__).with_suffix(".c"), *(sources() / f"bare/{name}.c" for name in names)]
    options = ("-std=gnu11", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    compile_c(files, target, *options)
    library = ctypes.CDLL(str(target))
    library.ring_open.restype = ctypes.c_void_p
    library.ring_open.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint16, ctypes.c_uint)
    ]
    library.ring_areas.argtypes = [ctypes.c_void_p, ctypes.c_uint64 * 3]
    library.virtqueue_submit.restype = ctypes.c_bool
    library.virtqueue_submit.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
    ]
    library.ring_poll.argtypes = [ctypes.c_void_p]
    library.virtqueue_reset.argtypes = [ctypes.c_void_p]
    return library


class BareRing:
    """The driver's side of a ring in `memory`, which is at GPA `start`.

    Raises:
        ValueError: the ring is too small for so many places.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        memory: GuestMemory,
        start: int,
        features: int,
        size: int,
        places: int,
    ) -> None:
        self.memory = memory
        self.start = start
        self._library = library
        self._queue = library.ring_open(start, features, size, places)
        if not self._queue:
            raise ValueError(f"{size} descriptors are too few for {places} places")
        areas = (ctypes.c_uint64 * 3)()
        library.ring_areas(self._queue, areas)
        self.addresses = RingAddresses(*areas)

    def submit(self, place: int, readable: Sequence[Segment], writable: Sequence[Segment]) -> bool:
        """Make a request available; return whether the device wants a notification."""
        flagged = [_Piece(*segment, 0) for segment in readable]
        flagged += [_Piece(*segment, WRITE) for segment in writable]
        pieces = (_Piece * len(flagged))(*flagged)
        kick: bool = self._library.virtqueue_submit(self._queue, place, pieces, len(pieces))
        return kick

    def reset(self) -> None:
        """Empty the ring, whose device was reset."""
        self._library.virtqueue_reset(self._queue)

    def poll(self) -> int:
        """Return a place whose request is finished, -1 if there is none, or `GAVE_UP`."""
        place: int = self._library.ring_poll(self._queue)
        return place


@contextmanager
def guest_ram() -> Iterator[tuple[GuestMemory, int]]:
    """Make guest RAM; yield it and its GPA, which is the address of its mapping."""
    with ram_fd(RAM_BYTES) as fd, mmap.mmap(fd, RAM_BYTES) as mapping:
        anchor = ctypes.c_char.from_buffer(mapping)
        start = ctypes.addressof(anchor)
        try:
            yield guest_memory(fd, (start, RAM_BYTES, 0)), start
        finally:
            del anchor  # it would keep the mapping from being closed
