"""Two VFIO functions of this host as the device of a proof, one for QEMU's vfio-pci on each side.

Functions of the host have no journal, so the cause of a lost page stays unknown, and only the guest
can report the proof's sensitivity. `vfio_functions` checks the prerequisites before the proof.
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
    gather_facts,
    lockable_bytes,
)

PREFIX: Final = "vfio:"
_CONTAINER: Final = "container"


class MissingError(UntestableError):
    """A proof on functions of the host is not possible; `missing` has the missing prerequisites."""

    def __init__(self, message: str, missing: Sequence[Finding]) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True)
class HostFunctions(ProofDevice):
    """The two functions, which QEMU opens through iommufd, or else through the legacy container."""

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
        functions = self._functions
        function = functions.source if side == SOURCE else functions.destination
        return Tracking(iommufd=functions.iommufd).arguments(function.sysfs)


def parse_functions(text: str, host: Host) -> HostFunctions:
    """Return the functions of 'vfio:SOURCE,DESTINATION' or 'vfio:SOURCE,DESTINATION,container'.

    A single function is both source and destination, which `require_testable` refuses.

    Raises:
        UsageError: `text` has another form, or a function does not exist.
    """
    addresses = text.removeprefix(PREFIX).split(",")
    container = addresses[-1] == _CONTAINER
    if container:
        addresses.pop()
    if not 1 <= len(addresses) <= 2:
        raise UsageError(
            f"--device {text}: expected {PREFIX}SOURCE,DESTINATION with two PCI addresses"
        )
    functions = [find_function(address, host) for address in addresses]
    return HostFunctions(functions[0], functions[-1], not container)


def require_testable(functions: HostFunctions, memory_bytes: int, host: Host) -> list[str]:
    """Check the prerequisites of a proof with a guest of `memory_bytes`; return a line for each.

    Raises:
        MissingError: some are missing; the message has all of these, each with its remedy.
    """
    sides = dict.fromkeys((functions.source, functions.destination))
    facts = [gather_facts(side, host, iommufd=functions.iommufd) for side in sides]
    # The container counts what a QEMU locks, iommufd what the user does (IOPT_PAGES_ACCOUNT_USER).
    locked_bytes = memory_bytes * (2 if functions.iommufd else 1)
    lockable = lockable_bytes()
    found: list[tuple[str, Finding]] = []
    for side in facts:
        findings = examine(side, locked_bytes, lockable)
        found += [(side.function.address, finding) for finding in findings]
    found += [("both", finding) for finding in examine_pair(facts[0], facts[-1])]
    lines = [f"{where}: {finding.name}: {finding.what}" for where, finding in found]
    if all(finding.state is not State.MISSING for _, finding in found):
        return lines
    missing = [
        f"  {line}" + (f"\n    remedy: {finding.remedy}" if finding.remedy else "")
        for line, (_, finding) in zip(lines, found, strict=True)
        if finding.state is State.MISSING
    ]
    raise MissingError(
        f"{functions.facts.device} cannot be tested, because prerequisites are missing:\n"
        + "\n".join(missing),
        [finding for _, finding in found if finding.state is State.MISSING],
    )
