"""Read one paused guest's RAM, of any kind, as extents of files that can be compared.

Memory that QEMU shares (memfd, file, shared anonymous memory) is read in place. Private memory and
huge pages are copied from QEMU's process (`copied_memory`). Both ways also read the parts of a
backend that the physical map hides (RAM behind the VGA window or the firmware), by their host
address. If this user may not read the process, QEMU itself saves the RAM in the physical map (QMP's
pmemsave), one piece at a time, into a folder that only QEMU and this process can read.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError
from dmaproof.page_compare import Extent
from dmaproof.units import PAGE_BYTES

from ..host.process_status import has_thread, user_and_group
from ..qemu.machine import address_of
from ..qemu.qemu import Qemu
from ..qemu.qmp import QmpRefusal
from .absent_pages import Absent, absent_in_file, absent_in_process
from .copied_memory import ProcessMemory, process_memory
from .data_runs import DataRuns
from .pages import FilePages, FilePlace, PagedRam, ProcessPages, ReadablePages
from .physical_map import MapRegion, parse_flat_view, parse_hva
from .process_memory import Mapping as ProcessMapping
from .process_memory import (
    OutOfReachError,
    SharedMemory,
    mappings_of,
    shared_memory,
)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")  # random(4)


@dataclass(frozen=True)
class GuestRam(PagedRam):
    """The RAM of a paused guest of this host.

    `shared` has the regions that are in a shared
    file. `process` is the memory of QEMU's process, if this user may read it. QEMU saves the
    regions that are in neither.
    """

    qemu: Qemu
    regions: Sequence[MapRegion]
    hvas: Mapping[MapRegion, int]
    shared: Mapping[MapRegion, SharedMemory]
    process: ProcessMemory | None
    backends: Mapping[str, int]
    dimms: Mapping[str, tuple[int, int]]
    folder: Path
    boot_id: str
    _data_runs: dict[int, DataRuns] = field(default_factory=dict)

    @property
    def files(self) -> dict[MapRegion, FilePlace]:
        """The regions that are in a shared file."""
        return {
            region: FilePlace(memory.device, memory.inode, memory.offset)
            for region, memory in self.shared.items()
        }

    @contextlib.asynccontextmanager
    async def pages(self, region: MapRegion, gpa: int, count: int) -> AsyncIterator[ReadablePages]:
        """Make `count` pages from `gpa` on; see `PagedRam`."""
        if found := self._readable(region, region.offset + gpa - region.gpa, count):
            yield found
            return
        fd = await self._save(gpa, count * PAGE_BYTES)
        try:
            yield FilePages(
                Extent(fd), count, DataRuns(fd), lambda: self.absent(region, gpa, count)
            )
        finally:
            os.close(fd)

    async def hidden_pages(
        self, region: MapRegion, offset: int, count: int
    ) -> ReadablePages | None:
        """Make `count` pages from byte `offset` of the region's backend on; see `PagedRam`."""
        return self._readable(region, offset, count)

    def _readable(self, region: MapRegion, offset: int, count: int) -> ReadablePages | None:
        """Make `count` pages from byte `offset` on; None if only QEMU can read them."""
        gpa = region.gpa + offset - region.offset

        def absent() -> Absent:
            return self.absent(region, gpa, count)

        if shared := self.shared_extent(region, offset):
            return FilePages(shared, count, self._runs_of(shared.fd), absent)
        address = self._address(region, offset, count * PAGE_BYTES)
        if self.process is None or address is None:
            return None
        return ProcessPages(self.process, address, count, absent)

    def _runs_of(self, fd: int) -> DataRuns:
        return self._data_runs.setdefault(fd, DataRuns(fd))

    def shared_extent(self, region: MapRegion, offset: int) -> Extent | None:
        """Return the place of byte `offset` of the region's memory in a shared file, if any."""
        memory = self.shared.get(region)
        return Extent(memory.fd, memory.offset + offset - region.offset) if memory else None

    @property
    def copied(self) -> list[MapRegion]:
        """The regions that dmaproof copies from QEMU's process."""
        return [
            region
            for region in self.regions
            if region.is_ram
            and region not in self.shared
            and self._address(region, region.offset, region.length) is not None
        ]

    def _address(self, region: MapRegion, offset: int, length: int) -> int | None:
        """Return the host address of byte `offset` of the region's memory, if it may be read."""
        hva = self.hvas.get(region)
        if self.process is None or hva is None:
            return None
        address = hva + offset - region.offset
        return address if self.process.has(address, length) else None

    def absent(self, region: MapRegion, gpa: int, pages: int) -> Absent:
        """Find the absent pages among `pages` pages from `gpa` on, all of them in `region`."""
        offset = region.offset + gpa - region.gpa
        if shared := self.shared_extent(region, offset):
            return absent_in_file(self._runs_of(shared.fd), shared.offset, pages)
        mappings = self.process.mappings if self.process else ()
        address = self._address(region, offset, pages * PAGE_BYTES)
        return absent_in_process(self.qemu.pid, mappings, address or 0, pages)

    async def _save(self, gpa: int, length: int) -> int:
        """Have QEMU save `length` bytes from `gpa` on; return a descriptor of the deleted file."""
        file = self.folder / f"{gpa:x}"
        try:
            await self.qemu.qmp.execute("pmemsave", val=gpa, size=length, filename=str(file))
            fd = _open_plain(file, length)
        except QmpRefusal as error:
            raise UntestableError(
                f"{error}. QEMU must save its memory, because this user may not read "
                f"process {self.qemu.pid}: run dmaproof as root (with CAP_SYS_PTRACE), or set "
                "TMPDIR to a folder that QEMU can reach, or give the guest shared memory "
                "(memory-backend-memfd,share=on)"
            ) from error
        finally:
            file.unlink(missing_ok=True)
        if fd is None:
            raise UntestableError(
                f"{self.qemu.name} saved its memory to {file}, but the file does not exist: QEMU "
                "has another file system, as in a container. Run dmaproof in the container, or "
                "give the guest shared memory (memory-backend-memfd,share=on)"
            )
        return fd


