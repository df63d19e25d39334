"""Distinguish pages that the guest gave back during a migration from lost pages.

A balloon discards on the source what the guest gives to it or reports as free. The page is then
empty on the source, while the destination may have the content that was sent before. QEMU need not
send the page again, because the guest has given up its content. A page that is absent on the source
(`absent_pages`) and that a device may discard is therefore not a lost page. A page that the guest
has written since is populated again, and is compared like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmaproof.units import PAGE_BYTES

from ..memory.pages import PagedRam, Pages
from ..memory.physical_map import MapRegion, is_backend
from ..qemu.machine import MIB
from ..qemu.qemu import Qemu

_FOLDERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")
_BALLOON: Final = "child<virtio-balloon-device>"
_BALLOON_ADDRESS_SPACE: Final = re.compile(r'^ AS "virtio-balloon', re.MULTILINE)
_NO_VIEW: Final = "No rendered FlatView"
_HINTED_BLOCK_BYTES: Final = 4 * MIB
"""Linux hints free pages in its largest blocks (VIRTIO_BALLOON_HINT_BLOCK_ORDER)."""


@dataclass(frozen=True)
class Discarder:
    """A device through which a guest gives memory back. `name` is for people.

    It may discard memory from guest-physical address `start` up to `end`, or any RAM if `end` is
    None. If `unsent_block_bytes` is not 0, QEMU may omit whole blocks of that size, although the
    source still holds their content. `hints` says whether the device is a balloon through which the
    guest hints which pages are free.
    """

    name: str
    start: int = 0
    end: int | None = None
    unsent_block_bytes: int = 0
    hints: bool = False


class Sorted(NamedTuple):
    """Page numbers in ascending order: pages that differ, that were discarded, or may be either."""

    differing: NDArray[np.int64]
    discarded: NDArray[np.int64]
    undecided: NDArray[np.int64]


async def discarders(qemu: Qemu) -> list[Discarder]:
    """Return the devices through which the guest of `qemu` may give memory back.

    They may have an id or not. A balloon for which the guest has no driver is not among them.
    """
    found = []
    drives_balloon = guest_drives_balloon(await qemu.monitor("info mtree -f"))
    for folder in _FOLDERS:
        for entry in await _properties(qemu, folder):
            if not entry["type"].startswith("child<"):
                continue
            path = f"{folder}/{entry['name']}"
            members = [entry, *await _properties(qemu, path)]
            if drives_balloon and any(member["type"] == _BALLOON for member in members):
                names = {member["name"] for member in members}
                found.append(await _balloon(qemu, path, names))
    for device in await qemu.qmp.execute("query-memory-devices"):
        if device["type"] == "virtio-mem":
            found.append(_virtio_mem(device["data"]))
    return found


def guest_drives_balloon(flat_views: str) -> bool:
    """Return whether the guest lets a PCI balloon access its memory, by ``info mtree -f``.

    A driver has to enable this access (bus mastering), and firmware does not. Balloons on other
    buses are not listed there; the guest is assumed to drive them.
    """
    views = flat_views.replace("\r", "").split("FlatView #")
    of_balloons = [view for view in views if _BALLOON_ADDRESS_SPACE.search(view)]
    return not of_balloons or any(_NO_VIEW not in view for view in of_balloons)


async def _properties(qemu: Qemu, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await qemu.qmp.execute("qom-list", path=path)
    return found


async def _balloon(qemu: Qemu, path: str, properties: set[str]) -> Discarder:
    options = [
        option
        for option in ("free-page-reporting", "free-page-hint")
        if option in properties
        and await qemu.qmp.execute("qom-get", path=path, property=option) is True
    ]
    name = f"balloon {path.rpartition('/')[2]}"
    if options:
        name += f" ({', '.join(options)})"
    hints = "free-page-hint" in options
    return Discarder(name, unsent_block_bytes=_HINTED_BLOCK_BYTES if hints else 0, hints=hints)


def _virtio_mem(data: dict[str, Any]) -> Discarder:
    return Discarder(
        f"virtio-mem {data.get('id', 'without an id')}",
        data["memaddr"],
        data["memaddr"] + data["max-size"],
        unsent_block_bytes=data["block-size"],
    )


def sort_differences(
    devices: Sequence[Discarder],
    gpa: int,
    source: Pages,
    destination: Pages,
    differing: NDArray[np.int64],
) -> Sorted:
    """Sort pages that are not equal into differing, discarded and undecided ones.

    Args:
        devices: the devices through which the source's guest may give this memory back.
        gpa: the address of the first page that was compared.
        source: the pages of the source that were compared.
        destination: the pages of the destination that were compared.
        differing: the pages that are not equal, counted from `gpa` on, sorted.
    """
    none = np.empty(0, dtype=np.int64)
    addresses = gpa + differing * PAGE_BYTES
    reach = np.zeros(len(differing), dtype=np.bool_)
    for device in devices:
        reach |= _within(device, addresses)
    if not reach.any():
        return Sorted(differing, none, none)
    absence = source.absent()
    zero = reach & source.are_zero(differing)
    discarded = zero & absence.absent[differing]
    undecided = zero & ~discarded & (not absence.certain)
    unsent = np.zeros(len(differing), dtype=np.bool_)
    unreceived = destination.absent().absent
    for device in devices:
        if device.unsent_block_bytes:
            whole = _absent_blocks(unreceived, gpa, device.unsent_block_bytes)
            unsent |= _within(device, addresses) & whole[differing]
    undecided |= unsent & ~discarded
    return Sorted(differing[~discarded & ~undecided], differing[discarded], differing[undecided])


def may_be_discarded(ram: PagedRam, region: MapRegion) -> bool:
    """Return whether the region is RAM of a memory backend; other memory is never discarded."""
    is_plain_ram = region.kind.removeprefix("nv-") == "ram"
    return is_plain_ram and any(is_backend(region, name) for name in ram.backends)


def _within(device: Discarder, addresses: NDArray[np.int64]) -> NDArray[np.bool_]:
    inside = addresses >= device.start
    return inside if device.end is None else inside & (addresses < device.end)


def _absent_blocks(absent: NDArray[np.bool_], gpa: int, block_bytes: int) -> NDArray[np.bool_]:
    """Return which pages, counted from `gpa` on, are in blocks whose pages are all absent."""
    blocks = (gpa + np.arange(len(absent)) * PAGE_BYTES) // block_bytes - gpa // block_bytes
    populated = np.bincount(blocks[~absent], minlength=int(blocks[-1]) + 1)
    return np.equal(populated[blocks], 0)
