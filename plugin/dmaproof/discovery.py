"""Finds the classes of a package by name, so that a new one is one new file and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def named_classes(package: ModuleType) -> dict[str, type]:
    """The classes that the modules of `package` define, by their attribute `name`.

    A class without a `name` of its own is a base for others, and left out.
    """
    found: dict[str, type] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for member in vars(module).values():
            if isinstance(member, type) and member.__module__ == module.__name__:
                name = vars(member).get("name")
                if isinstance(name, str):
                    found[name] = member
    return found
