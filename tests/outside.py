"""Installs third-party distributions into a folder, without a build and without network."""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

OUTSIDE_PACKAGE: Final = Path(__file__).parent / "outside_package"

EntryPoints = Mapping[str, Mapping[str, str]]
"""Group → name of the entry point → object that it refers to."""


def install(target: Path, name: str, entry_points: EntryPoints) -> None:
    """Write a distribution's metadata into the folder `target`, as an installer does."""
    info = target / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, parts in entry_points.items():
        lines += [f"[{group}]", *(f"{part} = {place}" for part, place in parts.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def install_outside_package(target: Path) -> None:
    """Install `OUTSIDE_PACKAGE` into the folder `target`."""
    project = tomllib.loads((OUTSIDE_PACKAGE / "pyproject.toml").read_text())
    install(target, project["project"]["name"], project["project"]["entry-points"])
    for module in project["tool"]["setuptools"]["py-modules"]:
        shutil.copy(OUTSIDE_PACKAGE / f"{module}.py", target)


def environment(target: Path) -> dict[str, str]:
    """Return the environment of a process that finds the distributions in `target`."""
    others = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(target), others)))}
