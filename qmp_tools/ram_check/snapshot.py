"""Take a snapshot of a paused guest, and use it in place of its QEMU in a comparison.

A snapshot has the physical map, a digest of each page, and what QEMU reported about the migration.
It can be taken on another host, and outlives its QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import itertools
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import IO, Final

from dmaproof.errors import UntestableError, WaitTimeoutError
from dmaproof.units import PAGE_BYTES

from ..arguments import AnyPath, path_of
from ..host.timeout import wait_until
from ..memory.copied_memory import PIECE_BYTES
from ..memory.pages import FilePlace, PagedRam, SavedPages
from ..memory.physical_map import MapRegion, hidden_parts, is_backend
from ..memory.ram_blocks import RamBlock
from .discarded import Discarder
from .guest import Guest, LiveGuest, Side
from .known_differences import PLACES
from .migrated import GuestState
from .snapshot_file import MAGIC, SnapshotFile, SnapshotWriter, incomplete, made_of, typed

_FAILURE: Final = "failure"
"""The member of the index of a file whose writer could not take the snapshot: the reason."""
_LOOK_EVERY_S: Final = 0.05


class Snapshot(Guest):
    """A guest as it was when the snapshot was taken.

    Example::

        snapshot = Snapshot.read("source.snap")
        check(snapshot, "/run/destination.qmp").require_equal()
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        """Use the complete snapshot in `file`, called `name` in messages; `file` may be closed."""
        saved = SnapshotFile(file, name)
        index = saved.index
        if reason := index.get(_FAILURE):
            raise UntestableError(f"{name} has no snapshot: {reason}")
        self.name = name
        try:
            self.ram = SavedRam(saved)
            self.discarders = [
                made_of(Discarder, device) for device in typed(index["discarders"], list)
            ]
            self.blocks = [made_of(RamBlock, block) for block in typed(index["ram_blocks"], list)]
            self.capabilities = [typed(name, str) for name in typed(index["capabilities"], list)]
            self.facts = replace(
                made_of(Side, index["side"]),
                snapshot=name,
                taken=typed(index["taken"], str),
                host=typed(index["host"], str),
            )
            self._state = made_of(GuestState, index["state"])
        except (ValueError, TypeError, KeyError) as error:
            raise incomplete(name, error) from None

    @classmethod
    def read(cls, path: AnyPath) -> Snapshot:
        """Read the snapshot in the file at `path`.

        Raises:
            UntestableError: the file does not exist, or is not a complete snapshot.
        """
        path = path_of("path", path)
        try:
            with path.open("rb") as file:
                return cls(file, str(path))
        except OSError as error:
            raise UntestableError(f"cannot read {path}: {error.strerror}") from None

    async def state(self) -> GuestState:
        """Return the state in which the guest was."""
        return replace(self._state, name=f"{self._state.name} in {self.name}")


class SavedRam(PagedRam):
    """The RAM of a snapshot."""

    def __init__(self, saved: SnapshotFile) -> None:
        self._saved = saved
        index = saved.index
        self.backends = {
            name: typed(size, int) for name, size in typed(index["backends"], dict).items()
        }
        self.dimms = {
            name: (typed(base, int), typed(size, int))
            for name, (base, size) in typed(index["dimms"], dict).items()
        }
        self.boot_id = typed(index["boot_id"], str)
        self.hvas: dict[MapRegion, int] = {}
        self.regions = []
        for members in typed(index["regions"], list):
            self.regions.append(region := made_of(MapRegion, members))
            if (hva := typed(members["hva"], int, type(None))) is not None:
                self.hvas[region] = hva

    @property
    def files(self) -> Mapping[MapRegion, FilePlace]:
        """No region: the content is that of another time than that of a file."""
        return {}

    @contextlib.asynccontextmanager
    async def pages(self, region: MapRegion, gpa: int, count: int) -> AsyncIterator[SavedPages]:
        """Make `count` pages from `gpa` on; see `PagedRam`."""
        found = await asyncio.to_thread(self._saved.pages, gpa, count)
        if found is None:
            raise UntestableError(
                f"{self._saved.name} is damaged: it does not contain the pages of {region.name} "
                f"from {gpa:#x} on"
            )
        yield found

    async def hidden_pages(self, region: MapRegion, offset: int, count: int) -> SavedPages | None:
        """Make `count` pages from byte `offset` of the region's backend on; see `PagedRam`."""
        name = _backend_of(region)
        return await asyncio.to_thread(self._saved.pages, offset, count, hidden_in=name)


@dataclass(frozen=True)
class _Place:
    """Consecutive pages to be saved: in `region`, from byte `offset` on, at `gpa` or hidden."""

    region: MapRegion
    gpa: int | None
    offset: int
    pages: int


