"""Lookup of trackers, devices, faults … by name: dmaproof's own, and those of other distributions.

One of dmaproof's own parts is a single file of its package: the package is scanned for classes with
a `name`. A third-party part is an entry point of its distribution, in the group
``dmaproof.trackers``, ``dmaproof.devices`` or ``dmaproof.faults``; the entry point's name is the
part's `name`. `qmp_tools` finds its migration scenarios and kinds of device in the same way.

The table of entry points contains the names, so a list of choices imports nothing. A third-party
module is imported only when its part is used, so a broken distribution affects only its own parts.
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
    """Import the modules of a package, and return the classes with a `name` that they define.

    A class without its own `name` is a base class, and is left out.

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
    """The parts of one kind: a mapping from names to classes, in the order of the names.

    Iteration and ``in`` import no third-party module. A look-up imports the module of the part.

    Args:
        kind: the kind of part, such as 'tracker'. It determines the group of entry points:
            ``dmaproof.trackers`` for 'tracker', ``dmaproof.device_kinds`` for 'device kind'.
        base: the base class of every part.
        package: the package that contains dmaproof's own parts.

    Raises:
        UsageError: by a look-up, if two parts have the name, or if the third-party part cannot be
            loaded or does not implement `base`. The message names the distribution.
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
                f"{self._kind} {name!r} is ambiguous: {' and '.join(makers)} define it; uninstall "
                "one of them, or rename its entry point and its attribute 'name'"
            )
        if name not in self._loaded:
            self._loaded[name] = self._load(entries[0]) if entries else self._own[name]
        return self._loaded[name]

    def find(self, name: str) -> type[Part]:
        """Look up a part that a user has named.

        Args:
            name: the part's name.

        Returns:
            The part's class.

        Raises:
            UsageError: the part does not exist, or cannot be used (see `Registry`).
        """
        if name not in self:
            raise UsageError(
                f"{self._kind} {name!r} is not known; choose one of: {', '.join(self) or 'none'}"
            )
        return self[name]

    def usable(self) -> dict[str, type[Part]]:
        """Load every part that can be used, for lists that describe the parts.

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
        except (Exception, SystemExit) as error:  # a third-party module may raise any exception
            raise self._refusal(entry, f"cannot be loaded: {error!r}") from error
        if why := _misfit(part, self._base, entry.name):
            raise self._refusal(entry, why)
        return cast(type[Part], part)

    def _refusal(self, entry: metadata.EntryPoint, why: str) -> UsageError:
        return UsageError(
            f"{self._kind} {entry.name!r} of {_place(entry)} {why}; fix or uninstall that "
            "distribution"
        )


def _place(entry: metadata.EntryPoint) -> str:
    """Return the distribution and the object of an entry point, for messages."""
    distribution = entry.dist.name if entry.dist else "unknown"
    return f"distribution {distribution!r} ({entry.value})"


def _misfit(part: Any, base: type[Any], name: str) -> str:
    """Return why a third-party part does not implement `base`; empty if it does."""
    if not (isinstance(part, type) and issubclass(part, base)):
        return f"is not a subclass of {base.__module__.partition('.')[0]}.{base.__name__}"
    missing = [
        *sorted(getattr(part, "__abstractmethods__", ())),
        *(member for member in inspect.get_annotations(base) if not hasattr(part, member)),
    ]
    if missing:
        return f"does not define {', '.join(missing)}"
    if (own_name := part.name) != name:  # type: ignore[attr-defined]
        return f"has the attribute 'name' {own_name!r}, which must be the entry point's name"
    return ""
