"""The defects of Linux and QEMU that dmaproof found, each with its reproducer.

A finding is an object of a subclass of `Finding`: one for each program in `linux` and its
neighbours. ``dmaproof reproduce`` tries findings, and docs/upstream describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from dmaproof.errors import UsageError

from .finding import Finding
from .linux import LINUX_FINDINGS
from .qemu import QEMU_FINDINGS

FINDINGS: Final[Mapping[str, Finding]] = MappingProxyType(
    {finding.name: finding for finding in (*LINUX_FINDINGS, *QEMU_FINDINGS)}
)
"""All findings by name, in the order in which they are listed."""


def find_finding(name: str) -> Finding:
    """Return the finding that a user has named.

    Raises:
        UsageError: no finding has this name.
    """
    if name not in FINDINGS:
        raise UsageError(f"finding {name!r} is not known; choose one of: {', '.join(FINDINGS)}")
    return FINDINGS[name]
