"""Memory of virtio-mem in L2, which QEMU maps for vfio-pci block by block.

Only a driver of the guest can plug such memory. L2 has no guest system, so this module is the
driver. It reaches the device through QEMU's human monitor, which reads and writes I/O ports.
Through these ports it reaches the PCI configuration space, and through that the device's registers,
without a mapped BAR (VIRTIO_PCI_CAP_PCI_CFG; virtio 1.2, section 4.1.4.9). The ring is in L2's RAM.

The memory has blocks that are not plugged before and after the plugged ones.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from dmaproof.errors import UntestableError, WaitTimeoutError

from ..host.timeout import wait_until
from ..memory.ram import RamFile
from ..qemu.qemu import SocketQemu

BACKEND: Final = "plugged"
FIRST: Final = 4 << 30
"""The guest-physical address of the device's memory: where a q35 has memory devices."""
BYTES: Final = 16 << 20
PLUGGED_FIRST: Final = FIRST + (4 << 20)
PLUGGED_BYTES: Final = 8 << 20
_BLOCK_BYTES: Final = 2 << 20
_SLOT: Final = 3
_RING: Final = 4 << 20
"""Where the ring and the request are in RAM: no device of a plan writes there."""
_DESCRIPTORS, _AVAILABLE, _USED, _REQUEST, _RESPONSE = (_RING + n * 256 for n in range(5))

_CONFIG_ADDRESS_PORT: Final = 0xCF8
_CONFIG_DATA_PORT: Final = 0xCFC
_COMMAND: Final = 0x04
_MEMORY_AND_MASTER: Final = 6
_CAPABILITIES: Final = 0x34
_VENDOR_CAPABILITY: Final = 9
_COMMON, _NOTIFY, _CONFIG_ACCESS = 1, 2, 5
"""Types of virtio's PCI capabilities."""
_DEVICE_FEATURES: Final = 4
_FEATURES_SELECT: Final = 8
_FEATURES: Final = 12
_STATUS: Final = 20
_QUEUE_SIZE: Final = 24
_QUEUE_ENABLE: Final = 28
_QUEUE_NOTIFY_OFF: Final = 30
_QUEUE_RINGS: Final = 32
"""Offsets in the common configuration; queue 0 and the low features are selected after a reset."""
_ACKNOWLEDGED_DRIVER: Final = 3
_FEATURES_OK: Final = 8
_DRIVER_OK: Final = 4
_F_UNPLUGGED_INACCESSIBLE: Final = 2
_F_VERSION_1: Final = 1  # of the high features
_ENTRIES: Final = 2
_NEXT, _WRITE = 1, 2
"""Flags of a descriptor."""
_REQUEST_PLUG: Final = struct.Struct("<H6xQH6x")
_RESPONSE_BYTES: Final = 16
_NO_RESPONSE: Final = 0xFFFF


def arguments() -> list[str]:
    """Return QEMU's arguments for the device, besides the maximum of memory, `BYTES` more."""
    device = f"memdev={BACKEND},requested-size={PLUGGED_BYTES},block-size={_BLOCK_BYTES}"
    return [
        *("-object", f"memory-backend-memfd,id={BACKEND},size={BYTES},share=on"),
        *("-device", f"virtio-mem-pci,id={BACKEND}0,memaddr={FIRST},addr={_SLOT},{device}"),
    ]


