"""The places from which the bytes of a guest's RAM are read.

Each page of the host has its own number in it, so a wrong offset reads a wrong number.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmaproof.errors import UntestableError
from dmaproof.page_compare import Extent
from qmp_tools.memory.copied_memory import process_memory
from qmp_tools.memory.guest_ram import GuestRam, guest_ram
from qmp_tools.memory.physical_map import MapRegion
from qmp_tools.memory.process_memory import Mapping as ProcessMapping
from qmp_tools.memory.process_memory import OutOfReachError, SharedMemory, mappings_of
from qmp_tools.qemu.qmp import QmpRefusal
from qmp_tools.testbed.ring_driver import ram_fd
from support.host_pages import HOST_PAGE as PAGE
from support.host_pages import IS_ALONE, PER_PAGE, of_each
from support.simulated_qemu import SimulatedQemu

PAGES = 16
HIGH = 1 << 32
LOW_REGION = MapRegion(0, 4 * PAGE, "ram", "ram0")
CONTAINER = MapRegion(8 * PAGE, PAGE, "container", "pci")
HIGH_REGION = MapRegion(HIGH, 6 * PAGE, "ram", "ram0", 8 * PAGE)
"""Pages 4 to 7 of the backend are hidden, and 14 and 15 are after the last region."""
REGIONS = [LOW_REGION, CONTAINER, HIGH_REGION]
FILE_PAGE = 3
"""The page of the file at which the backend begins."""


class Ram:
    """A guest's RAM in a file and in the memory of this process, and the QEMU that has it."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.fd = stack.enter_context(ram_fd((FILE_PAGE + PAGES) * PAGE))
        self.saved_fd = stack.enter_context(ram_fd(PAGES * PAGE))
        self.private = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.private.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(PAGES):
            content = bytes([page + 1]) * PAGE
            os.pwrite(self.fd, content, (FILE_PAGE + page) * PAGE)
            self.private[page * PAGE : (page + 1) * PAGE] = content
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self.private))
        self.hvas = {0: hva, HIGH: hva + 8 * PAGE}
        self.folder = folder
        self.qemu = SimulatedQemu("source QEMU", self.saved_fd, REGIONS, self.hvas, pid=os.getpid())
        mappings = mappings_of(os.getpid(), "me")
        self.process = stack.enter_context(process_memory(os.getpid(), "me", mappings))

    def _guest_ram(self, **more: Any) -> GuestRam:
        hvas = {LOW_REGION: self.hvas[0], HIGH_REGION: self.hvas[HIGH]}
        parts: dict[str, Any] = {"shared": {}, "process": None, "hvas": hvas}
        return GuestRam(
            qemu=self.qemu.attached,
            regions=REGIONS,
            backends={"ram0": PAGES * PAGE},
            dimms={},
            folder=self.folder,
            boot_id="this boot",
            **{**parts, **more},
        )

    def in_file(self) -> GuestRam:
        """RAM that QEMU shares."""
        places = {LOW_REGION: FILE_PAGE * PAGE, HIGH_REGION: (FILE_PAGE + 8) * PAGE}
        return self._guest_ram(
            shared={region: SharedMemory(self.fd, at, 0, 0) for region, at in places.items()}
        )

    def in_process(self) -> GuestRam:
        """RAM that is copied from QEMU's process."""
        return self._guest_ram(process=self.process)

    def saved(self) -> GuestRam:
        """RAM that QEMU saves, as its process may not be read."""
        os.pwrite(self.saved_fd, self.private[:], 0)
        return self._guest_ram()


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Ram]:
    with ExitStack() as stack:
        yield Ram(stack, tmp_path)


def numbers(extent: Extent, pages: int) -> list[int]:
    """Return the numbers in the first bytes of `pages` pages of an extent."""
    return [os.pread(extent.fd, 1, extent.offset + page * PAGE)[0] - 1 for page in range(pages)]


def read(guest: GuestRam, region: MapRegion, gpa: int, pages: int) -> list[int]:
    """Return the numbers of the pages from `gpa` on."""

    async def read_extent() -> list[int]:
        async with guest.pages(region, gpa, pages * PER_PAGE) as found:
            read = numbers(found.extent(), pages)
            assert [found.content(page * PER_PAGE)[0] - 1 for page in range(pages)] == read
            return read

    return asyncio.run(read_extent())