def _open_plain(file: Path, length: int) -> int | None:
    """Open a regular file of `length` bytes; return None if there is no such file.

    QEMU's user owns the file's folder, and may have put any kind of file there.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size == length:
        return fd
    os.close(fd)
    return None


@contextlib.asynccontextmanager
async def guest_ram(qemu: Qemu, folder: Path) -> AsyncIterator[GuestRam]:
    """Open the RAM of a paused guest; pieces that QEMU saves pass through a folder in `folder`.

    Raises:
        UntestableError: QEMU does not report its physical map, or this user cannot read the memory
            in any way.
    """
    regions = parse_flat_view(await qemu.monitor("info mtree -f"))
    mappings = await _mappings_of(qemu)
    shared: dict[MapRegion, SharedMemory] = {}
    hvas: dict[MapRegion, int] = {}
    with contextlib.ExitStack() as stack:
        for region in regions:
            if not region.is_ram:
                continue
            hva = parse_hva(await qemu.monitor(f"gpa2hva {region.gpa:#x}"))
            if hva is not None:
                hvas[region] = hva
                memory = stack.enter_context(shared_memory(qemu.pid, mappings, hva, region.length))
                if memory and memory.page_bytes == mmap.PAGESIZE:
                    shared[region] = memory
        backends = await qemu.qmp.execute("query-memdev")
        dimms = await qemu.qmp.execute("query-memory-devices")
        process = process_memory(qemu.pid, qemu.name, mappings) if mappings else None
        yield GuestRam(
            qemu=qemu,
            regions=regions,
            hvas=hvas,
            shared=shared,
            process=stack.enter_context(process) if process else None,
            backends={backend["id"]: backend["size"] for backend in backends if "id" in backend},
            dimms={
                dimm["data"].get("id", dimm["type"]): (
                    address_of(dimm["data"]),
                    dimm["data"]["size"],
                )
                for dimm in dimms
                if "size" in dimm["data"]
            },
            folder=_folder_for(qemu, folder),
            boot_id=_BOOT_ID.read_text().strip(),
        )


async def _mappings_of(qemu: Qemu) -> list[ProcessMapping]:
    """Return the mappings of QEMU's process; none if its PID is unknown or QEMU must save its RAM.

    Raises:
        OutOfReachError: the process belongs to another user, and this user is not root.
    """
    threads = [vcpu["thread-id"] for vcpu in await qemu.qmp.execute("query-cpus-fast")]
    if not qemu.pid or (threads and not has_thread(qemu.pid, threads[0])):
        return []  # `pid` is a supervisor's, which opened the socket
    try:
        return mappings_of(qemu.pid, qemu.name)
    except OutOfReachError:
        user, _ = user_and_group(qemu.pid)
        if os.geteuid() not in (0, user):
            raise
        return []


def _folder_for(qemu: Qemu, folder: Path) -> Path:
    """Make a folder in `folder` that QEMU can write, and only QEMU and this user can read."""
    own = Path(tempfile.mkdtemp(dir=folder))
    if os.geteuid() == 0 and qemu.pid:
        with contextlib.suppress(OSError):  # without CAP_CHOWN, QEMU reports that it cannot write
            user, group = user_and_group(qemu.pid)
            os.chown(own, user, group)
            folder.chmod(0o711)
    return own
