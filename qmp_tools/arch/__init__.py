"""The architectures of guests; a new architecture is one file of this package.

A file defines one `Architecture`. The freestanding guest of an architecture is in the folder
``guests/bare/NAME``, and its probe in the file ``guests/probe/NAME.S``.
"""

from __future__ import annotations

import importlib
import pkgutil
import platform
from collections.abc import Mapping
from typing import Final

from dmaproof.errors import UsageError

from .architecture import Architecture


def _defined() -> dict[str, Architecture]:
    modules = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    )
    members = (member for module in modules for member in vars(module).values())
    return {member.name: member for member in members if isinstance(member, Architecture)}


ARCHITECTURES: Final[Mapping[str, Architecture]] = _defined()
"""The architectures by name."""


def host_architecture() -> Architecture | None:
    """Return the architecture of this machine; None if dmaproof has no guests for it."""
    return ARCHITECTURES.get(platform.machine())


def find_architecture(name: str | None) -> Architecture:
    """Return the architecture with this name; for None, that of this machine.

    Raises:
        UsageError: dmaproof has no guests for the architecture.
    """
    wanted = platform.machine() if name is None else name
    found = ARCHITECTURES.get(wanted)
    if found is None:
        raise UsageError(
            f"--arch: there is no guest for {wanted}; choose one of {', '.join(ARCHITECTURES)}"
        )
    return found
