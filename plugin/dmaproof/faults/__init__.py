"""Injected faults: each one a thin wrapper around one link of the chain, applied from outside.

A proof that never fails proves nothing. An injected fault breaks one link on purpose, in a way in
which a real implementation was once broken (docs/faults.md). The links do not know about faults.
The seed alone decides which pages a fault affects, unless the timing of the run decides it.

Faults are found by name in the files of this package, one file for each kind of link, and among the
entry points of other distributions. Users name a fault as ``NAME`` or ``NAME=VALUE``.
"""

from __future__ import annotations

import functools
import sys

from ..discovery import Registry
from ..errors import UsageError
from .fault import Fault

__all__ = ["Fault", "known_faults", "make_fault", "summary"]


@functools.cache
def known_faults() -> Registry[Fault]:
    """Find dmaproof's faults and those of entry points (group ``dmaproof.faults``).

    Returns:
        The classes by name.

    Example:
        >>> known_faults()["drop-pages"].link
        <Link.LOG: 'log'>
    """
    return Registry("fault", Fault, sys.modules[__name__])


def summary(fault: type[Fault]) -> str:
    """Return the fault's one-line summary for users: the first line of its docstring."""
    return (fault.__doc__ or fault.name).strip().partition("\n")[0]


def make_fault(fault: str | None, seed: int) -> Fault:
    """Make the fault that a user asks for.

    Args:
        fault: ``NAME[=VALUE]``; None is the intact chain.
        seed: decides what the fault affects.

    Returns:
        The fault; its `Fault.make_session` makes sessions with the fault.

    Raises:
        UsageError: the fault does not exist, or its value is invalid.

    Example:
        >>> make_fault("drop-pages=0.05", seed=1).value
        0.05
    """
    if fault is None:
        return Fault("", seed)
    name, equals, value = fault.partition("=")
    make = known_faults().find(name)
    if equals and not value:
        raise UsageError(f"fault {fault}: expected a value after '='")
    return make(value, seed)
