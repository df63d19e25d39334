"""The migration scenarios by name: those of this package, and those of other distributions.

Each is a class with a `name`, derived from `scenarios.base.Scenario`. One of ours is found by
scanning the package; one of another distribution is an entry point of the group
``dmaproof.scenarios``, whose name is the scenario's::

    [project.entry-points."dmaproof.scenarios"]
    precious = "precious_package:Precious"
"""

from __future__ import annotations

import sys
from functools import cache

from dmaproof.discovery import Registry

from .base import Scenario


@cache
def known_scenarios() -> Registry[Scenario]:
    """Find the scenarios: dmaproof's own, and those of entry points.

    Returns:
        The classes by name; call one to make the scenario.

    Example::

        for name, scenario in known_scenarios().usable().items():
            print(name, scenario().summary)
    """
    return Registry("scenario", Scenario, sys.modules[__name__])


def find_scenario(name: str) -> Scenario:
    """Make the scenario of this name.

    Args:
        name: such as 'unix' or 'multifd-4'.

    Returns:
        A scenario of its own: its steps may keep things in it.

    Raises:
        UsageError: none has the name, or two distributions have it, or it cannot be used.
    """
    return known_scenarios().find(name)()
