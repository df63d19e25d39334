"""The axes of a matrix, and the cells that they make.

Any option of a proof can be an axis: `proof.options.OPTIONS` says what it takes, so a new device,
tracker, scenario or option needs nothing here. A matrix comes from options (``--scenario
unix,tls``) or from a TOML file, whose form ``dmaproof matrix --help`` shows.
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

from ..proof.options import OPTIONS, find_option
from ..qemu.choice import known_qemus

Cell: TypeAlias = Mapping[str, str]
"""The options of one proof, by name: those that the matrix has, in its order."""

Values: TypeAlias = Mapping[str, Sequence[str]]
"""Values by the name of the option."""

ALL: Final = "all"
NONE: Final = "none"
"""How an option that is not given is shown."""
_TABLES: Final = ("matrix", "exclude")
_PATTERN: Final = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Matrix:
    """The product of `axes`, without what matches all of one of `excluded`.

    With an empty value an option is not given: 'fault = ["", "drop-pages=0.01"]'.
    """

    axes: Values
    excluded: Sequence[Values] = ()

    def cells(self) -> list[Cell]:
        """The cells; the last axis changes the fastest."""
        products = itertools.product(*self.axes.values())
        cells = [
            {name: value for name, value in zip(self.axes, values, strict=True) if value}
            for values in products
        ]
        return [cell for cell in cells if not any(_matches(cell, it) for it in self.excluded)]

    @property
    def varying(self) -> list[str]:
        """The axes that have more than one value."""
        return [name for name, values in self.axes.items() if len(values) > 1]

    def label(self, cell: Cell) -> str:
        """What tells `cell` from the others: 'scenario=tls tracker=iommu'."""
        names = self.varying or list(self.axes)
        return " ".join(f"{name}={cell.get(name, NONE)}" for name in names) or "proof"


def _matches(cell: Cell, rule: Values) -> bool:
    return all(
        any(fnmatchcase(cell.get(name, ""), pattern) for pattern in patterns)
        for name, patterns in rule.items()
    )


def known_values() -> dict[str, list[str]]:
    """What can be named by 'all' and by patterns: the values of each option that has a list."""
    qemus = [build.version for build in known_qemus()]
    # A device's name can have options after it, so there is no list of choices.
    named = {"device": sorted(emulated_devices()), "qemu": qemus, "qemu-destination": qemus}
    return named | {option.key: option.values for option in OPTIONS.values() if option.values}


def split_values(text: str) -> list[str]:
    """The values of 'unix,tls'. A comma before a 'name=' belongs to the value: 'q35,hpet=off'."""
    return re.split(r",(?![\w.-]+=)", text)


def make_matrix(axes: Values, excluded: Sequence[Values] = ()) -> Matrix:
    """The matrix of `axes`, with 'all' and patterns expanded.

    Raises:
        UsageError: there is no such option, or it cannot have that value, or nothing is left.
    """
    known = known_values()
    expanded: dict[str, list[str]] = {}
    for name, values in axes.items():
        option = find_option(name)
        found = [it for value in values for it in _expand(name, value, known.get(name, []))]
        for value in filter(None, found):
            option.value_of(value)
        if not found:
            raise UsageError(f"{name}: a value is due")
        expanded[name] = list(dict.fromkeys(found))
    for rule in excluded:
        if strangers := rule.keys() - expanded.keys():
            raise UsageError(f"exclude: {', '.join(sorted(strangers))} is no axis of the matrix")
    matrix = Matrix(expanded, excluded)
    if not matrix.cells():
        raise UsageError("the matrix has no cells: everything is excluded")
    return matrix


def _expand(name: str, value: str, known: Sequence[str]) -> list[str]:
    if value == ALL or (known and value not in known and _PATTERN.search(value)):
        pattern = "*" if value == ALL else value
        found = [it for it in known if fnmatchcase(it, pattern)]
        if not known:
            raise UsageError(f"{name} {value}: it has no list of values; name them")
        if not found:
            raise UsageError(f"{name} {value}: matches none of {', '.join(known)}")
        return found
    return [value]


def is_matrix(file: Path) -> bool:
    """Whether a file is TOML and has the table [matrix]."""
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
    """The matrix of a TOML file; axes that are `chosen` take the place of the file's.

    Raises:
        UsageError: it cannot be read, or is no matrix; see `make_matrix`.
    """
    content = _content(file)
    if not isinstance(content.get("matrix"), dict):
        raise UsageError(f"{file}: a table [matrix] is due, with an axis on each line")
    if strangers := content.keys() - set(_TABLES):
        raise UsageError(
            f"{file}: {', '.join(sorted(strangers))} is not known; there are [matrix] and "
            "[[exclude]]"
        )
    rules = content.get("exclude", [])
    if not isinstance(rules, list):
        raise UsageError(f"{file}: [[exclude]] is due, in double brackets")
    axes = {**_values(file, content["matrix"]), **(chosen or {})}
    try:
        return make_matrix(axes, [_values(file, rule) for rule in rules])
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _values(file: Path, table: Mapping[str, Any]) -> dict[str, list[str]]:
    return {name.replace("_", "-"): list(_texts(file, name, table[name])) for name in table}


def _texts(file: Path, name: str, value: object) -> Iterable[str]:
    for it in value if isinstance(value, list) else [value]:
        if not isinstance(it, (str, int, float)):
            raise UsageError(f"{file}: {name} = {it!r}: words and numbers are due, or a list")
        yield ("on" if it else "off") if isinstance(it, bool) else str(it)
