"""The file format of snapshots: pieces of pages are written and found again."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dmaproof.errors import UntestableError, UsageError
from dmaproof.page_compare import Extent
from dmaproof.units import PAGE_BYTES
from qmp_tools.memory.absent_pages import Absent
from qmp_tools.memory.copied_memory import PIECE_BYTES
from qmp_tools.memory.data_runs import DataRuns
from qmp_tools.memory.pages import FilePages
from qmp_tools.ram_check.snapshot_file import (
    END,
    MAGIC,
    SnapshotFile,
    SnapshotWriter,
    counted_runs,
    create,
    is_snapshot,
)
from qmp_tools.testbed.ring_driver import ram_fd

PAGES = 12
DATA = (1, 2, 5, 11)
"""The pages that are not zero; page 3 is zero, but not absent."""
CONTENT = {page: bytes([page + 1]) * PAGE_BYTES for page in DATA}
ABSENT = np.array([page not in (*DATA, 3) for page in range(PAGES)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write two pieces at GPA 0 and 6 pages further, and a hidden one in 'ram0'."""
    path = tmp_path / "one.snap"
    with ram_fd(PAGES * PAGE_BYTES) as fd, create(path) as file:
        for page, content in CONTENT.items():
            os.pwrite(fd, content, page * PAGE_BYTES)
        writer = SnapshotWriter(file)
        for gpa, first, with_content in ((6, 6, True), (0, 0, False), (None, 0, False)):
            absence = Absent(ABSENT[first : first + 6], certain=first == 0)
            extent = Extent(fd, first * PAGE_BYTES)
            pages = FilePages(extent, 6, DataRuns(fd), itertools.repeat(absence).__next__)
            place = (None if gpa is None else gpa * PAGE_BYTES, "ram0", first * PAGE_BYTES)
            writer.add(place, pages, with_absent=gpa is not None, with_content=with_content)
        writer.end({"hello": "world"})
    return path


def opened(path: Path) -> SnapshotFile:
    with path.open("rb") as file:
        return SnapshotFile(file, str(path))


def test_pages_are_found_across_the_edges_of_pieces(path: Path) -> None:
    saved = opened(path)
    assert saved.index["hello"] == "world"
    for first in range(PAGES):
        for count in range(1, PAGES - first + 1):
            found = saved.pages(first * PAGE_BYTES, count)
            assert found is not None
            assert found.count == count
            wanted = range(first, first + count)
            assert found.digests().any(axis=1).tolist() == [page in DATA for page in wanted]
            assert found.absent().absent.tolist() == ABSENT[first : first + count].tolist()
            assert found.absent().certain == (first + count <= 6)
            for page in wanted:
                content = found.content(page - first)
                is_known = page not in DATA or page >= 6
                assert content == (CONTENT.get(page, bytes(PAGE_BYTES)) if is_known else None)


def test_equal_pages_have_equal_digests_in_each_piece(path: Path) -> None:
    saved = opened(path)
    mapped, hidden = saved.pages(0, 6), saved.pages(0, 6, hidden_in="ram0")
    assert mapped is not None
    assert hidden is not None
    assert np.array_equal(mapped.digests(), hidden.digests())
    assert not hidden.absent().absent.any()
    assert not hidden.absent().certain


def test_pages_that_were_not_saved_are_missing(path: Path) -> None:
    saved = opened(path)
    assert saved.pages(6 * PAGE_BYTES, 7) is None
    assert saved.pages(PAGES * PAGE_BYTES, 1) is None
    assert saved.pages(0, 7, hidden_in="ram0") is None
    assert saved.pages(0, 1, hidden_in="ram1") is None


def test_zero_pages_need_no_space(tmp_path: Path) -> None:
    path = tmp_path / "zeros.snap"
    count = PIECE_BYTES // PAGE_BYTES
    nothing = Absent(np.ones(count, dtype=np.bool_))
    with ram_fd(count * PAGE_BYTES) as fd, create(path) as file:
        writer = SnapshotWriter(file)
        pages = FilePages(Extent(fd), count, DataRuns(fd), lambda: nothing)
        writer.add((0, "ram0", 0), pages, with_absent=True, with_content=True)
        writer.end({})
    assert path.stat().st_size < 1000
    found = opened(path).pages(0, count)
    assert found is not None
    assert not found.digests().any()
    assert found.absent().absent.all()


