"""What all vhost devices of the kernel have in common: memory, log, features, rings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Self

from dmaproof.errors import WaitTimeoutError
from dmaproof.units import PAGE_BYTES
from dmaproof.vfio.requests import address_of

from ..outcome import NotSupportedError
from .abi import ADDRESSES, FILE, STATE, U64, VRING_LOG, Feature, Ioctl, ioctl, update_iotlb
from .memory import GuestMemory
from .ring import Ring

_POLL_S = 0.001


class VhostDevice:
    """An open vhost device, which this process owns."""

    def __init__(self, path: str, memory: GuestMemory, features: Iterable[Feature]) -> None:
        """Open the device, and give it memory, log and features.

        Raises:
            NotSupportedError: the kernel does not have the device or a feature.
        """
        wanted = {*features, Feature.VERSION_1}
        if memory.iotlb:
            wanted.add(Feature.ACCESS_PLATFORM)
        try:
            self.fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise NotSupportedError(str(error)) from None
        self._files: list[int] = [self.fd]
        self._kicks: dict[int, int] = {}
        try:
            self._set_up(path, memory, wanted)
        except BaseException:
            self.close()
            raise

    def _set_up(self, path: str, memory: GuestMemory, wanted: set[Feature]) -> None:
        self.request(Ioctl.SET_OWNER)
        (offered,) = U64.unpack(self.request(Ioctl.GET_FEATURES, U64.pack(0)))
        if missing := sorted(bit.name for bit in wanted if not offered >> bit & 1):
            raise NotSupportedError(f"{path} does not offer {', '.join(missing)}")
        self.request(Ioctl.SET_MEM_TABLE, memory.table())
        self.request(Ioctl.SET_LOG_BASE, U64.pack(address_of(memory.log)))
        self.set_features(wanted)
        self._memory = memory
        if memory.iotlb:
            for bus, address in memory.mappings():
                update_iotlb(self.fd, bus, PAGE_BYTES, address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the device and its files."""
        while self._files:
            os.close(self._files.pop())

    def request(self, request: Ioctl, data: bytes = b"") -> bytes:
        """Make a request to the device."""
        return ioctl(self.fd, request, data)

    def set_features(self, features: Iterable[Feature]) -> None:
        """Acknowledge features."""
        self.request(Ioctl.SET_FEATURES, U64.pack(sum(1 << bit for bit in features)))

    def add_ring(self, index: int, ring: Ring, *, logged: bool = True) -> None:
        """Give the device a ring; `logged` is whether it logs what it writes to the used ring."""
        layout = ring.layout
        place = self._memory.ring_address
        kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self._files += [kick, call]
        self._kicks[index] = kick
        self.request(Ioctl.SET_VRING_NUM, STATE.pack(index, layout.size))
        self.request(Ioctl.SET_VRING_BASE, STATE.pack(index, ring.start))
        addresses = (place(layout.descriptors), place(layout.used), place(layout.avail))
        flags = VRING_LOG if logged else 0
        self.request(Ioctl.SET_VRING_ADDR, ADDRESSES.pack(index, flags, *addresses, layout.used))
        self.request(Ioctl.SET_VRING_KICK, FILE.pack(index, kick))
        self.request(Ioctl.SET_VRING_CALL, FILE.pack(index, call))

    def kick(self, index: int) -> None:
        """Notify the device of new chains in a ring."""
        os.eventfd_write(self._kicks[index], 1)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Wait until a condition holds.

    Raises:
        WaitTimeoutError: it does not hold within `timeout_s`; the message says `what`.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise WaitTimeoutError(f"the device has not {what} within {timeout_s:g} s")
        time.sleep(_POLL_S)
