"""The proofs that vhost-net's dirty log has every page that the device writes, and its exceptions.

The receive path is handle_rx() in drivers/vhost/net.c, and the used ring is written in
vhost_add_used_n() in drivers/vhost/vhost.c.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from dmaproof.units import PAGE_BYTES

from ..outcome import Proof, observe, require
from .abi import Feature
from .memory import Comparison, GuestMemory
from .net import NetDevice
from .net_cases import (
    REGIONS,
    USED_BORDER_PAGE,
    Case,
    Totals,
    buffers,
    fill,
    layout,
    open_case,
    used_pages,
)
from .ring import Ring, used_bytes_before

_ROUNDS: Final = 4
_SMALL_FRAME: Final = 60
_SMALL_CHAIN: Final = 100
_BATCH: Final = 64
"""The buffers that vhost-net reports in one call (VHOST_NET_BATCH)."""


def require_cleared_bit_shows(comparison: Comparison, choose: random.Random) -> None:
    """Clear the bit of one changed page, and require that exactly this page is lost then."""
    found = sorted(comparison.changed & comparison.logged)
    if not found:
        return
    page = choose.choice(found)
    lost = comparison.without(page).lost - comparison.lost
    require(lost == {page}, f"the bit of page {page:#x} is cleared, but lost pages are {lost}")


def random_cases(
    cases: int,
    fixed: Iterable[Feature],
    seed: int,
    timeout_s: float,
    *,
    iotlb: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Let the device receive random frames, and require the bit of each page that changed."""
    totals = Totals()
    for number in range(cases):
        choose = random.Random(f"{seed}, {number}")
        memory = GuestMemory(REGIONS, choose, iotlb=iotlb)
        case = Case.random(choose, memory, fixed)
        with open_case(case, memory, timeout_s=timeout_s) as device:
            for round_number in range(_ROUNDS):
                fill(choose, device, case.features)
                before = len(device.ring.capacities)
                found = device.receive()
                names = ", ".join(sorted(feature.name for feature in case.features))
                require(
                    not found.lost,
                    f"seed {seed}, case {number}, round {round_number}: {len(found.lost)} of "
                    f"{len(found.changed)} changed pages have no bit: {_pages(found.lost)}, those "
                    f"of the used ring are {_pages(used_pages(memory) & found.changed)}; ring of "
                    f"{case.size} at index {case.start}, used ring at {case.used:#x}, {names}",
                )
                require_cleared_bit_shows(found, random.Random(round_number))
                totals.rounds += 1
                totals.chains += before - len(device.ring.capacities)
                totals.pages += len(found.changed)
                totals.unchanged += len(found.unchanged)
                totals.features |= {feature.name for feature in case.features}
    return (
        f"{totals.rounds} rounds, {totals.chains} buffers: all {totals.pages} changed pages have "
        f"their bit, {totals.unchanged} bits are of unchanged pages",
        {
            "cases": cases,
            "rounds": totals.rounds,
            "buffers": totals.chains,
            "pages": totals.pages,
            "lost": 0,
            "unchanged": totals.unchanged,
            "features": sorted(totals.features),
            "seed": seed,
        },
    )


def _pages(pages: Iterable[int]) -> str:
    return ", ".join(f"{page:#x}" for page in sorted(pages)[:8])


def _batch(
    size: int, start: int, before_border: int, features: Iterable[Feature], timeout_s: float
) -> tuple[Comparison, GuestMemory]:
    """Receive a batch of small frames; the used ring begins that many bytes before a page."""
    choose = random.Random(size)
    memory = GuestMemory(REGIONS, choose)
    used = memory.bus(USED_BORDER_PAGE) - before_border
    ring = Ring(memory, layout(memory, size, used), start)
    wanted = {Feature.LOG_ALL, Feature.NET_HEADER, *features}
    with NetDevice(memory, ring, wanted, timeout_s=timeout_s) as device:
        for _ in range(_BATCH):
            device.ring.add(buffers(choose, memory, [_SMALL_CHAIN]))
            device.send(choose.randbytes(_SMALL_FRAME))
        found = device.receive()
    require(bool(used_pages(memory) & found.changed), "the used ring did not change")
    return found, memory


def in_order_loses(
    size: int, start: int, border_entry: int, page: int, timeout_s: float
) -> tuple[str, dict[str, Any]]:
    """Observe that the used ring's page `page` is lost if the device uses buffers in order.

    The same ring without VIRTIO_F_IN_ORDER must not lose a page.
    """
    before_border = used_bytes_before(border_entry)
    found, _ = _batch(size, start, before_border, [Feature.IN_ORDER], timeout_s)
    without, _ = _batch(size, start, before_border, [], timeout_s)
    require(not without.lost, f"without IN_ORDER too, pages are lost: {_pages(without.lost)}")
    observe(found.lost == {page}, f"lost pages: {_pages(found.lost) or 'none'}")
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
    require(not found.lost, f"pages are lost: {_pages(found.lost)}")
    without, _ = _batch(size, start, aligned, [], timeout_s)
    beyond = {page for page in found.logged - without.logged if page > USED_BORDER_PAGE}
    observe(bool(beyond), "no bit is set beyond the used ring")
    return (
        f"ring of {size}, {_BATCH} buffers from entry {start} on: bits of pages "
        f"{_pages(beyond)} after the used ring, which the device did not write",
        {"beyond": len(beyond)},
    )