WAYS = pytest.mark.parametrize("reader", [Ram.in_file, Ram.in_process, Ram.saved])


@WAYS
def test_a_guest_physical_address_is_read_in_its_region(
    ram: Ram, reader: Callable[[Ram], GuestRam]
) -> None:
    guest = reader(ram)
    assert read(guest, LOW_REGION, 0, 4) == [0, 1, 2, 3]
    assert read(guest, LOW_REGION, 2 * PAGE, 2) == [2, 3]
    assert read(guest, HIGH_REGION, HIGH, 6) == [8, 9, 10, 11, 12, 13]
    assert read(guest, HIGH_REGION, HIGH + 5 * PAGE, 1) == [13]


@pytest.mark.parametrize("reader", [Ram.in_file, Ram.in_process])
@pytest.mark.parametrize(
    ("region", "page"),
    [(LOW_REGION, 4), (LOW_REGION, 6), (HIGH_REGION, 4), (HIGH_REGION, 7), (HIGH_REGION, 15)],
)
def test_memory_that_the_map_hides_is_read_from_any_region_of_its_backend(
    ram: Ram, reader: Callable[[Ram], GuestRam], region: MapRegion, page: int
) -> None:
    found = asyncio.run(reader(ram).hidden_pages(region, page * PAGE, 1))
    assert found is not None
    assert numbers(found.extent(), 1) == [page]


def test_qemu_cannot_save_memory_that_the_map_hides(ram: Ram) -> None:
    assert asyncio.run(ram.saved().hidden_pages(LOW_REGION, 4 * PAGE, 1)) is None
    assert ram.qemu.saves == 0


def test_memory_without_a_host_address_is_not_read_from_the_process(ram: Ram) -> None:
    guest = replace(ram.in_process(), hvas={HIGH_REGION: ram.hvas[HIGH]})
    assert asyncio.run(guest.hidden_pages(LOW_REGION, 0, 1)) is None
    assert asyncio.run(guest.hidden_pages(HIGH_REGION, 8 * PAGE, 1)) is not None
    assert guest.copied == [HIGH_REGION]


def test_memory_that_is_not_mapped_is_not_read_from_the_process(ram: Ram) -> None:
    guest = replace(ram.in_process(), hvas={LOW_REGION: PAGE, HIGH_REGION: ram.hvas[HIGH]})
    assert asyncio.run(guest.hidden_pages(LOW_REGION, 0, 1)) is None


def test_only_regions_outside_shared_files_are_copied(ram: Ram) -> None:
    assert ram.in_process().copied == [LOW_REGION, HIGH_REGION]
    assert ram.in_file().copied == ram.saved().copied == []
    shared = ram.in_file().shared
    mixed = replace(ram.in_process(), shared={LOW_REGION: shared[LOW_REGION]})
    assert mixed.copied == [HIGH_REGION]


@WAYS
def test_the_length_is_that_of_the_ram_alone(ram: Ram, reader: Callable[[Ram], GuestRam]) -> None:
    assert reader(ram).length == 10 * PAGE


def test_absent_pages_are_found_where_the_ram_is(ram: Ram) -> None:
    ram.private.madvise(mmap.MADV_DONTNEED, 9 * PAGE, PAGE)
    found = ram.in_process().absent(HIGH_REGION, HIGH + PAGE, 2 * PER_PAGE)
    assert (of_each(found.absent), found.certain) == ([True, False], IS_ALONE)
    with ram_fd((FILE_PAGE + PAGES) * PAGE) as sparse:
        os.pwrite(sparse, b"here", (FILE_PAGE + 9) * PAGE)
        shared = {HIGH_REGION: SharedMemory(sparse, (FILE_PAGE + 8) * PAGE, 0, 0)}
        found = replace(ram.in_file(), shared=shared).absent(HIGH_REGION, HIGH + PAGE, 2 * PER_PAGE)
    assert (of_each(found.absent), found.certain) == ([False, True], IS_ALONE)


def test_absent_pages_are_unknown_in_an_unreadable_process(ram: Ram) -> None:
    found = ram.saved().absent(LOW_REGION, 0, 2)
    assert (found.absent.tolist(), found.certain) == ([False, False], False)


