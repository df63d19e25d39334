"""What vhost-net writes without a bit in its dirty log: docs/kernel-findings.md explains each case.

The proofs hold on a kernel with the defect. On a kernel that logs the pages they are unsupported.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from dmaproof.units import PAGE_BYTES

from ..outcome import Proof, require, require_defect
from .abi import Feature
from .memory import Comparison, GuestMemory
from .net import NetDevice
from .net_cases import REGIONS, USED_BORDER_PAGE, buffers, layout, used_pages
from .net_proofs import SMALL_CHAIN, SMALL_FRAME, name_pages
from .ring import Ring, used_bytes_before

_BATCH: Final = 64
"""The buffers that vhost-net reports in one call (VHOST_NET_BATCH in drivers/vhost/net.c)."""


def _batch(
    size: int,
    start: int,
    before_border: int,
    features: Iterable[Feature],
    timeout_s: float,
    *,
    iotlb: bool = False,
) -> tuple[Comparison, GuestMemory]:
    """Receive a batch of small frames; the used ring begins that many bytes before a page."""
    choose = random.Random(size)
    memory = GuestMemory(REGIONS, choose, iotlb=iotlb)
    used = memory.bus(USED_BORDER_PAGE) - before_border
    ring = Ring(memory, layout(memory, size, used), start)
    wanted = {Feature.LOG_ALL, Feature.NET_HEADER, *features}
    with NetDevice(memory, ring, wanted, timeout_s=timeout_s) as device:
        for _ in range(_BATCH):
            device.ring.add(buffers(choose, memory, [SMALL_CHAIN]))
            device.send(choose.randbytes(SMALL_FRAME))
        found = device.receive()
    require(bool(used_pages(memory) & found.changed), "the used ring did not change")
    return found, memory


def require_lost(found: Comparison, expected: frozenset[int]) -> None:
    """Require the loss of the `expected` pages; a kernel that loses no page is correct."""
    text = f"lost pages: {name_pages(found.lost) or 'none'}"
    require_defect(found.lost == expected, not found.lost, text)


def in_order_loses(
    size: int, start: int, border_entry: int, page: int, timeout_s: float
) -> tuple[str, dict[str, Any]]:
    """Observe that the used ring's page `page` is lost if the device uses buffers in order.

    The same ring without VIRTIO_F_IN_ORDER must not lose a page.
    """
    before_border = used_bytes_before(border_entry)
    found, _ = _batch(size, start, before_border, [Feature.IN_ORDER], timeout_s)
    without, _ = _batch(size, start, before_border, [], timeout_s)
    require(not without.lost, f"without IN_ORDER too, pages are lost: {name_pages(without.lost)}")
    require_lost(found, frozenset({page}))
    return (
        f"ring of {size}, {_BATCH} buffers from entry {start} on, entry {border_entry} begins a "
        f"page: that page of the used ring changed without a bit; without IN_ORDER it has one",
        {"lost": len(found.lost), "changed": len(found.changed)},
    )


def in_order_overruns(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Observe bits of pages after the used ring, if the buffers wrap around in order."""
    size, start = 1024, 1000
    aligned = 2 * PAGE_BYTES  # the ring begins at a page, and its last 6 bytes are in a third one
    found, _ = _batch(size, start, aligned, [Feature.IN_ORDER], timeout_s)
    require(not found.lost, f"pages are lost: {name_pages(found.lost)}")
    without, _ = _batch(size, start, aligned, [], timeout_s)
    beyond = {page for page in found.logged - without.logged if page > USED_BORDER_PAGE}
    require_defect(bool(beyond), not beyond, "no bit is set beyond the used ring")
    return (
        f"ring of {size}, {_BATCH} buffers from entry {start} on: bits of pages "
        f"{name_pages(beyond)} after the used ring, which the device did not write",
        {"beyond": len(beyond)},
    )


def split_write_is_lost(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Observe that a write to the used ring is logged only up to the border of an IOTLB entry.

    The same write without an IOTLB must not lose a page.
    """
    size, start, border_entry = 256, 180, 200
    before_border = used_bytes_before(border_entry)
    found, memory = _batch(size, start, before_border, [], timeout_s, iotlb=True)
    without, _ = _batch(size, start, before_border, [], timeout_s)
    require(not without.lost, f"without IOTLB too, pages are lost: {name_pages(without.lost)}")
    expected = memory.guest_pages(memory.bus(USED_BORDER_PAGE), 1)
    require_lost(found, expected)
    return (
        f"ring of {size}, {_BATCH} buffers from entry {start} on, entry {border_entry} begins a "
        "page with an IOTLB entry of its own: that page changed without a bit; without an IOTLB "
        "it has one",
        {"lost": len(found.lost), "changed": len(found.changed)},
    )


def discarded_frame_writes(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Observe a write without a bit: a byte of a frame that does not fit in its buffer."""
    choose = random.Random(1)
    memory = GuestMemory(REGIONS, choose)
    ring = Ring(memory, layout(memory, 64, memory.bus(USED_BORDER_PAGE)))
    wanted = {Feature.LOG_ALL, Feature.NET_HEADER}
    with NetDevice(memory, ring, wanted, timeout_s=timeout_s) as device:
        (buffer,) = buffers(choose, memory, [SMALL_CHAIN])
        device.ring.add([buffer])
        before = memory.read(buffer.bus, SMALL_CHAIN)
        device.send(bytes([before[0] ^ 0xFF]) + choose.randbytes(2 * SMALL_CHAIN))
        found = device.discard()
        after = memory.read(buffer.bus, SMALL_CHAIN)
    bytes_written = sum(old != new for old, new in zip(before, after, strict=True))
    require_lost(found, memory.guest_pages(buffer.bus, 1))
    return (
        f"{bytes_written} byte is written to a buffer that stays available, its page has no bit",
        {"lost": len(found.lost), "bytes": bytes_written},
    )


def net_findings(timeout_s: float) -> dict[str, Proof]:
    """Return the proofs by name."""

    def in_order(size: int, start: int, border_entry: int) -> Proof:
        return partial(in_order_loses, size, start, border_entry, USED_BORDER_PAGE, timeout_s)

    return {
        "net: IOTLB, the used ring is logged up to a page border only": partial(
            split_write_is_lost, timeout_s
        ),
        "net: in order, the last entries of a batch are not logged": in_order(256, 180, 200),
        "net: in order, entries after the wrap are not logged": in_order(1024, 1014, 30),
        "net: in order, pages after the used ring are logged": partial(
            in_order_overruns, timeout_s
        ),
        "net: a frame that does not fit writes a byte that is not logged": partial(
            discarded_frame_writes, timeout_s
        ),
    }