async def plug(qemu: SocketQemu, ram: RamFile, timeout_s: float) -> None:
    """Have the device plug the memory from `PLUGGED_FIRST` on.

    Raises:
        UntestableError: the device refuses, or is not the expected one.
        WaitTimeoutError: the device does not answer.
    """
    device = await _Device.find(qemu)
    fd = os.open(f"/proc/self/fd/{ram.fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        await device.start()
        _write_request(fd)
        await device.notify()

        def is_used() -> bool:
            return struct.unpack("<H", os.pread(fd, 2, _USED + 2)) == (1,)

        def late() -> WaitTimeoutError:
            return WaitTimeoutError(
                f"virtio-mem has not answered within {timeout_s:g} s; allow more time (--timeout)"
            )

        await wait_until(is_used, timeout_s, late)
        (answer,) = struct.unpack("<H", os.pread(fd, 2, _RESPONSE))
    finally:
        os.close(fd)
    if answer:
        raise UntestableError(f"virtio-mem answers {answer} to a request to plug; expected 0")


def _write_request(fd: int) -> None:
    request = _REQUEST_PLUG.pack(0, PLUGGED_FIRST, PLUGGED_BYTES // _BLOCK_BYTES)
    descriptors = struct.pack("<QIHH", _REQUEST, len(request), _NEXT, 1)
    descriptors += struct.pack("<QIHH", _RESPONSE, _RESPONSE_BYTES, _WRITE, 0)
    os.pwrite(fd, request, _REQUEST)
    os.pwrite(fd, struct.pack("<H", _NO_RESPONSE), _RESPONSE)
    os.pwrite(fd, descriptors, _DESCRIPTORS)
    os.pwrite(fd, struct.pack("<HHH", 0, 1, 0), _AVAILABLE)


class _Device:
    """The virtio-mem device, whose registers are in the places that `capabilities` has by type."""

    def __init__(self, qemu: SocketQemu, capabilities: dict[int, int]) -> None:
        self._qemu = qemu
        self._capabilities = capabilities

    @classmethod
    async def find(cls, qemu: SocketQemu) -> _Device:
        device = cls(qemu, {})
        place = await device._config(_CAPABILITIES) & 0xFF
        while place:
            head = await device._config(place)
            if head & 0xFF == _VENDOR_CAPABILITY:
                device._capabilities[head >> 24] = place
            place = head >> 8 & 0xFF
        if {_COMMON, _NOTIFY, _CONFIG_ACCESS} - device._capabilities.keys():
            raise UntestableError(f"{qemu.name} has no modern virtio device in slot {_SLOT}")
        return device

    async def start(self) -> None:
        """Start the device with one queue, its first."""
        await self._set_config(_COMMAND, _MEMORY_AND_MASTER)
        await self._set(_STATUS, 1, 0)
        await self._set(_STATUS, 1, _ACKNOWLEDGED_DRIVER)
        offered = await self._get(_DEVICE_FEATURES, 4)
        await self._set(_FEATURES_SELECT, 4, 0)
        await self._set(_FEATURES, 4, offered & _F_UNPLUGGED_INACCESSIBLE)
        await self._set(_FEATURES_SELECT, 4, 1)
        await self._set(_FEATURES, 4, _F_VERSION_1)
        await self._set(_STATUS, 1, _ACKNOWLEDGED_DRIVER | _FEATURES_OK)
        await self._set(_QUEUE_SIZE, 2, _ENTRIES)
        for number, ring in enumerate((_DESCRIPTORS, _AVAILABLE, _USED)):
            await self._set(_QUEUE_RINGS + 8 * number, 4, ring)
            await self._set(_QUEUE_RINGS + 8 * number + 4, 4, 0)
        await self._set(_QUEUE_ENABLE, 2, 1)
        await self._set(_STATUS, 1, _ACKNOWLEDGED_DRIVER | _FEATURES_OK | _DRIVER_OK)

    async def notify(self) -> None:
        """Tell the device that its queue has a new request."""
        multiplier = await self._config(self._capabilities[_NOTIFY] + 16)
        offset = await self._get(_QUEUE_NOTIFY_OFF, 2)
        await self._set(offset * multiplier, 2, 0, _NOTIFY)

    async def _get(self, offset: int, length: int) -> int:
        access = await self._point(_COMMON, offset, length)
        return await self._config(access) & (1 << 8 * length) - 1

    async def _set(self, offset: int, length: int, value: int, kind: int = _COMMON) -> None:
        access = await self._point(kind, offset, length)
        await self._set_config(access, value)

    async def _point(self, kind: int, offset: int, length: int) -> int:
        """Select `length` bytes of a structure; return where their value is accessible."""
        access = self._capabilities[_CONFIG_ACCESS]
        start = await self._config(self._capabilities[kind] + 8)
        await self._set_config(access + 8, start + offset)
        await self._set_config(access + 12, length)
        return access + 16

    async def _config(self, offset: int) -> int:
        await self._select(offset)
        line = await self._qemu.monitor(f"i /w {_CONFIG_DATA_PORT:#x}")
        return int(line.rpartition("=")[2], 16)

    async def _set_config(self, offset: int, value: int) -> None:
        await self._select(offset)
        await self._qemu.monitor(f"o /w {_CONFIG_DATA_PORT:#x} {value:#x}")

    async def _select(self, offset: int) -> None:
        address = 1 << 31 | _SLOT << 11 | offset & ~3
        await self._qemu.monitor(f"o /w {_CONFIG_ADDRESS_PORT:#x} {address:#x}")
