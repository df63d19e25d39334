"""Find the migration scenarios by name: dmaproof's own, and those of other distributions.

Each scenario is a class with a `name`, derived from `scenarios.base.Scenario`. dmaproof scans this
package for its own scenarios. Another distribution declares a scenario as an entry point of the
group ``dmaproof.scenarios``, under the scenario's name::

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
        The classes by name. Call a class to make the scenario.

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
        A new scenario, in which the steps may keep state.

    Raises:
        UsageError: no scenario has the name, two distributions define it, or it cannot be loaded.
    """
    return known_scenarios().find(name)()
