"""What most proofs of a migration of L2 require: equal RAM, or that a fault is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .injected_faults import FAULTS
from .l2 import RAM_PAGES, Plan
from .l2_migration import migrate


def equal(plan: Plan, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate; all of RAM must be equal, and each device must continue."""
    result = migrate(plan, timeout_s)
    result.require_equal(plan.trackings)
    return f"0 of {RAM_PAGES} pages differ, {result}", result.figures()


def drops(plan: Plan, seed: int, timeout_s: float) -> tuple[str, dict[str, Any]]:
    """Migrate while the victim drops dirty pages; some of these must differ, and no others."""
    drop = FAULTS["drop"]
    result = migrate(replace(plan, faults={**plan.faults, **drop, "seed": seed}), timeout_s)
    return result.require_noticed(result.devices[plan.victim].dropped(drop["drop"], seed))