def descriptors() -> int:
    """Return the number of open file descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_piece_that_qemu_saved_leaves_neither_a_file_nor_a_descriptor(ram: Ram) -> None:
    guest = ram.saved()
    before = descriptors()
    read(guest, HIGH_REGION, HIGH, 2)
    assert [*ram.folder.iterdir()] == []
    assert descriptors() == before


def test_a_saved_piece_that_does_not_exist_is_reported(
    ram: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ram.qemu, "save", lambda *_: None)
    with pytest.raises(
        UntestableError, match="the file does not exist: QEMU has another file system"
    ):
        read(ram.saved(), LOW_REGION, 0, 1)


def save_too_little(gpa: int, length: int, file: Path) -> None:
    file.write_bytes(bytes(length - 1))


def save_a_link(gpa: int, length: int, file: Path) -> None:
    target = file.with_name("secret")
    target.write_bytes(bytes(length))
    file.symlink_to(target)


def save_a_pipe(gpa: int, length: int, file: Path) -> None:
    os.mkfifo(file)


def save_a_device(gpa: int, length: int, file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("save", [save_too_little, save_a_link, save_a_pipe, save_a_device])
def test_only_a_plain_file_of_the_right_length_is_a_saved_piece(
    ram: Ram, monkeypatch: pytest.MonkeyPatch, save: Callable[[int, int, Path], None]
) -> None:
    guest = ram.saved()
    before = descriptors()
    monkeypatch.setattr(ram.qemu, "save", save)
    with pytest.raises(UntestableError, match="the file does not exist"):
        read(guest, LOW_REGION, 0, 1)
    assert descriptors() == before


def test_a_qemu_that_cannot_save_its_memory_is_reported(ram: Ram) -> None:
    def refuse() -> None:
        raise QmpRefusal("source QEMU refused pmemsave: Permission denied")

    ram.qemu.on_save = refuse
    with pytest.raises(UntestableError, match=r"Permission denied\. QEMU must save its memory"):
        read(ram.saved(), LOW_REGION, 0, 1)


def found_in(ram: Ram, folder: Path) -> tuple[GuestRam, int]:
    """Return what `guest_ram` finds, and the mode of the folder for saved pieces."""

    async def find() -> tuple[GuestRam, int]:
        async with guest_ram(ram.qemu.attached, folder) as found:
            return found, found.folder.stat().st_mode & 0o777

    return asyncio.run(find())


def test_a_qemu_is_asked_for_its_ram(ram: Ram, tmp_path: Path) -> None:
    dimm = {"id": "dimm0", "addr": HIGH, "size": PAGE}
    virtio = {"memaddr": 2 * HIGH, "size": 2 * PAGE}
    ram.qemu.memory_devices = [
        {"type": "dimm", "data": dimm},
        {"type": "virtio-mem", "data": virtio},
        {"type": "sgx-epc", "data": {"id": "epc"}},
        {"type": "other", "data": {"size": PAGE}},
    ]
    ram.qemu.backends = [{"id": "ram0", "size": PAGES * PAGE}, {"size": PAGE}]
    found, mode = found_in(ram, tmp_path)
    assert found.regions == REGIONS
    assert found.hvas == {LOW_REGION: ram.hvas[0], HIGH_REGION: ram.hvas[HIGH]}
    assert found.backends == {"ram0": PAGES * PAGE}
    assert found.dimms == {
        "dimm0": (HIGH, PAGE),
        "virtio-mem": (2 * HIGH, 2 * PAGE),
        "other": (0, PAGE),
    }
    assert found.process is not None
    assert (found.folder.parent, mode) == (tmp_path, 0o700)


def test_ram_in_a_file_is_found_by_its_host_address(ram: Ram, tmp_path: Path) -> None:
    with mmap.mmap(ram.fd, 16 * PAGE) as mapping:
        hva = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        ram.qemu.hvas = {0: ram.hvas[0], HIGH: hva + 9 * PAGE}
        found, _ = found_in(ram, tmp_path)
    assert {region: memory.offset for region, memory in found.shared.items()} == {
        HIGH_REGION: 9 * PAGE
    }


def test_a_file_of_huge_pages_is_not_read_in_place(
    ram: Ram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = os.statvfs_result((2 << 20, *os.fstatvfs(ram.fd)[1:]))
    monkeypatch.setattr(os, "fstatvfs", lambda fd: huge)
    with mmap.mmap(ram.fd, 16 * PAGE) as mapping:
        hva = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        ram.qemu.hvas = {0: ram.hvas[0], HIGH: hva + 9 * PAGE}
        found, _ = found_in(ram, tmp_path)
    assert not found.shared
    assert HIGH_REGION in found.hvas


def test_ram_that_qemu_does_not_place_has_no_host_address(ram: Ram, tmp_path: Path) -> None:
    ram.qemu.hvas = {HIGH: ram.hvas[HIGH]}
    found, _ = found_in(ram, tmp_path)
    assert found.hvas == {HIGH_REGION: ram.hvas[HIGH]}
    assert found.copied == [HIGH_REGION]


@pytest.mark.parametrize(
    ("pid", "thread"),
    [(0, None), (os.getpid(), os.getppid())],
    ids=["unseen", "not the parent of its vCPUs"],
)
def test_a_process_that_is_not_known_to_be_qemu_is_not_read(
    ram: Ram, tmp_path: Path, pid: int, thread: int | None
) -> None:
    """The process that listens at the socket may be a supervisor, without QEMU's vCPU threads."""
    ram.qemu.pid, ram.qemu.thread = pid, thread
    found, _ = found_in(ram, tmp_path)
    assert (found.process, found.copied, found.shared) == (None, [], {})


