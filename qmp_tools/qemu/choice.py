"""Choose a QEMU to run, and a machine type that two QEMUs have in common."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UnsupportedError, UntestableError, UsageError

from ..arch import find_architecture
from ..arch.architecture import Architecture
from ..arguments import AnyPath
from ..host import distribution
from ..host.captured import run_captured
from ..host.timeout import DEFAULT_TIMEOUT_S
from .builds import QemuBuild, installed, own_builds
from .qemu import idle_qemu

_SYSTEMS: Final = "system"


def find_qemu(wanted: AnyPath | None, architecture: Architecture | None = None) -> Path:
    """Find the QEMU with the path or version `wanted`; for None, the system's.

    The system's QEMU takes precedence over a fetched one of the same version.

    Args:
        wanted: a path, the name of a program, a version such as '11.1', or the version and name of
            an own build ('11.1+fixed').
        architecture: the architecture of guests; by default that of this machine.

    Raises:
        UsageError: `wanted` is neither a program nor a known version.
        UntestableError: `wanted` is None, and no QEMU is installed or fetched.
    """
    architecture = architecture or find_architecture(None)
    if wanted is None:
        system = distribution.system_qemu(architecture)
        if system is not None:
            return system
        builds = installed(architecture)
        if builds:
            return builds[-1].path
        remedy = distribution.how_to_install(distribution.qemu(architecture))
        raise UntestableError(
            f"{architecture.qemu_program} is not installed: {remedy}; on Debian, 'dmaproof qemu "
            f"fetch 11.1{architecture.fetch_options}' fetches one without root"
        )
    wanted = os.fspath(wanted)
    found = shutil.which(wanted)
    if found is not None:
        return Path(found).absolute()
    builds = [*known_qemus(architecture), *own_builds(architecture)]
    fitting = [build for build in builds if build.fits(wanted)]
    if fitting:
        return (fitting[0] if fitting[0].suite == _SYSTEMS else fitting[-1]).path
    raise UsageError(
        f"--qemu {wanted}: neither a program nor an available version; available: "
        f"{', '.join(build.version for build in builds) or 'none'} "
        f"('dmaproof qemu fetch VERSION{architecture.fetch_options}' fetches more)"
    )


def known_qemus(architecture: Architecture) -> list[QemuBuild]:
    """Return the system's QEMU, if one is installed, followed by the fetched ones."""
    found = distribution.system_qemu(architecture)
    version = version_of(found) if found is not None else None
    system = [QemuBuild(version, _SYSTEMS, found)] if found and version else []
    return [*system, *installed(architecture)]


def version_of(binary: Path) -> str | None:
    """Return the version that a QEMU prints, such as '7.2.22'; None if the QEMU does not run."""
    try:
        done = run_captured([binary, "--version"], timeout_s=DEFAULT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"version (\d[\d.]*\d)", done.stdout)
    return match[1] if match else None


async def common_machine(wanted: str, source: Path, destination: Path, timeout_s: float) -> str:
    """Return a versioned machine type that both QEMUs have, for an alias such as 'q35'.

    Two builds of the same version resolve an alias to the same type. Else the result is the older
    QEMU's type. Properties after a comma ('q35,hpet=off') stay.

    Raises:
        UnsupportedError: a QEMU does not have the machine type, or the two QEMUs have no version of
            it in common.
    """
    name, comma, properties = wanted.partition(",")
    types = [await _machine_types(binary, timeout_s) for binary in (source, destination)]
    for binary, known in zip((source, destination), types, strict=True):
        if name not in known:
            raise UnsupportedError(
                f"machine {name}: {binary} does not have this machine type; '{binary} -machine "
                "help' lists its types"
            )
    for known, other in (types, types[::-1]):
        if known[name] in other:
            return known[name] + comma + properties
    raise UnsupportedError(
        f"machine {name}: {source} and {destination} have no version of it in common"
    )


async def _machine_types(binary: Path, timeout_s: float) -> dict[str, str]:
    """Return the QEMU's machine types by name and alias; each QEMU is asked only once."""
    if binary in _types:
        return _types[binary]
    async with idle_qemu("machine-types", binary, timeout_s=timeout_s) as qemu:
        answer: list[dict[str, Any]] = await qemu.qmp.execute("query-machines")
    types = {machine["name"]: machine["name"] for machine in answer}
    types |= {machine["alias"]: machine["name"] for machine in answer if "alias" in machine}
    _types[binary] = types
    return types


_types: dict[Path, dict[str, str]] = {}
