"""The proofs that vhost-net's dirty log has every page that the device writes.

The receive path is handle_rx() in drivers/vhost/net.c, and the used ring is written in
vhost_add_used_n() in drivers/vhost/vhost.c. `net_findings` has the exceptions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from ..outcome import Proof, require
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
SMALL_FRAME: Final = 60
SMALL_CHAIN: Final = 100


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
                require(
                    not found.lost,
                    f"seed {seed}, case {number}, round {round_number}: of "
                    f"{len(found.changed)} changed pages {name_pages(found.lost)} have no bit; "
                    f"pages of the used ring: {name_pages(used_pages(memory))}; {case}",
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


def name_pages(pages: Iterable[int]) -> str:
    """Return the first of some page numbers as text."""
    return ", ".join(f"{page:#x}" for page in sorted(pages)[:8])


def event_index_is_logged(timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Require the bit of a page of which the device writes nothing but the avail event."""
    size = 64
    choose = random.Random(size)
    memory = GuestMemory(REGIONS, choose)
    used = memory.bus(USED_BORDER_PAGE) - used_bytes_before(size)
    ring = Ring(memory, layout(memory, size, used))
    wanted = {Feature.LOG_ALL, Feature.NET_HEADER, Feature.EVENT_INDEX}
    with NetDevice(memory, ring, wanted, timeout_s=timeout_s) as device:
        device.ring.add(buffers(choose, memory, [SMALL_CHAIN]))
        for _ in range(2):  # no buffer is left for the second one, so the device asks for a kick
            device.send(choose.randbytes(SMALL_FRAME))
        found = device.receive()
    require(USED_BORDER_PAGE in found.changed, "the device did not write the avail event")
    require(not found.lost, f"lost: {name_pages(found.lost)}")
    return "the avail event's page has its bit", {"pages": len(found.changed), "lost": 0}


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
        f"lost pages: {name_pages(found.lost)}; expected: {name_pages(expected)}",
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
        "net: control: buffers without a log": partial(
            control, "the buffers", plain, seed, timeout_s
        ),
        "net: control: a used ring without a log": partial(
            control, "the used ring", plain | {Feature.LOG_ALL}, seed, timeout_s, logged=False
        ),
    }
