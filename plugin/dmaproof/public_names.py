"""Public names of both packages, imported at their first use.

A package's ``__init__`` imports nothing that takes long: numpy and the devices take 0.25 s to
import, and the command line imports only `dmaproof.errors` until it knows what to do. Type checkers
read the imports below the package's ``if TYPE_CHECKING`` instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def import_on_demand(
    namespace: dict[str, Any], homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__`` (PEP 562).

    A name is imported when it is first asked for, and put into `namespace`. ``__version__``, the
    version of the distribution that has both packages, is a name of each package.

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
    """The distribution's version, or a stand-in where the package runs from a plain tree."""
    from importlib import metadata  # takes longer than the rest of this module

    try:
        return metadata.version("dmaproof")
    except metadata.PackageNotFoundError:
        return "0+unknown"
