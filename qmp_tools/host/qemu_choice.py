"""Which QEMU to run, and which machine type two of them have in common."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any, Final

from dmaproof.errors import UntestableError, UsageError

from ..processes.qemu import Qemu
from ..processes.run_folder import run_folder
from .qemu_builds import installed

_PROGRAM: Final = "qemu-system-x86_64"


def find_qemu(wanted: str | None) -> Path:
    """The QEMU at the path `wanted`, the fetched one of that version, or for None the system's.

    Raises:
        UsageError: there is nothing at the path, and no such version was fetched.
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
    found = shutil.which(wanted)
    if found is not None:
        return Path(found).absolute()
    for build in reversed(installed()):
        if build.version == wanted or build.version.startswith(wanted + "."):
            return build.path
    raise UsageError(
        f"--qemu {wanted}: no such program, and no fetched version ('dmaproof qemu list' shows "
        "them, 'dmaproof qemu fetch' brings one)"
    )


async def common_machine(wanted: str, source: Path, destination: Path) -> str:
    """A versioned machine type that both QEMUs have, for an alias such as 'q35'.

    Two builds of one version resolve an alias alike; else it is the older one's type.

    Raises:
        UsageError: one of them does not have the machine type.
        UntestableError: they have no version of it in common.
    """
    types = await asyncio.gather(_machine_types(source), _machine_types(destination))
    for binary, known in zip((source, destination), types, strict=True):
        if wanted not in known:
            raise UsageError(f"--machine {wanted}: {binary} has no such machine type")
    for known, other in (types, types[::-1]):
        if known[wanted] in other:
            return known[wanted]
    raise UntestableError(
        f"{source} and {destination} have no version of machine type {wanted} in common"
    )


async def _machine_types(binary: Path) -> dict[str, str]:
    """Machine type or alias → the name of the type."""
    with run_folder() as folder:
        qemu = await Qemu.start("machine-types", binary, ["-machine", "none"], folder)
        try:
            answer: list[dict[str, Any]] = await qemu.qmp.execute("query-machines")
        finally:
            await qemu.end()
    types = {machine["name"]: machine["name"] for machine in answer}
    types |= {machine["alias"]: machine["name"] for machine in answer if "alias" in machine}
    return types
