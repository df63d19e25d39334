"""The kinds of memory that a guest's RAM can be in."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dmaproof.errors import UnsupportedError, UntestableError, UsageError
from dmaproof.units import PAGE_BYTES
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.memory.process_memory import mappings_of, shared_memory
from qmp_tools.memory.ram import RamFile, compare
from qmp_tools.migration.scenarios import find_scenario
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.resolve import require_memory, resolve
from qmp_tools.qemu.machine import KIB, MIB, Hardware, Machine
from qmp_tools.qemu.memory_backend import (
    KINDS,
    MEMFD,
    MemoryBackend,
    parse_memory_backend,
    require_huge_pages,
    require_space,
)
from qmp_tools.testbed.ring_driver import ram_fd

HUGE_BYTES = 2 * MIB
LOG_WORD_BYTES = 256 * KIB
HUGE = MemoryBackend("hugetlb-2M")
PAGES = 600  # more than are read at once, and no multiple of that


@pytest.fixture
def huge_pages(tmp_path: Path) -> Path:
    """Return a folder in which the kernel reports 10 pages of 2M, 8 of them free, 2 reserved."""
    folder = tmp_path / "hugepages-2048kB"
    folder.mkdir()
    for name, count in {
        "nr": 10,
        "free": 8,
        "resv": 2,
        "nr_overcommit": 0,
        "surplus": 0,
    }.items():
        (folder / f"{name}_hugepages").write_text(f"{count}\n")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_shared_memory_of_the_wanted_size(kind: str) -> None:
    backend = parse_memory_backend(kind)
    value = backend.object("ram", 4096).split(",")
    assert value[0].startswith("memory-backend-")
    assert {"id=ram", "size=4096", "share=on"} <= set(value)
    assert parse_memory_backend(str(backend)) == backend


def test_a_file_is_in_the_given_folder_and_has_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    backend = parse_memory_backend(f"file:{folder}")
    assert backend.object("ram", 1).endswith(f",mem-path={tmp_path}/a,,b")
    assert (backend.page_bytes, backend.has_huge_pages) == (mmap.PAGESIZE, False)


@pytest.mark.parametrize("text", ["", "hugetlb", "memfd:/tmp", "hugetlb-2M:"])
def test_an_unknown_kind_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"expected one of memfd, .* got {text!r}"):
        parse_memory_backend(text)


def test_a_file_needs_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "ram"
    file.touch()
    with pytest.raises(UsageError, match=f"{file} is not a folder; give the folder"):
        parse_memory_backend(f"file:{file}")


@pytest.mark.parametrize("memory_bytes", [128 * MIB, 128 * MIB + 8192])
@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
def test_no_numa_node_begins_inside_a_word_of_the_vhost_log(memory_bytes: int, nodes: int) -> None:
    machine = Machine(X86_64, "q35", "tcg", memory_bytes, 1, Path("kernel"), numa_nodes=nodes)
    *sizes, last = machine.ram_backends.values()
    assert all(size % LOG_WORD_BYTES == 0 for size in sizes)
    assert not machine.larger_than_first
    assert len(sizes) == nodes - 1
    assert sum(sizes) + last == memory_bytes
    words = machine.arguments()
    assert [f"node,memdev=ram{node}" for node in range(nodes)] == [
        value for option, value in itertools.pairwise(words) if option == "-numa"
    ]
    assert not any("memory-backend=" in word for word in words)


def test_numa_nodes_consist_of_whole_huge_pages() -> None:
    machine = Machine(
        X86_64, "q35", "tcg", 126 * MIB, 1, Path("kernel"), backend=HUGE, numa_nodes=4
    )
    assert all(size % HUGE_BYTES == 0 for size in machine.ram_backends.values())


@pytest.mark.parametrize(
    ("memory_bytes", "nodes", "added", "expected"),
    [
        (127 * MIB, 0, Hardware(), "a multiple of 2M with"),
        (6 * MIB, 4, Hardware(), "a multiple of 2M and at least 8M with"),
        (8 * MIB, 4, Hardware(nvdimm_bytes=3 * MIB), "adds nvdimm of 3M, which is not a multiple"),
        (8 * MIB, 4, Hardware(resizable_bytes=MIB), "adds resizable of 1M"),
    ],
)
def test_all_memory_must_be_whole_huge_pages(
    memory_bytes: int, nodes: int, added: Hardware, expected: str
) -> None:
    machine = Machine(
        *(X86_64, "q35", "tcg", memory_bytes, 1, Path("kernel")),
        backend=HUGE,
        numa_nodes=nodes,
        added=added,
    )
    with pytest.raises(UsageError, match=expected):
        require_memory(machine)


@pytest.mark.parametrize("text", ["0", "9", "x"])
def test_a_number_of_nodes_out_of_bounds_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--numa: expected"):
        ProofOptions(numa=text)  # type: ignore[arg-type]


def test_too_few_huge_pages_are_reported_with_the_command_that_reserves_them(
    huge_pages: Path,
) -> None:
    require_huge_pages(HUGE, 3 * HUGE_BYTES, huge_pages=huge_pages)
    command = f"echo 12 | sudo tee {huge_pages}/hugepages-2048kB/nr_hugepages"
    with pytest.raises(UntestableError, match=r"expected 8 free .*, got 6; reserve") as caught:
        require_huge_pages(HUGE, 4 * HUGE_BYTES, huge_pages=huge_pages)
    assert str(caught.value).endswith(command)


def test_huge_pages_that_the_kernel_may_still_make_are_free(huge_pages: Path) -> None:
    (huge_pages / "hugepages-2048kB/nr_overcommit_hugepages").write_text("2")
    require_huge_pages(HUGE, 4 * HUGE_BYTES, huge_pages=huge_pages)


def test_a_size_of_huge_pages_that_the_host_lacks_is_refused(huge_pages: Path) -> None:
    with pytest.raises(UntestableError, match="this host has no huge pages of 1G"):
        require_huge_pages(MemoryBackend("hugetlb-1G"), 1, huge_pages=huge_pages)


def test_other_memory_needs_no_huge_pages(tmp_path: Path) -> None:
    require_huge_pages(MEMFD, 1 << 40, huge_pages=tmp_path / "missing")


def test_a_folder_that_takes_no_files_is_refused() -> None:
    require_space(MEMFD, 1 << 60)
    with pytest.raises(UsageError, match=r"no file can be created in /proc: .*; give another"):
        require_space(MemoryBackend("file", "/proc"), MIB)


@pytest.mark.parametrize("blocks", [1, 0])
def test_files_need_space_for_both_sides_where_space_is_limited(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SimpleNamespace(f_blocks=blocks, f_bavail=3 * blocks, f_frsize=MIB)
    monkeypatch.setattr(os, "statvfs", lambda folder: space)
    backend = MemoryBackend("file", str(tmp_path))
    if blocks:
        require_space(backend, MIB)
        with pytest.raises(UntestableError, match=r"expected 4 MiB of free space .*, got 3 MiB"):
            require_space(backend, 2 * MIB)
    else:
        require_space(backend, 1 << 40)
    assert list(tmp_path.iterdir()) == []


def test_huge_pages_are_compared_without_filling_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("qmp_tools.memory.ram.differing_pages")  # it maps the files
    with ram_fd(PAGES * PAGE_BYTES) as source, ram_fd(PAGES * PAGE_BYTES) as destination:
        rams = []
        for fd in (source, destination):
            status = os.fstat(fd)
            size = status.st_size
            ram = RamFile(fd, size, status.st_dev, status.st_ino, page_bytes=HUGE_BYTES)
            rams.append(ram)
        for page in (0, 255, 256, PAGES - 1):
            os.pwrite(source, b"x", page * PAGE_BYTES + 5)
        os.pwrite(destination, b"x", 256 * PAGE_BYTES + 5)
        filled = os.fstat(destination).st_blocks
        assert compare(*rams).tolist() == [0, 255, PAGES - 1]
        assert os.fstat(destination).st_blocks == filled


def test_the_pages_of_a_file_are_those_of_its_file_system() -> None:
    with ram_fd(PAGE_BYTES) as fd, mmap.mmap(fd, PAGE_BYTES) as mapping:
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        with shared_memory(os.getpid(), mappings_of(os.getpid(), "me"), address, 1) as memory:
            assert memory is not None
            assert memory.page_bytes == mmap.PAGESIZE


@pytest.mark.parametrize("scenario", ["cpr-transfer", "cpr-exec"])
def test_a_file_without_a_name_cannot_be_opened_again(scenario: str, tmp_path: Path) -> None:
    find_scenario(scenario).require_memory(HUGE)
    with pytest.raises(UsageError, match="the file has no name; use another --memory-backend"):
        find_scenario(scenario).require_memory(parse_memory_backend(f"file:{tmp_path}"))


def test_pages_that_the_guest_gave_back_are_not_lost_and_are_counted() -> None:
    scenario = find_scenario("free-page-reporting")
    with ram_fd(PAGES * PAGE_BYTES) as source, ram_fd(PAGES * PAGE_BYTES) as destination:
        rams = []
        for fd in (source, destination):
            status = os.fstat(fd)
            rams.append(RamFile(fd, status.st_size, status.st_dev, status.st_ino))
        for page in (3, 4, 5):
            os.pwrite(destination, b"old", page * PAGE_BYTES)
        os.pwrite(source, b"new", 4 * PAGE_BYTES)
        os.pwrite(source, bytes(PAGE_BYTES), 5 * PAGE_BYTES)  # zeros that a device wrote
        differing = scenario.differing_pages(*rams)
        assert differing.tolist() == [3, 4, 5]
        assert scenario.given_back(differing, rams[0]).tolist() == [True, False, False]


@pytest.mark.parametrize("name", ["virtio-mem", "balloon", "free-page-reporting", "free-page-hint"])
def test_a_guest_without_a_driver_for_what_the_scenario_adds_is_refused(name: str) -> None:
    options = ProofOptions(guest="bare", scenario=name)
    with pytest.raises(UnsupportedError, match=r"bare has no driver for .*; use --guest linux"):
        asyncio.run(resolve(options))


def test_a_machine_has_room_for_the_memory_of_virtio_mem() -> None:
    added = Hardware(resizable_bytes=256 * MIB)
    machine = Machine(X86_64, "q35", "tcg", 128 * MIB, 1, Path("kernel"), added=added)
    words = machine.arguments()
    assert words[words.index("-m") + 1] == "131072K,maxmem=393216K"
    assert "virtio-mem-pci,id=resizable,memdev=resizable-ram,requested-size=0" in words
    assert machine.most_memory_bytes == 384 * MIB


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guest": "linux"}, r"only the bare guest .*; use --guest bare"),
        ({"guest": "bare", "arch": "aarch64"}, r"only the bare guest for x86_64"),
    ],
)
def test_persistent_memory_needs_the_bare_guest(options: dict[str, str], expected: str) -> None:
    with pytest.raises(UnsupportedError, match=expected):
        asyncio.run(resolve(ProofOptions.of({**options, "scenario": "nvdimm"})))


def test_a_machine_has_its_nvdimm_at_a_known_address() -> None:
    added = Hardware(nvdimm_bytes=128 * MIB)
    machine = Machine(X86_64, "q35", "tcg", 128 * MIB, 1, Path("kernel"), added=added)
    words = machine.arguments()
    assert words[words.index("-m") + 1] == "131072K,slots=1,maxmem=262144K"
    assert "nvdimm,id=nvdimm,memdev=nvdimm-ram,addr=4294967296" in words


def test_huge_pages_cannot_tell_what_the_guest_gave_back() -> None:
    with pytest.raises(UsageError, match="cannot tell the pages that the guest gave back"):
        find_scenario("free-page-reporting").require_memory(HUGE)
