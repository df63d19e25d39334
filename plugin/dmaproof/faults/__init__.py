"""Injected faults: each a thin wrapper around one link of the chain, put there from outside.

A proof that never fails proves nothing. A injected fault breaks one link on purpose, in a way in
which somebody's link was broken once (docs/faults.md); no link knows of it. What it spoils follows
from a seed alone, as far as it does not follow from the moment.

Faults are found by name in the files of this package, one file for each kind of link, and among the
entry points of other distributions. A fault is asked for as ``NAME`` or ``NAME=VALUE``.
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
    """Find the faults: dmaproof's own, and those of entry points (group ``dmaproof.faults``).

    Returns:
        The classes by name.

    Example:
        >>> known_faults()["drop-pages"].link
        <Link.LOG: 'log'>
    """
    return Registry("fault", Fault, sys.modules[__name__])


def summary(fault: type[Fault]) -> str:
    """What people are told of a fault, in one line."""
    return (fault.__doc__ or fault.name).strip().partition("\n")[0]


def make_fault(fault: str | None, seed: int) -> Fault:
    """Make the fault that a user asks for.

    Args:
        fault: ``NAME[=VALUE]``; None is the chain as it should be.
        seed: decides what the fault spoils.

    Returns:
        The fault, which makes the sessions that have it (`Fault.make_session`).

    Raises:
        UsageError: there is no such fault, or its value does not fit.

    Example:
        >>> make_fault("drop-pages=0.05", seed=1).value
        0.05
    """
    if fault is None:
        return Fault("", seed)
    name, equals, value = fault.partition("=")
    make = known_faults().find(name)
    if equals and not value:
        raise UsageError(f"fault {fault}: a value is due behind the '='")
    return make(value, seed)