@pytest.mark.parametrize(
    ("flags", "runs"),
    [("", []), ("0", []), ("1", [[0, 1]]), ("0110111", [[1, 2], [4, 3]]), ("11", [[0, 2]])],
)
def test_runs_are_a_first_page_and_a_count(flags: str, runs: list[list[int]]) -> None:
    found: NDArray[np.uint64] = counted_runs(
        np.array([flag == "1" for flag in flags], dtype=np.bool_)
    )
    assert (found.tolist(), found.dtype) == (runs, np.dtype("<u8"))


def cut(content: bytes) -> bytes:
    return content[:-1]


def without_index(content: bytes) -> bytes:
    return content[:100] + content[-8 - len(END) :]


def with_another_index(content: bytes) -> bytes:
    return content.replace(b'"zero_runs"', b'"zero_rums"')


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "the program that wrote it was ended"),
        (lambda content: MAGIC, "the program that wrote it was ended"),
        (without_index, "is not a complete snapshot"),
        (with_another_index, "zero_runs"),
        (lambda content: b"", "does not begin like a snapshot"),
    ],
)
def test_a_damaged_file_is_refused(path: Path, damage: Callable[[bytes], bytes], why: str) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UntestableError, match=why) as caught:
        opened(path)
    assert "take it again with 'dmaproof snapshot'" in str(caught.value)


def test_content_that_does_not_fit_its_digest_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(CONTENT[11], b"?" + CONTENT[11][1:]))
    found = opened(path).pages(0, PAGES)
    assert found is not None
    assert found.content(3) == bytes(PAGE_BYTES)
    with pytest.raises(UntestableError, match="content of a page does not fit its digest"):
        found.content(11)


def test_a_file_that_shrinks_meanwhile_is_refused(path: Path) -> None:
    saved = opened(path)
    path.write_bytes(MAGIC)
    with pytest.raises(UntestableError, match="is damaged: its index names data after its end"):
        saved.pages(0, 1)


def test_another_version_of_the_format_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(MAGIC, MAGIC.replace(b"1", b"2")))
    assert is_snapshot(path)
    with pytest.raises(UntestableError, match="has another version of the format"):
        opened(path)


def test_a_snapshot_is_private(tmp_path: Path) -> None:
    with create(tmp_path / "private.snap"):
        assert (tmp_path / "private.snap").stat().st_mode & 0o777 == 0o600


def test_data_after_the_end_of_the_file_is_refused(path: Path) -> None:
    content = path.read_bytes()
    saved = content.replace(b'"position": 16,', b'"position": 9999999,')
    length = int.from_bytes(content[-8 - len(END) : -len(END)], "little") + 5
    path.write_bytes(saved[: -8 - len(END)] + length.to_bytes(8, "little") + END)
    with pytest.raises(UntestableError, match="its index names data after its end"):
        opened(path).pages(6 * PAGE_BYTES, 1)


def test_a_snapshot_is_recognized_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new.snap"
    assert not is_snapshot(path)
    assert not is_snapshot(tmp_path)
    with create(path) as file:
        assert is_snapshot(path)
        with path.open("rb") as reader, pytest.raises(BlockingIOError):
            fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(UsageError, match="another program writes or reads the snapshot"):
            create(path)
        assert file.tell() == len(MAGIC)
    with path.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "full.snap"
    path.symlink_to("/dev/full")
    with ram_fd(PAGE_BYTES) as fd:
        os.pwrite(fd, b"x", 0)
        pages = FilePages(Extent(fd), 1, DataRuns(fd), lambda: Absent(np.zeros(1, dtype=np.bool_)))
        with path.open("wb", buffering=0) as file:
            writer = SnapshotWriter(file)
            with pytest.raises(UntestableError, match=r"cannot write .*full\.snap: No space left"):
                writer.add((0, "ram0", 0), pages, with_absent=False, with_content=False)


def test_an_existing_file_is_replaced_and_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"x" * 1000)
    create(path).close()
    assert path.read_bytes() == MAGIC
    with pytest.raises(UsageError, match=r"cannot write .*: Is a directory"):
        create(tmp_path)
