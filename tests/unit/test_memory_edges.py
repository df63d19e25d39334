"""Finding and copying the memory of a process, at the edges of mappings, files and reads."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.host.process_status import has_thread, process_of_thread, user_and_group
from qmp_tools.memory.copied_memory import PIECE_BYTES, ProcessMemory, process_memory
from qmp_tools.memory.process_memory import (
    Mapping,
    mappings_of,
    shared_memory,
)
from qmp_tools.memory.ram import RamFile, compare, copied, ram_file
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

ME = os.getpid()


def address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def private() -> mmap.mmap:
    """Four pages of private memory, without huge pages, each filled with its number from 1 on."""
    memory = mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:] = b"".join(bytes([page]) * PAGE for page in range(1, 5))
    return memory


def test_a_copy_continues_after_a_short_read(
    private: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of a process's memory may end at any page."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:PAGE]], at))
    with process_memory(ME, "me", mappings_of(ME, "me")) as memory:
        assert memory is not None
        fd, offset = memory.copy(address_of(private), 3 * PAGE + 5)
        assert os.pread(fd, 4 * PAGE, offset) == private[: 3 * PAGE + 5] + bytes(PAGE - 5)


def test_a_failed_copy_names_the_address(
    private: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    hva = address_of(private)

    def fail_behind_a_page(fd: int, buffers: Any, at: int) -> int:
        return preadv(fd if at < hva + PAGE else -1, [buffers[0][:PAGE]], at)

    monkeypatch.setattr(os, "preadv", fail_behind_a_page)
    with process_memory(ME, "me", mappings_of(ME, "me")) as memory:
        assert memory is not None
        with pytest.raises(UntestableError, match=f"at host address {hva + PAGE:#x}"):
            memory.copy(hva, 2 * PAGE)


def test_a_process_that_ends_during_a_copy_is_reported(
    private: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with process_memory(ME, "it", mappings_of(ME, "me")) as memory:
        assert memory is not None
        with pytest.raises(UntestableError, match="it ended while dmaproof read its memory"):
            memory.copy(address_of(private), PAGE)


def test_a_copy_of_one_byte_works(private: mmap.mmap) -> None:
    with process_memory(ME, "me", mappings_of(ME, "me")) as memory:
        assert memory is not None
        fd, offset = memory.copy(address_of(private) + PAGE, 1)
        assert os.pread(fd, 2, offset) == b"\x02\0"


def test_copies_hold_a_whole_piece_and_leave_no_open_descriptor() -> None:
    before = descriptors()
    with process_memory(ME, "me", []) as memory:
        assert memory is not None
        assert os.fstat(memory.copy(0, 0).fd).st_size == PIECE_BYTES == 64 << 20
    assert descriptors() == before


@pytest.mark.parametrize(
    ("hva", "length", "found"),
    [
        (0x1000, 0x1000, True),
        (0x1FFF, 1, True),
        (0x0FFF, 1, False),
        (0x2000, 1, False),
        (0x1000, 0x1001, False),
    ],
)
def test_a_mapping_contains_the_bytes_before_its_end(
    private: mmap.mmap, hva: int, length: int, found: bool
) -> None:
    memory = ProcessMemory("me", [Mapping(0x1000, 0x2000, False, 0, 0, "")], -1, -1, -1, private)
    assert memory.has(hva, length) == found


def test_the_first_byte_of_a_mapping_does_not_belong_to_the_mapping_before(
    private: mmap.mmap,
) -> None:
    """A mapping that ends at the address comes first in the list, but does not contain it."""
    mappings = [Mapping(0x1000, 0x2000, False, 0, 0, ""), Mapping(0x2000, 0x3000, False, 0, 0, "")]
    assert ProcessMemory("me", mappings, -1, -1, -1, private).has(0x2000, 0x1000)


def test_a_process_has_the_user_and_group_of_its_file_system_access(tmp_path: Path) -> None:
    """The status file has four numbers (real, effective, saved, file system); the last counts."""
    text = "Name:\tqemu\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n"
    (tmp_path / "1").mkdir()
    (tmp_path / "1/status").write_text(text)
    assert user_and_group(1, proc=tmp_path) == (4, 8)


def test_a_thread_is_known_by_its_number_in_the_innermost_namespace(tmp_path: Path) -> None:
    tasks = tmp_path / "1/task"
    for thread, text in ((300, "NSpid:\t300\t9\t4\n"), (301, "")):
        task = tasks / str(thread)
        task.mkdir(parents=True)
        (task / "status").write_text(text)
    (tasks / "302").mkdir()  # a thread that has ended
    found = [thread for thread in (300, 9, 4, 301, 302) if has_thread(1, thread, proc=tmp_path)]
    assert found == [4]


def test_a_kernel_without_pid_namespaces_names_its_threads_too(tmp_path: Path) -> None:
    (tmp_path / "1/task/300").mkdir(parents=True)
    (tmp_path / "300").mkdir()
    for status in (tmp_path / "1/task/300/status", tmp_path / "300/status"):
        status.write_text("Tgid:\t1\nPid:\t300\n")
    assert has_thread(1, 300, proc=tmp_path)
    assert process_of_thread(300, proc=tmp_path) == 1


def test_shared_memory_is_read_by_its_own_file_and_closed_again() -> None:
    """Other files are open too; one of them has the same name."""
    with ram_fd(4 * PAGE) as other, ram_fd(4 * PAGE) as fd, mmap.mmap(fd, 4 * PAGE) as mapping:
        os.pwrite(other, b"other", 0)
        os.pwrite(fd, b"right", 0)
        before = descriptors()
        with shared_memory(ME, mappings_of(ME, "me"), address_of(mapping), PAGE) as memory:
            assert memory is not None
            assert os.pread(memory.fd, 5, memory.offset) == b"right"
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(memory.fd, b"!")
        assert descriptors() == before


@pytest.mark.parametrize("wrong", [{"inode": 1}, {"path": "/memfd:else (deleted)"}])
def test_an_open_file_is_identified_by_inode_and_name(wrong: dict[str, Any]) -> None:
    """Two file systems may have files with the same inode number."""
    with ram_fd(PAGE) as fd, mmap.mmap(fd, PAGE) as mapping:
        hva = address_of(mapping)
        (found,) = (mapped for mapped in mappings_of(ME, "me") if mapped.start == hva)
        # /proc/PID/map_files has no such address, so the open files are searched.
        other = replace(found, start=PAGE, end=2 * PAGE, **wrong)
        with shared_memory(ME, [other], PAGE, PAGE) as memory:
            assert memory is None
        right = replace(found, start=PAGE, end=2 * PAGE)
        with shared_memory(ME, [right], PAGE, PAGE) as memory:
            assert memory is not None


def test_the_shared_memory_of_an_ended_process_is_not_found() -> None:
    gone = int(Path("/proc/sys/kernel/pid_max").read_text())
    mapping = Mapping(PAGE, 2 * PAGE, True, 0, 7, "/memfd:it (deleted)")
    with shared_memory(gone, [mapping], PAGE, PAGE) as memory:
        assert memory is None


BACKEND = "memory-backend-memfd"


@contextlib.contextmanager
def memfd(name: str, pages: int) -> Iterator[int]:
    """Open a memfd called `name`."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, pages * PAGE)
        yield fd
    finally:
        os.close(fd)


