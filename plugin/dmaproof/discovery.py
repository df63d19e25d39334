"""Finds trackers, devices, faults … by name: dmaproof's own, and those of other distributions.

An own part is one file of its package and nothing else: the package is scanned for classes with a
`name`. A third-party part is an entry point of its distribution, in the group
``dmaproof.trackers``, ``dmaproof.devices`` or ``dmaproof.faults``, whose name is the part's `name`.
`qmp_tools` has its migration scenarios and its kinds of device in the same way.

The table of entry points has the names, so a list of choices imports nothing. A third-party module
is imported when somebody asks for its part: a distribution that is broken stops only what uses it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any, TypeVar, cast

from .errors import UsageError

_logger = logging.getLogger(__name__)

Part = TypeVar("Part", covariant=True)


def named_classes(package: ModuleType) -> dict[str, type[Any]]:
    """Import the modules of a package, and collect the classes with a `name` that they define.

    A class without a `name` of its own is a base for others, and left out.

    Args:
        package: the package whose folder is scanned.

    Returns:
        The classes by their attribute `name`.
    """
    found: dict[str, type[Any]] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for member in vars(module).values():
            if isinstance(member, type) and member.__module__ == module.__name__:
                name = vars(member).get("name")
                if isinstance(name, str):
                    found[name] = member
    return found


class Registry(Mapping[str, type[Part]]):
    """The parts of one kind by name, in the order of their names.

    It is a mapping from names to classes. To iterate over the names, or to ask whether there is
    one, imports no third-party module; to look a name up imports the one that has it.

    Args:
        kind: such as 'tracker'; the entry points' group is ``dmaproof.trackers`` then, and that
            of a 'device kind' ``dmaproof.device_kinds``.
        base: the class of which every part is a subclass.
        package: the package that has dmaproof's own parts.

    Raises:
        UsageError: by a look-up, if two parts have the name, or if the third-party part cannot be
            loaded or is not what `base` demands. The message names the distribution.
    """

    def __init__(self, kind: str, base: type[Any], package: ModuleType) -> None:
        self._kind = kind
        self._base = base
        self._own: dict[str, type[Part]] = {
            name: part for name, part in named_classes(package).items() if issubclass(part, base)
        }
        self._entries: dict[str, list[metadata.EntryPoint]] = {}
        for entry in metadata.entry_points(group=f"dmaproof.{kind.replace(' ', '_')}s"):
            self._entries.setdefault(entry.name, []).append(entry)
        self._loaded: dict[str, type[Part]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._own, *self._entries}))

    def __len__(self) -> int:
        return len({*self._own, *self._entries})

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._entries

    def __getitem__(self, name: str) -> type[Part]:
        entries = self._entries.get(name, [])
        makers = ["dmaproof itself"] * (name in self._own) + sorted(map(_place, entries))
        if len(makers) > 1:
            raise UsageError(
                f"{self._kind} {name!r} is ambiguous: {' and '.join(makers)} have it; uninstall "
                "one, or rename its entry point and its attribute 'name'"
            )
        if name not in self._loaded:
            self._loaded[name] = self._load(entries[0]) if entries else self._own[name]
        return self._loaded[name]

    def find(self, name: str) -> type[Part]:
        """Look a part up that a user has named.

        Args:
            name: the part's name.

        Returns:
            The part's class.

        Raises:
            UsageError: there is no such part, or it cannot be used (see `Registry`).
        """
        if name not in self:
            raise UsageError(
                f"{self._kind} {name!r} is not known; there are: {', '.join(self) or 'none'}"
            )
        return self[name]

    def usable(self) -> dict[str, type[Part]]:
        """Load every part, for lists that describe them.

        Returns:
            The parts by name. A part that cannot be used is left out, and its error is logged.
        """
        found: dict[str, type[Part]] = {}
        for name in self:
            try:
                found[name] = self[name]
            except UsageError as error:
                _logger.warning("%s", error)
        return found

    def _load(self, entry: metadata.EntryPoint) -> type[Part]:
        try:
            part: Any = entry.load()
        except (Exception, SystemExit) as error:  # a foreign module may raise anything
            raise self._refusal(entry, f"cannot be loaded: {error!r}") from error
        if why := _misfit(part, self._base, entry.name):
            raise self._refusal(entry, why)
        return cast(type[Part], part)

    def _refusal(self, entry: metadata.EntryPoint, why: str) -> UsageError:
        return UsageError(
            f"{self._kind} {entry.name!r} of {_place(entry)} {why}; correct that distribution, or "
            "uninstall it"
        )


def _place(entry: metadata.EntryPoint) -> str:
    """Who brings an entry point, for messages."""
    distribution = entry.dist.name if entry.dist else "unknown"
    return f"distribution {distribution!r} ({entry.value})"


def _misfit(part: Any, base: type[Any], name: str) -> str:
    """What a third-party part lacks of what `base` demands; empty if nothing."""
    if not (isinstance(part, type) and issubclass(part, base)):
        return f"is not a subclass of {base.__module__.partition('.')[0]}.{base.__name__}"
    missing = [
        *sorted(getattr(part, "__abstractmethods__", ())),
        *(member for member in inspect.get_annotations(base) if not hasattr(part, member)),
    ]
    if missing:
        return f"lacks {', '.join(missing)}"
    if (own_name := part.name) != name:  # type: ignore[attr-defined]
        return f"has the attribute 'name' {own_name!r}, which must be the entry point's name"
    return ""
