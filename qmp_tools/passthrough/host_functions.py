"""Two VFIO functions of this host as the device of a proof: QEMU's vfio-pci has one on each side.

What they write is not known here, so there is no journal: who lost a page stays open, and how sharp
a proof was is known from its guest alone. `vfio_functions` reports beforehand what is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from dmaproof.errors import UntestableError, UsageError

from ..devices.device import AttachedDevice, DeviceFacts, ProofDevice
from ..guest.own import OWN_GUEST
from ..host.finding import Finding, State
from ..qemu.machine import SOURCE
from .tracking import Tracking
from .vfio_functions import (
    Function,
    Host,
    examine,
    examine_pair,
    find_function,
    lockable_bytes,
    look,
)

PREFIX: Final = "vfio:"
_CONTAINER: Final = "container"


class MissingError(UntestableError):
    """A proof on functions of the host cannot be made; `missing` has all that it lacks."""

    def __init__(self, message: str, missing: Sequence[Finding]) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True)
class HostFunctions(ProofDevice):
    """With the legacy container unless `iommufd`."""

    source: Function
    destination: Function
    iommufd: bool = True

    guests: ClassVar[Collection[str]] = (OWN_GUEST,)

    @property
    def facts(self) -> DeviceFacts:
        name = f"{PREFIX}{self.source.address},{self.destination.address}"
        return DeviceFacts(name if self.iommufd else f"{name},{_CONTAINER}", 0)

    def prerequisites(self, memory_bytes: int) -> Sequence[str]:
        return require_testable(self, memory_bytes, Host())

    @contextlib.asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        yield _AttachedFunctions(self)


class _AttachedFunctions(AttachedDevice):
    def __init__(self, functions: HostFunctions) -> None:
        self._functions = functions

    async def attach(self, side: str) -> Sequence[str]:
        ours = self._functions
        function = ours.source if side == SOURCE else ours.destination
        return Tracking(iommufd=ours.iommufd).arguments(function.sysfs)


def parse_functions(text: str, host: Host) -> HostFunctions:
    """The functions of 'vfio:SOURCE,DESTINATION', or of 'vfio:SOURCE,DESTINATION,container'.

    Of one alone, it is the source and the destination, which `require_testable` does not let pass.

    Raises:
        UsageError: it is nothing of the kind, or one of them is not there.
    """
    addresses = text.removeprefix(PREFIX).split(",")
    container = addresses[-1] == _CONTAINER
    if container:
        addresses.pop()
    if not 1 <= len(addresses) <= 2:
        raise UsageError(f"--device {text}: {PREFIX}SOURCE,DESTINATION is due, two PCI addresses")
    functions = [find_function(address, host) for address in addresses]
    return HostFunctions(functions[0], functions[-1], not container)


def require_testable(functions: HostFunctions, memory_bytes: int, host: Host) -> list[str]:
    """Lines that tell what there is, where a proof with a guest of `memory_bytes` can be made.

    Raises:
        MissingError: it cannot; all that is missing is told, each with its remedy.
    """
    sides = dict.fromkeys((functions.source, functions.destination))
    facts = [look(side, host, iommufd=functions.iommufd) for side in sides]
    # The container counts what a QEMU locks, iommufd what the user does (IOPT_PAGES_ACCOUNT_USER).
    locked_bytes = memory_bytes * (2 if functions.iommufd else 1)
    lockable = lockable_bytes()
    told: list[tuple[str, Finding]] = []
    for side in facts:
        told += [(side.function.address, it) for it in examine(side, locked_bytes, lockable)]
    told += [("both", finding) for finding in examine_pair(facts[0], facts[-1])]
    lines = [f"{who}: {it.name}: {it.what}" for who, it in told]
    if all(finding.state is not State.MISSING for _, finding in told):
        return lines
    missing = [
        f"  {line}" + (f"\n    remedy: {finding.remedy}" if finding.remedy else "")
        for line, (_, finding) in zip(lines, told, strict=True)
        if finding.state is State.MISSING
    ]
    raise MissingError(
        f"{functions.facts.device} cannot be proved:\n" + "\n".join(missing),
        [finding for _, finding in told if finding.state is State.MISSING],
    )
