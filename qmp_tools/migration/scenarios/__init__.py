"""The migration scenarios by name: those of this package, and those of others.

Each is a class with a `name`, derived from `scenarios.base.Scenario`. One of ours is found by
walking the package; one of another package by an entry point of the group ``dmaproof.scenarios``,
whose name is the scenario's and whose value is the class, or an instance of it::

    [project.entry-points."dmaproof.scenarios"]
    precious = "precious_package:Precious"

The other package is imported only when its scenario is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from dmaproof.discovery import named_classes
from dmaproof.errors import UsageError

from .base import Scenario

GROUP: Final = "dmaproof.scenarios"


class Scenarios(Mapping[str, Scenario]):
    """Our scenarios, and those that `plugged` entry points name.

    A name is known, and listed, without its package being imported. Looking it up raises
    `UsageError` where two packages have it, or where what it names is not a scenario.
    """

    def __init__(self, plugged: Iterable[EntryPoint] = ()) -> None:
        own: dict[str, type[Scenario]] = named_classes(sys.modules[__name__])
        self._own: dict[str, Scenario] = {name: kind() for name, kind in own.items()}
        self._plugged: dict[str, list[EntryPoint]] = {}
        for point in plugged:
            self._plugged.setdefault(point.name, []).append(point)

    def __getitem__(self, name: str) -> Scenario:
        points = self._plugged.get(name, [])
        if not points:
            return self._own[name]
        owners = ["dmaproof"] * (name in self._own) + [_owner(point) for point in points]
        if len(owners) > 1:
            raise UsageError(
                f"scenario {name!r}: packages {' and '.join(owners)} each have one of this name; "
                "uninstall all but one of them, or rename it there"
            )
        return _load(points[0])

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from (name for name in self._plugged if name not in self._own)

    def __len__(self) -> int:
        return len(self._own.keys() | self._plugged.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._plugged

    def summary(self, name: str) -> str:
        """What scenario `name` does, in some words; of another package, only which one it is."""
        if name in self._own:
            return self._own[name].summary
        return f"of package {' and '.join(map(_owner, self._plugged[name]))}"


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _load(point: EntryPoint) -> Scenario:
    entry = f"entry point {point.name} = {point.value} of package {_owner(point)}"
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{entry} cannot be loaded: {error}") from error
    if isinstance(found, type) and issubclass(found, Scenario):
        found = found()
    if not isinstance(found, Scenario):
        raise UsageError(f"{entry} is not a Scenario, and not a class derived from it: {found!r}")
    if getattr(found, "name", None) != point.name:
        raise UsageError(f"{entry} is a scenario of another name: {getattr(found, 'name', None)!r}")
    return found


@cache
def known_scenarios() -> Scenarios:
    """The scenarios of this package and of all that are installed, by name."""
    return Scenarios(entry_points(group=GROUP))


def find_scenario(name: str) -> Scenario:
    """The scenario of this name.

    Raises:
        UsageError: none has it, or two packages have it, or it is not a scenario.
    """
    scenarios = known_scenarios()
    if name not in scenarios:
        raise UsageError(f"scenario {name!r}: expected one of {', '.join(scenarios)}")
    return scenarios[name]