def test_the_only_memfd_of_a_process_is_its_ram() -> None:
    with memfd("other", 1), memfd(BACKEND, 3) as fd:
        os.pwrite(fd, b"here", PAGE)
        twice = os.dup(fd)
        before = descriptors()
        with ram_file(ME, "me") as ram:
            assert (ram.inode, ram.pages) == (os.fstat(fd).st_ino, 3)
            assert ram.read(PAGE, 4) == b"here"
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(ram.fd, b"!")
        assert descriptors() == before
        os.close(twice)


def test_a_process_with_two_memfds_or_none_is_refused() -> None:
    with pytest.raises(UntestableError, match="expected me to have one memfd for its RAM, got 0"):
        ram_file(ME, "me").__enter__()
    with (
        memfd(BACKEND, 1),
        memfd(BACKEND, 1),
        pytest.raises(UntestableError, match="expected me to have one memfd for its RAM, got 2"),
    ):
        ram_file(ME, "me").__enter__()


def test_the_ram_of_an_ended_process_cannot_be_opened() -> None:
    gone = int(Path("/proc/sys/kernel/pid_max").read_text())
    with pytest.raises(UntestableError, match="cannot open the RAM of it"):
        ram_file(gone, "it").__enter__()


def test_a_copy_is_as_long_as_its_original() -> None:
    """This holds although most of the original is a hole, and is not copied."""
    with ram_fd(300 * PAGE) as fd:
        os.pwrite(fd, b"first", 0)
        status = os.fstat(fd)
        ram = RamFile(fd, 299 * PAGE, status.st_dev, status.st_ino)
        os.pwrite(fd, b"after", 299 * PAGE)
        with copied([ram]) as (copy,):
            assert os.fstat(copy.fd).st_size == 299 * PAGE
            assert copy.read(0, 5) == b"first"


def test_files_of_different_length_are_not_compared() -> None:
    with ram_fd(2 * PAGE) as fd:
        ram = RamFile(fd, 2 * PAGE, 0, 0)
        with pytest.raises(UntestableError, match=r"source has 8192 bytes of RAM, .* 4096"):
            compare(ram, replace(ram, length=PAGE))
