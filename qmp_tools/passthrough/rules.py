"""The kernel's rules about logging and bitmaps, each checked on the running kernel.

The rules say what the kernel accepts and refuses, and what it does where no behaviour is specified.
dmaproof's iterator differs from the latter on purpose. docs/kernel-findings.md describes the
behaviour that loses pages.
"""

from __future__ import annotations

from typing import Any

from .iommufd_rules import iommufd_rules
from .outcome import Proof, Rule
from .vfio_rules import vfio_rules


def rules() -> dict[str, Proof]:
    """Return every rule as a proof, by what it says."""

    def proof(rule: Rule) -> Proof:
        def carry_out() -> tuple[str, dict[str, Any]]:
            return rule(), {}

        return carry_out

    checks = {**vfio_rules(), **iommufd_rules()}
    return {name: proof(rule) for name, rule in checks.items()}