def event_index_is_logged(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Require the bit of a page of which the device writes nothing but the avail event."""
    size = 64
    choose = random.Random(size)
    memory = GuestMemory(REGIONS, choose)
    used = memory.bus(USED_BORDER_PAGE) - used_bytes_before(size)
    ring = Ring(memory, layout(memory, size, used))
    wanted = {Feature.LOG_ALL, Feature.NET_HEADER, Feature.EVENT_INDEX}
    with NetDevice(memory, ring, wanted, timeout_s=timeout_s) as device:
        device.ring.add(buffers(choose, memory, [_SMALL_CHAIN]))
        for _ in range(2):  # no buffer is left for the second one, so the device asks for a kick
            device.send(choose.randbytes(_SMALL_FRAME))
        found = device.receive()
    require(USED_BORDER_PAGE in found.changed, "the device did not write the avail event")
    require(not found.lost, f"lost: {_pages(found.lost)}")
    return "the avail event's page has its bit", {"pages": len(found.changed), "lost": 0}


def discarded_frame_writes(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Observe a write without a bit: a byte of a frame that does not fit in its buffer."""
    choose = random.Random(1)
    memory = GuestMemory(REGIONS, choose)
    ring = Ring(memory, layout(memory, 64, memory.bus(USED_BORDER_PAGE)))
    wanted = {Feature.LOG_ALL, Feature.NET_HEADER}
    with NetDevice(memory, ring, wanted, timeout_s=timeout_s) as device:
        (buffer,) = buffers(choose, memory, [_SMALL_CHAIN])
        device.ring.add([buffer])
        before = memory.read(buffer.bus, _SMALL_CHAIN)
        device.send(bytes([before[0] ^ 0xFF]) + choose.randbytes(2 * _SMALL_CHAIN))
        found = device.discard()
        after = memory.read(buffer.bus, _SMALL_CHAIN)
    bytes_written = sum(old != new for old, new in zip(before, after, strict=True))
    observe(
        found.lost == memory.guest_pages(buffer.bus, 1),
        f"{bytes_written} bytes written, lost pages: {_pages(found.lost) or 'none'}",
    )
    return (
        f"{bytes_written} byte is written to a buffer that stays available, its page has no bit",
        {"lost": len(found.lost), "bytes": bytes_written},
    )


def control(
    removed: str, features: Iterable[Feature], seed: int, timeout_s: float, *, logged: bool = True
) -> tuple[str, dict[str, Any]]:
    """Take part of the log away from the device, and require that just its pages are lost."""
    choose = random.Random(seed)
    memory = GuestMemory(REGIONS, choose)
    chosen = Case.random(choose, memory, ())
    case = Case(chosen.size, chosen.used, chosen.start, frozenset(features))
    with open_case(case, memory, logged=logged, timeout_s=timeout_s) as device:
        fill(choose, device, case.features)
        found = device.receive()
    ring = used_pages(memory)
    expected = found.changed & ring if not logged else found.changed - ring
    require(bool(expected), f"the device wrote no page of {removed}")
    require(
        found.lost == expected,
        f"lost pages: {_pages(found.lost)}; expected those of {removed}: {_pages(expected)}",
    )
    return (
        f"{len(found.lost)} of {len(found.changed)} changed pages are lost, all of {removed}",
        {"lost": len(found.lost), "changed": len(found.changed), "seed": seed},
    )


def net_proofs(seed: int, cases: int, timeout_s: float) -> dict[str, Proof]:
    """Return the proofs with vhost-net by name."""
    plain = {Feature.NET_HEADER}

    def cases_with(fixed: Iterable[Feature], *, iotlb: bool = False) -> Proof:
        return partial(random_cases, cases, tuple(fixed), seed, timeout_s, iotlb=iotlb)

    return {
        "net: random buffers": cases_with(()),
        "net: random buffers, IOTLB": cases_with((), iotlb=True),
        "net: random buffers, in order": cases_with([Feature.IN_ORDER]),
        "net: random buffers, in order, IOTLB": cases_with([Feature.IN_ORDER], iotlb=True),
        "net: the avail event is logged": partial(event_index_is_logged, timeout_s),
        "net: in order, the last entries of a batch are not logged": partial(
            in_order_loses, 256, 180, 200, USED_BORDER_PAGE, timeout_s
        ),
        "net: in order, entries after the wrap are not logged": partial(
            in_order_loses, 1024, 1014, 30, USED_BORDER_PAGE, timeout_s
        ),
        "net: in order, pages after the used ring are logged": partial(
            in_order_overruns, timeout_s
        ),
        "net: a frame that does not fit writes a byte that is not logged": partial(
            discarded_frame_writes, timeout_s
        ),
        "net: control: buffers without a log": partial(
            control, "the buffers", plain, seed, timeout_s
        ),
        "net: control: a used ring without a log": partial(
            control, "the used ring", plain | {Feature.LOG_ALL}, seed, timeout_s, logged=False
        ),
    }