async def write_snapshot(
    guest: LiveGuest, state: GuestState, file: FileIO, *, with_content: bool = False
) -> None:
    """Write a snapshot of a paused guest into `file`, as `create` makes it.

    Args:
        guest: the guest.
        state: its state at the time of the snapshot.
        file: a file for a snapshot.
        with_content: whether to save the bytes of each page that is not zero, not only its digest.

    Raises:
        UntestableError: the memory cannot be read.
    """
    taken = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    writer = SnapshotWriter(file)
    for place in _places(guest.ram):
        await _write(guest, place, writer, with_content=with_content)
    ram = guest.ram
    side = asdict(guest.side(state))
    for name in ("snapshot", "taken", "host"):
        del side[name]
    writer.end(
        {
            "taken": taken,
            "host": socket.gethostname(),
            "boot_id": ram.boot_id,
            "side": side,
            "state": asdict(state),
            "regions": [{**asdict(region), "hva": ram.hvas.get(region)} for region in ram.regions],
            "backends": dict(ram.backends),
            "dimms": {name: list(place) for name, place in ram.dimms.items()},
            "discarders": [asdict(device) for device in guest.discarders],
            "ram_blocks": [asdict(block) for block in guest.blocks],
            "capabilities": list(guest.capabilities),
        }
    )


def write_failure(file: FileIO, reason: str) -> None:
    """Write into `file` why there is no snapshot, for a reader that waits for the snapshot."""
    file.seek(len(MAGIC))
    file.truncate()
    SnapshotWriter(file).end({_FAILURE: reason})


async def _write(
    guest: LiveGuest, place: _Place, writer: SnapshotWriter, *, with_content: bool
) -> None:
    if place.gpa is None:
        pages = await guest.ram.hidden_pages(place.region, place.offset, place.pages)
        if pages is not None:
            where = (None, _backend_of(place.region), place.offset)
            await asyncio.to_thread(
                writer.add, where, pages, with_absent=False, with_content=with_content
            )
        return
    is_known_place = any(place.gpa in known for known in PLACES)
    async with guest.ram.pages(place.region, place.gpa, place.pages) as pages:
        await asyncio.to_thread(
            writer.add,
            (place.gpa, place.region.name, place.offset),
            pages,
            with_absent=bool(guest.discarders),
            with_content=with_content or is_known_place,
        )


def _places(ram: PagedRam) -> Iterator[_Place]:
    """Yield all RAM, in pieces of at most `PIECE_BYTES`."""
    for region in ram.regions:
        if not region.is_ram:
            continue
        end = region.gpa + region.length // PAGE_BYTES * PAGE_BYTES
        cuts = {edge for known in PLACES for edge in (known.start, known.stop)}
        edges = sorted({region.gpa, end, *(edge for edge in cuts if region.gpa < edge < end)})
        for low, high in itertools.pairwise(edges):
            for gpa in range(low, high, PIECE_BYTES):
                pages = min(PIECE_BYTES, high - gpa) // PAGE_BYTES
                yield _Place(region, gpa, region.offset + gpa - region.gpa, pages)
    for name, size in ram.backends.items():
        region_of_backend = next(
            (region for region in ram.regions if is_backend(region, name)), None
        )
        if region_of_backend is None:
            continue
        for begin, length in hidden_parts(ram.regions, name, size):
            for offset in range(begin, begin + length, PIECE_BYTES):
                pages = min(PIECE_BYTES, begin + length - offset) // PAGE_BYTES
                yield _Place(region_of_backend, None, offset, pages)


def _backend_of(region: MapRegion) -> str:
    return region.name.removeprefix("/objects/")


class WaitForSnapshotError(WaitTimeoutError):
    """The program that writes a snapshot has not finished in time."""


@contextlib.asynccontextmanager
async def complete_snapshot(path: Path, timeout_s: float) -> AsyncIterator[Snapshot]:
    """Read the snapshot at `path`; first wait for the program that writes it, if there is one.

    No dmaproof replaces the snapshot until the context ends.

    Raises:
        WaitForSnapshotError: the snapshot is not complete in time.
        UntestableError: the file is not a complete snapshot.
    """
    with path.open("rb") as file:
        await wait_until(
            lambda: _is_unlocked(file),
            timeout_s,
            lambda: WaitForSnapshotError(
                f"the program that writes {path} has not finished within {timeout_s:g} s: it may "
                "still wait for the migration to complete. Migrate, or allow more time (--timeout)"
            ),
            pause_s=_LOOK_EVERY_S,
        )
        try:
            yield Snapshot(file, str(path))
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _is_unlocked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