def test_a_qemu_without_vcpus_is_read(ram: Ram, tmp_path: Path) -> None:
    ram.qemu.has_vcpus = False
    found, _ = found_in(ram, tmp_path)
    assert found.process is not None


QEMUS_USER = 107


def refuse_access(pid: int, name: str) -> list[ProcessMapping]:
    raise OutOfReachError("the memory may not be read")


def become(monkeypatch: pytest.MonkeyPatch, euid: int) -> None:
    """Make `guest_ram` see `euid` as this user and `QEMUS_USER` as QEMU's user."""
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setattr(
        "qmp_tools.memory.guest_ram.user_and_group", lambda pid: (QEMUS_USER, QEMUS_USER + 1)
    )


@pytest.mark.parametrize("euid", [0, QEMUS_USER])
def test_a_qemu_that_may_not_be_read_can_save_for_its_own_user_and_root(
    ram: Ram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, euid: int
) -> None:
    """A process that is not dumpable may not be read by its own user either."""
    monkeypatch.setattr("qmp_tools.memory.guest_ram.mappings_of", refuse_access)
    monkeypatch.setattr(os, "chown", lambda *_: None)
    become(monkeypatch, euid)
    found, _ = found_in(ram, tmp_path)
    assert found.process is None


@pytest.mark.parametrize("euid", [QEMUS_USER + 1, 1])
def test_the_memory_of_another_users_qemu_cannot_be_read(
    ram: Ram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, euid: int
) -> None:
    monkeypatch.setattr("qmp_tools.memory.guest_ram.mappings_of", refuse_access)
    become(monkeypatch, euid)
    with pytest.raises(OutOfReachError):
        found_in(ram, tmp_path)


@pytest.mark.parametrize(
    ("euid", "pid", "owners"),
    [
        (0, os.getpid(), [(QEMUS_USER, QEMUS_USER + 1)]),
        (0, 0, []),
        (QEMUS_USER, os.getpid(), []),
        (1, os.getpid(), []),
    ],
    ids=["root", "root-unseen", "the-user", "another-user"],
)
def test_root_gives_the_folder_for_saved_pieces_to_qemus_user(
    ram: Ram,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    euid: int,
    pid: int,
    owners: list[tuple[int, int]],
) -> None:
    """QEMU's user must be able to enter the folder's parent, but not to list it."""
    given: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, *owner: given.append((path.parent, *owner)))
    become(monkeypatch, euid)
    tmp_path.chmod(0o700)
    ram.qemu.pid = pid
    _, mode = found_in(ram, tmp_path)
    assert (given, mode) == ([(tmp_path, *owner) for owner in owners], 0o700)
    assert tmp_path.stat().st_mode & 0o777 == (0o711 if owners else 0o700)


def test_root_without_the_right_to_chown_reads_the_process(
    ram: Ram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)
    become(monkeypatch, 0)
    assert found_in(ram, tmp_path)[0].process is not None


def test_private_memory_that_is_partly_unmapped_does_not_count_as_absent(ram: Ram) -> None:
    found = replace(ram.in_process(), hvas={LOW_REGION: PAGE, HIGH_REGION: PAGE}).absent(
        LOW_REGION, 0, 2
    )
    assert (found.absent.tolist(), found.certain) == ([False, False], False)
