"""Which QEMU to run, and which machine type two of them have in common."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UnsupportedError, UntestableError, UsageError

from ..arguments import AnyPath
from ..host.timeout import DEFAULT_TIMEOUT_S
from .builds import QemuBuild, installed
from .qemu import idle_qemu

_PROGRAM: Final = "qemu-system-x86_64"
_SYSTEMS: Final = "system"


def find_qemu(wanted: AnyPath | None) -> Path:
    """The QEMU at the path `wanted`, the one of that version, or for None the system's.

    Of a version, the system's goes before one that was fetched.

    Raises:
        UsageError: there is nothing at the path, and no such version.
        UntestableError: the system has none, and none was fetched.
    """
    if wanted is None:
        found = shutil.which(_PROGRAM)
        if found is not None:
            return Path(found)
        builds = installed()
        if builds:
            return builds[-1].path
        raise UntestableError(
            "there is no QEMU: 'apt-get install qemu-system-x86' brings the system's, "
            "'dmaproof qemu fetch' a newer one without root"
        )
    wanted = os.fspath(wanted)
    found = shutil.which(wanted)
    if found is not None:
        return Path(found).absolute()
    builds = known_qemus()
    fitting = [it for it in builds if f"{it.version}.".startswith(f"{wanted}.")]
    if fitting:
        return (fitting[0] if fitting[0].suite == _SYSTEMS else fitting[-1]).path
    raise UsageError(
        f"--qemu {wanted}: no such program, and no such version; there are: "
        f"{', '.join(build.version for build in builds) or 'none'} "
        "('dmaproof qemu fetch' brings more)"
    )


def known_qemus() -> list[QemuBuild]:
    """The system's QEMU, if there is one, and behind it those that were fetched."""
    found = shutil.which(_PROGRAM)
    version = version_of(Path(found)) if found is not None else None
    system = [QemuBuild(version, _SYSTEMS, Path(found))] if found and version else []
    return [*system, *installed()]


def version_of(binary: Path) -> str | None:
    """The version that a QEMU says it has, such as '7.2.22'; None where it does not run."""
    try:
        done = subprocess.run(
            [binary, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DEFAULT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"version (\d[\d.]*\d)", done.stdout)
    return match[1] if match else None


async def common_machine(wanted: str, source: Path, destination: Path, timeout_s: float) -> str:
    """A versioned machine type that both QEMUs have, for an alias such as 'q35'.

    Two builds of one version resolve an alias alike; else it is the older one's type. Properties
    behind a comma ('q35,hpet=off') stay.

    Raises:
        UnsupportedError: one of them does not have the machine type, or they have no version of it
            in common.
    """
    name, comma, properties = wanted.partition(",")
    types = [await _machine_types(binary, timeout_s) for binary in (source, destination)]
    for binary, known in zip((source, destination), types, strict=True):
        if name not in known:
            raise UnsupportedError(f"machine {name}: {binary} has no such machine type")
    for known, other in (types, types[::-1]):
        if known[name] in other:
            return known[name] + comma + properties
    raise UnsupportedError(
        f"machine {name}: {source} and {destination} have no version of it in common"
    )


async def _machine_types(binary: Path, timeout_s: float) -> dict[str, str]:
    """Machine type or alias → the name of the type; asked once of each QEMU."""
    if binary in _types:
        return _types[binary]
    async with idle_qemu("machine-types", binary, timeout_s=timeout_s) as qemu:
        answer: list[dict[str, Any]] = await qemu.qmp.execute("query-machines")
    types = {machine["name"]: machine["name"] for machine in answer}
    types |= {machine["alias"]: machine["name"] for machine in answer if "alias" in machine}
    _types[binary] = types
    return types


_types: dict[Path, dict[str, str]] = {}
