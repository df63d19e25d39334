"""Planted faults: each a thin wrapper around one link of the chain, put there from outside.

A proof that never fails proves nothing. A planted fault breaks one link on purpose, in a way in
which somebody's link was broken once (docs/faults.md); no link knows of it. What it spoils follows
from a seed alone, as far as it does not follow from the moment.

Faults are found by name in the files of this package, one file for each kind of link. A fault is
asked for as ``NAME`` or ``NAME=VALUE``.
"""

from __future__ import annotations

import sys

from ..discovery import named_classes
from ..errors import UsageError
from .fault import Fault


def known_faults() -> dict[str, type[Fault]]:
    """The faults by name, in the order of their names."""
    found = named_classes(sys.modules[__name__])
    return {name: found[name] for name in sorted(found) if issubclass(found[name], Fault)}


def summary(fault: type[Fault]) -> str:
    """What people are told of a fault, in one line."""
    return (fault.__doc__ or "").strip().splitlines()[0]


def plant(fault: str | None, seed: int) -> Fault:
    """The fault that ``NAME[=VALUE]`` names; None is the chain as it should be.

    Raises:
        UsageError: there is no such fault, or its value does not fit.
    """
    if fault is None:
        return Fault("", seed)
    name, equals, value = fault.partition("=")
    known = known_faults()
    if name not in known:
        raise UsageError(f"fault {name!r} is not known; there are: {', '.join(known)}")
    if equals and not value:
        raise UsageError(f"fault {fault}: a value is due behind the '='")
    return known[name](value, seed)
