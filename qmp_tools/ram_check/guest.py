"""One of the two guests of a comparison: a QEMU, or a snapshot of a QEMU."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dmaproof.errors import UntestableError

from ..memory.guest_ram import GuestRam, guest_ram
from ..memory.pages import PagedRam
from ..memory.ram_blocks import RamBlock, parse_ram_blocks
from ..qemu.qemu import Qemu
from .discarded import Discarder, discarders
from .migrated import GuestState, guest_state


@dataclass(frozen=True)
class Side:
    """The facts about one of the guests; `address` says where it was found (see `Qemu`).

    Of its RAM, `in_place_bytes` were read in place, `copied_bytes` were copied from QEMU's process,
    and `saved_bytes` were saved by QEMU. `snapshot` is the file from which the guest was read, if
    it was; it was `taken` at that time (ISO 8601, UTC) on `host`.
    """

    address: str
    pid: int
    version: str
    status: str
    accelerator: str
    in_place_bytes: int
    copied_bytes: int
    saved_bytes: int
    snapshot: str | None = None
    taken: str | None = None
    host: str | None = None


class Guest(ABC):
    """A guest that can be compared.

    `discarders` are the devices through which the guest may give memory back, and `blocks` are
    QEMU's RAM blocks, if QEMU reports them. `capabilities` are the migration capabilities that are
    on. `facts` are for the report.
    """

    ram: PagedRam
    discarders: Sequence[Discarder]
    blocks: Sequence[RamBlock]
    capabilities: Sequence[str]
    facts: Side

    @abstractmethod
    async def state(self) -> GuestState:
        """Return the present state."""

    def side(self, state: GuestState) -> Side:
        """Return the facts with the run state of `state`."""
        return replace(self.facts, status=state.run_state)


@dataclass(frozen=True)
class LiveGuest(Guest):
    """The guest of a QEMU that answers QMP, or answered when `facts` were collected."""

    qemu: Qemu
    ram: GuestRam
    discarders: Sequence[Discarder]
    blocks: Sequence[RamBlock]
    capabilities: Sequence[str]
    facts: Side

    async def state(self) -> GuestState:
        """Ask QEMU for the state."""
        return await guest_state(self.qemu)


@contextlib.asynccontextmanager
async def live_guest(qemu: Qemu, folder: Path) -> AsyncIterator[LiveGuest]:
    """Open the guest of `qemu`; pieces of RAM that QEMU saves pass through a folder in `folder`.

    Raises:
        UntestableError: QEMU does not report its physical map, or this user cannot read the memory
            in any way.
    """
    kvm = await qemu.qmp.execute("query-kvm")
    async with guest_ram(qemu, folder) as ram:
        in_place = sum(region.length for region in ram.shared)
        copied = sum(region.length for region in ram.copied)
        facts = Side(
            address=qemu.address,
            pid=qemu.pid,
            version=qemu.version,
            status="",
            accelerator="kvm" if kvm["enabled"] else "other",
            in_place_bytes=in_place,
            copied_bytes=copied,
            saved_bytes=ram.length - in_place - copied,
        )
        capabilities = await qemu.qmp.execute("query-migrate-capabilities")
        yield LiveGuest(
            qemu,
            ram,
            await discarders(qemu),
            await _ram_blocks(qemu),
            [each["capability"] for each in capabilities if each["state"]],
            facts,
        )


async def _ram_blocks(qemu: Qemu) -> list[RamBlock]:
    """Return the RAM blocks of `qemu`; empty if its human monitor does not report them."""
    with contextlib.suppress(UntestableError):
        return parse_ram_blocks(await qemu.monitor("info ramblock"))
    return []
