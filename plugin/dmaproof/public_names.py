"""Public names of both packages, imported at their first use.

A package's ``__init__`` imports nothing that takes long. numpy and the devices take 0.25 s to
import, and the command line imports only `dmaproof.errors` until it has read its arguments. Type
checkers read the imports below the package's ``if TYPE_CHECKING`` instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def import_on_demand(
    namespace: dict[str, Any], homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__`` (PEP 562).

    The first access to a name imports it and stores it in `namespace`. Each package also has the
    name ``__version__``: the version of the distribution that contains both packages.

    Args:
        namespace: the ``globals()`` of the package.
        homes: the public names by the module that defines them, relative to the package.

    Returns:
        The two functions. The first raises `AttributeError` for a name that is not public.
    """
    package: str = namespace["__name__"]
    home_of = {name: home for home, names in homes.items() for name in names}

    def import_name(name: str) -> object:
        if name == "__version__":
            value: object = _version()
        elif name in home_of:
            value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value
        return value

    def list_names() -> list[str]:
        return sorted({*namespace, *home_of, "__version__"})

    return import_name, list_names


def _version() -> str:
    """Return the distribution's version, or "0+unknown" if the package is not installed."""
    from importlib import metadata  # slower to import than the rest of this module

    try:
        return metadata.version("dmaproof")
    except metadata.PackageNotFoundError:
        return "0+unknown"
