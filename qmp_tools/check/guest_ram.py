"""One paused guest's RAM, whatever it stands in, as extents of files that can be compared.

Memory that QEMU shares (memfd, file, shared anonymous memory) is read where it is, in its process.
Everything else (private memory, huge pages) QEMU itself saves (QMP's pmemsave), a piece at a time,
into a private folder. In a shared file also those parts of a backend can be read that the physical
map hides (RAM behind the VGA window or the firmware); by pmemsave they cannot.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmaproof.errors import UntestableError
from dmaproof.page_compare import Extent

from ..processes.attachment import AttachedQemu
from ..processes.qmp import QmpError
from .physical_map import MapRegion, parse_flat_view, parse_hva
from .process_memory import SharedMemory, mappings_of, shared_memory


@dataclass(frozen=True)
class GuestRam:
    """`regions` is the physical map; `shared` has the regions that stand in a shared file.

    `hvas` are the addresses at which QEMU has its RAM regions mapped, in the order of the map.
    `backends` are QEMU's memory backends (id → bytes), `dimms` its memory devices (id → base
    address and bytes).
    """

    qemu: AttachedQemu
    regions: Sequence[MapRegion]
    hvas: Sequence[int | None]
    shared: Mapping[MapRegion, SharedMemory]
    backends: Mapping[str, int]
    dimms: Mapping[str, tuple[int, int]]
    folder: Path

    @property
    def length(self) -> int:
        """The bytes of RAM in the physical map."""
        return sum(region.length for region in self.regions if region.is_ram)

    def shared_extent(self, region: MapRegion, offset: int) -> Extent | None:
        """Where byte `offset` of the region's memory stands in a shared file, if it does."""
        memory = self.shared.get(region)
        return Extent(memory.fd, memory.offset + offset - region.offset) if memory else None

    @contextlib.asynccontextmanager
    async def extent(self, region: MapRegion, gpa: int, length: int) -> AsyncIterator[Extent]:
        """An extent with `length` bytes from `gpa` on, all of them in `region`.

        Raises:
            UntestableError: QEMU could not save its memory where it can be read.
        """
        shared = self.shared_extent(region, region.offset + gpa - region.gpa)
        if shared:
            yield shared
            return
        file = self.folder / f"{self.qemu.name.split()[0]}-{gpa:x}"
        try:
            await self._save(file, gpa, length)
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            file.unlink(missing_ok=True)
        try:
            yield Extent(fd)
        finally:
            os.close(fd)

    async def _save(self, file: Path, gpa: int, length: int) -> None:
        try:
            await self.qemu.qmp.execute("pmemsave", val=gpa, size=length, filename=str(file))
        except QmpError as error:
            raise UntestableError(
                f"{error}; the memory of {self.qemu.name} is one that only it can save: let it "
                f"write below {file.parent.parent} (TMPDIR sets another place), or give it shared "
                "memory (memory-backend-memfd,share=on)"
            ) from error
        if not file.exists() or file.stat().st_size != length:
            raise UntestableError(
                f"{self.qemu.name} saved its memory to {file}, but it is not there: QEMU has "
                "another file system (a container?). Run this inside, or give the guest shared "
                "memory (memory-backend-memfd,share=on)"
            )


@contextlib.asynccontextmanager
async def guest_ram(qemu: AttachedQemu, folder: Path) -> AsyncIterator[GuestRam]:
    """The RAM of a guest that stands still; pieces of private memory pass through `folder`.

    Raises:
        UntestableError: QEMU does not tell its map, or its process may not be looked at.
    """
    regions = parse_flat_view(await qemu.monitor("info mtree -f"))
    mappings = mappings_of(qemu.pid, qemu.name) if qemu.pid else []
    shared: dict[MapRegion, SharedMemory] = {}
    hvas: list[int | None] = []
    with contextlib.ExitStack() as stack:
        for region in regions:
            if not region.is_ram:
                continue
            hva = parse_hva(await qemu.monitor(f"gpa2hva {region.gpa:#x}"))
            hvas.append(hva)
            if hva is not None:
                memory = stack.enter_context(shared_memory(qemu.pid, mappings, hva, region.length))
                if memory:
                    shared[region] = memory
        backends = await qemu.qmp.execute("query-memdev")
        dimms = await qemu.qmp.execute("query-memory-devices")
        yield GuestRam(
            qemu=qemu,
            regions=regions,
            hvas=hvas,
            shared=shared,
            backends={it["id"]: it["size"] for it in backends if "id" in it},
            dimms={
                it["data"].get("id", it["type"]): _place(it["data"])
                for it in dimms
                if "size" in it["data"]
            },
            folder=folder,
        )


def _place(device: Mapping[str, int]) -> tuple[int, int]:
    # A DIMM has 'addr', persistent and paravirtual memory 'memaddr' (MemoryDeviceInfo).
    return device.get("addr", device.get("memaddr", 0)), device["size"]
