"""The kernel's rules about logging and bitmaps, each shown true or false on the running kernel.

What the kernel promises and refuses, and what it does where nobody promised anything: the places
where our iterator differs on purpose. What loses pages is told in docs/kernel-findings.md.
"""

from __future__ import annotations

from typing import Any

from .iommufd_rules import iommufd_rules
from .outcome import Proof, Rule
from .vfio_rules import vfio_rules


def rules() -> dict[str, Proof]:
    """Every rule by what it says."""

    def proof(rule: Rule) -> Proof:
        def carry_out() -> tuple[str, dict[str, Any]]:
            return rule(), {}

        return carry_out

    every = {**vfio_rules(), **iommufd_rules()}
    return {says: proof(rule) for says, rule in every.items()}
