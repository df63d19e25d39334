"""L2 migrated after one of its devices was unplugged.

The pages that the removed device has written must arrive too, and so must those that the remaining
device writes. QEMU must refuse to unplug the remaining device while it is migrated.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from dmaproof.units import PAGE_BYTES

from .l2 import RAM_PAGES, Plan
from .l2_migration import migrate
from .l2_proofs import drops
from .l2_result import Result
from .outcome import Proof, repeated, require, retrying
from .tracking import TRACKINGS, Tracking

_OF_TWO: Final = ("iommufd", "container")


def proofs(seed: int, timeout_s: float, controls: int = 1) -> dict[str, Proof]:
    """Return the proofs by name, and a control; see `migrations.proofs`."""
    found: dict[str, Proof] = {}
    for short in _OF_TWO:
        pair = (TRACKINGS[short], TRACKINGS[short])
        found[f"unplugged: one of two devices, {short}"] = retrying(
            partial(_of_two, pair, timeout_s)
        )
    plan = Plan((TRACKINGS["container"], TRACKINGS["container"]), victim=1, removed=0)
    found["unplugged: one of two devices, container, control: drop in the other"] = repeated(
        partial(drops, plan, timeout_s=timeout_s), seed, controls
    )
    found["unplugged: the only device, container"] = retrying(partial(_only, timeout_s))
    return found


def _of_two(pair: tuple[Tracking, Tracking], timeout_s: float) -> tuple[str, dict[str, Any]]:
    plan = Plan(pair, removed=0)
    result = migrate(plan, timeout_s)
    result.require_equal(pair)
    return _found(plan, result)


def _only(timeout_s: float) -> tuple[str, dict[str, Any]]:
    plan = Plan((TRACKINGS["container"],), removed=0)
    result = migrate(plan, timeout_s)
    require(not len(result.differing), f"{len(result.differing)} pages differ, {result}")
    return _found(plan, result)


def _found(plan: Plan, result: Result) -> tuple[str, dict[str, Any]]:
    assert plan.removed is not None
    pages = plan.engine(plan.removed).length // PAGE_BYTES
    require(
        result.removed_pages == pages,
        f"the removed device has written {result.removed_pages} of its {pages} pages",
    )
    return (
        f"0 of {RAM_PAGES} pages differ, all {pages} pages of the removed device arrived, {result}",
        {**result.figures(), "removed_pages": pages},
    )
