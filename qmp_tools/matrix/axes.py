"""The axes of a matrix, and the cells that result from them.

Any option of a proof can be an axis. `proof.options.OPTIONS` defines the values of an option, so
that a new device, tracker, scenario or option needs no change in this file. Kinds of cells other
than proofs may add an axis of their own (`cells.extra_axes`). A matrix comes from
options (``--scenario unix,tls``) or from a TOML file, whose form ``dmaproof matrix --help`` shows.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeAlias

from dmaproof.devices import emulated_devices
from dmaproof.errors import UsageError

from ..arch import ARCHITECTURES
from ..proof.options import OPTIONS, find_option
from ..qemu.choice import known_qemus
from ..qemu.memory_backend import KINDS as MEMORY_KINDS
from .cells import Axis, Cell, extra_axes

Values: TypeAlias = Mapping[str, Sequence[str]]
"""The values of each option, by its name."""

ALL: Final = "all"
NONE: Final = "none"
"""The displayed value of an option that is not given."""
_TABLES: Final = ("matrix", "exclude")
_PATTERN: Final = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Matrix:
    """The product of `axes`, without the cells that match all of one of the `excluded` rules.

    An empty value stands for an option that is not given: 'fault = ["", "drop-pages=0.01"]'.
    """

    axes: Values
    excluded: Sequence[Values] = ()

    def cells(self) -> list[Cell]:
        """Return the cells; the last axis changes the fastest."""
        products = itertools.product(*self.axes.values())
        cells = [
            {name: value for name, value in zip(self.axes, values, strict=True) if value}
            for values in products
        ]
        return [cell for cell in cells if not any(_matches(cell, rule) for rule in self.excluded)]

    @property
    def varying(self) -> list[str]:
        """The axes that have more than one value."""
        return [name for name, values in self.axes.items() if len(values) > 1]

    def label(self, cell: Cell) -> str:
        """Return the options that distinguish `cell`, such as 'scenario=tls tracker=iommu'."""
        names = self.varying or list(self.axes)
        return " ".join(f"{name}={cell.get(name, NONE)}" for name in names) or "proof"


def _matches(cell: Cell, rule: Values) -> bool:
    return all(
        any(fnmatchcase(cell.get(name, ""), pattern) for pattern in patterns)
        for name, patterns in rule.items()
    )


def known_values() -> dict[str, list[str]]:
    """Return the values that 'all' and patterns can select, for each option that has a list."""
    builds = (build for each in ARCHITECTURES.values() for build in known_qemus(each))
    qemus = list(dict.fromkeys(build.version for build in builds))
    # More may follow the name of a device or backend, so these options have no list of choices.
    named = {"device": sorted(emulated_devices()), "memory-backend": list(MEMORY_KINDS)}
    named |= {"qemu": qemus, "qemu-destination": qemus}
    return named | {option.key: option.values for option in OPTIONS.values() if option.values}


def split_values(text: str) -> list[str]:
    """Split 'unix,tls' into its values; a comma before 'name=' is part of one ('q35,hpet=off')."""
    return re.split(r",(?![\w.-]+=)", text)


def make_matrix(axes: Values, excluded: Sequence[Values] = ()) -> Matrix:
    """Return the matrix of `axes`, with 'all' and patterns expanded.

    Raises:
        UsageError: an option or a value does not exist, or no cell is left.
    """
    known = known_values()
    expanded: dict[str, list[str]] = {}
    for name, values in axes.items():
        if axis := extra_axes().get(name):
            found = [each for value in values for each in _selected(axis, value)]
        else:
            option = find_option(name)
            found = [each for value in values for each in _expand(name, value, known.get(name, []))]
            for value in filter(None, found):
                option.value_of(value)
        if not found:
            raise UsageError(f"{name}: expected at least one value")
        expanded[name] = list(dict.fromkeys(found))
    for rule in excluded:
        if unknown := rule.keys() - expanded.keys():
            raise UsageError(f"exclude: {', '.join(sorted(unknown))} is not an axis of the matrix")
    matrix = Matrix(expanded, excluded)
    if not matrix.cells():
        raise UsageError("the matrix has no cells: the [[exclude]] rules exclude all of them")
    return matrix


def _selected(axis: Axis, value: str) -> Sequence[str]:
    if value in ("", ALL):
        return axis.values() if value else [value]
    return axis.select(value)


def _expand(name: str, value: str, known: Sequence[str]) -> list[str]:
    if value == ALL or (known and value not in known and _PATTERN.search(value)):
        pattern = "*" if value == ALL else value
        found = [each for each in known if fnmatchcase(each, pattern)]
        if not known:
            raise UsageError(f"{name} {value}: {name} has no list of values; give each value")
        if not found:
            raise UsageError(f"{name} {value}: the pattern matches none of {', '.join(known)}")
        return found
    return [value]


def is_matrix(file: Path) -> bool:
    """Return whether a file is TOML and has the table [matrix]."""
    try:
        return "matrix" in _content(file)
    except UsageError:
        return False


def _content(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not TOML: {error}") from error


def read_matrix(file: Path, chosen: Values | None = None) -> Matrix:
    """Return the matrix of a TOML file; the `chosen` axes replace those of the file.

    Raises:
        UsageError: the file cannot be read or is not a matrix; see `make_matrix`.
    """
    content = _content(file)
    if not isinstance(content.get("matrix"), dict):
        raise UsageError(f"{file}: expected a table [matrix] with an axis on each line")
    if unknown := content.keys() - set(_TABLES):
        raise UsageError(
            f"{file}: unknown: {', '.join(sorted(unknown))}; expected only [matrix] and [[exclude]]"
        )
    rules = content.get("exclude", [])
    if not isinstance(rules, list):
        raise UsageError(f"{file}: expected [[exclude]] in double brackets, not [exclude]")
    axes = {**_values(file, content["matrix"]), **(chosen or {})}
    try:
        return make_matrix(axes, [_values(file, rule) for rule in rules])
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _values(file: Path, table: Mapping[str, Any]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for given, value in table.items():
        name = given.replace("_", "-")
        if name in values:
            raise UsageError(f"{file}: {name} is given twice, with '-' and with '_'")
        values[name] = list(_texts(file, given, value))
    return values


def _texts(file: Path, name: str, value: object) -> Iterable[str]:
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, (str, int, float)):
            raise UsageError(
                f"{file}: {name} = {item!r}: expected a string, a number, or a list of these"
            )
        yield ("on" if item else "off") if isinstance(item, bool) else str(item)
