"""Find the kernels that are installed in a system, or in the unpacked packages of one.

Fedora, Arch, openSUSE and Debian's releases after 13 have ``/usr/lib/modules/VERSION/vmlinuz``.
Older Debian releases and Ubuntu have ``/boot/vmlinuz-VERSION``, and Alpine ``/boot/vmlinuz-lts``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from .modules import MODULE_TREES, exists

_NAMES: Final = ("vmlinuz", "vmlinux", "Image")
"""Debian has vmlinux for riscv64, and openSUSE has Image for aarch64."""


def installed_images(root: Path, running: str = "") -> list[Path]:
    """Return the kernels of a system: those of the `running` version first, then the newest.

    Args:
        root: the root folder of the system.
        running: the release of the running kernel, which need not be installed: a container has
            the files of its own distribution.
    """
    found = {
        folder.name: _numbers(folder.name)
        for tree in MODULE_TREES
        for folder in (root / tree).glob("*")
        if folder.is_dir()
    }
    versions = sorted(found, key=lambda name: (name == running, found[name], name), reverse=True)
    boot = root / "boot"
    images = [
        place
        for version in versions
        for name in _NAMES
        for place in (
            *(root / tree / version / name for tree in MODULE_TREES),
            boot / f"{name}-{version}",
        )
        if exists(place)
    ]
    # Some distributions leave the version out of the name.
    images += sorted(file for name in _NAMES for file in boot.glob(f"{name}*") if exists(file))
    files: dict[Path, Path] = {}
    for image in images:
        files.setdefault(image.resolve(), image)
    return list(files.values())


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
