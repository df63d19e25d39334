"""A third-party scenario and kind of device, written with only the public API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dmaproof import stamped_page
from qmp_tools import (
    COMMON_OPTIONS,
    AttachedDevice,
    DeviceFacts,
    DeviceKind,
    DeviceRequest,
    ProofDevice,
    Scenario,
    Workload,
)

_PAGES = 16 << 10
_SECTORS_PER_PAGE = 8


class FourChannels(Scenario):
    """A migration that sends RAM through four channels."""

    name = "four-channels"
    summary = "The migration uses 4 channels, each with its own Unix socket"
    capabilities = ("multifd",)
    parameters = {"multifd-channels": 4}  # noqa: RUF012  (it is never changed)
    exercised_by = "ram.multifd-bytes"


class PlainDiskKind(DeviceKind):
    """QEMU's own virtio disk on an image file."""

    name = "plain-disk"
    accepts = COMMON_OPTIONS | {"guest"}

    def names(self) -> Sequence[str]:
        """Return the only name."""
        return ["plain-disk"]

    def claims(self, name: str) -> bool:
        """Return whether `name` is that name."""
        return name == "plain-disk"

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Make the disk; no part of the request applies to it."""
        return PlainDisk()


@dataclass(frozen=True)
class PlainDisk(ProofDevice):
    """A disk of 64 MiB with one queue."""

    @property
    def facts(self) -> DeviceFacts:
        """The disk's facts for reports."""
        return DeviceFacts("plain-disk", queues=1)

    @property
    def guests(self) -> Collection[str]:
        """The guests with a driver for virtio disks."""
        return ("bare",)

    def adapt(self, workload: Workload) -> Workload:
        """Make the workload expect the same stamp at each read of a page."""
        return replace(workload, image=1)

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        """Write the image with a stamp in every page."""
        image = folder / "plain-disk"
        with image.open("wb") as file:
            for page in range(_PAGES):
                file.write(stamped_page(page * _SECTORS_PER_PAGE, request=1))
        yield _AttachedDisk(image)


class _AttachedDisk(AttachedDevice):
    def __init__(self, image: Path) -> None:
        self._image = image

    async def attach(self, side: str) -> Sequence[str]:
        """Return arguments with which both QEMUs open the image at the same time."""
        node = {"driver": "file", "node-name": "plain", "locking": "off"}
        blockdev = json.dumps({**node, "filename": str(self._image)})
        return ["-blockdev", blockdev, "-device", "virtio-blk-pci,drive=plain,num-queues=1"]
