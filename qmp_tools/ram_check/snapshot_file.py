"""The file format of snapshots: what a comparison needs of a guest, without its QEMU.

The file has three parts; docs/snapshot.md describes it for other programs:

1. The magic number `MAGIC`, which contains the version of the format.
2. The data of pieces of RAM, one piece after the other.
3. The index, in JSON, followed by its length (8 bytes, little-endian) and `END`.

A file without the third part is incomplete, because its writer was ended. A program that writes a
snapshot holds a lock on the file (flock(2)), so that a reader can wait for the end.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import IO, Any, Final, TypeVar, get_args, get_type_hints

import numpy as np
import xxhash
from numpy.typing import NDArray

from dmaproof.errors import UntestableError, UsageError
from dmaproof.units import PAGE_BYTES

from ..memory.absent_pages import Absent
from ..memory.copied_memory import PIECE_BYTES
from ..memory.data_runs import runs_of
from ..memory.page_digests import DIGEST_BYTES
from ..memory.pages import Pages, SavedPages

_NAME: Final = b"dmaproof-snap "
MAGIC: Final = _NAME + b"1\n"
END: Final = b"end of snapshot\n"
_LENGTH_BYTES: Final = 8
_COUNT: Final = np.dtype("<u8")
_LARGEST: Final = 1 << 64
"""The largest number in an index: the length of a region that fills the address space."""

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """The place in a file of the data about `pages` consecutive pages.

    `gpa` is None in RAM that the physical map hides. `offset` is that of the first page in the
    memory region. The data of a piece begins at byte `position`: `zero_runs` runs of pages of
    zeros, `absent_runs` runs of absent pages, the digests of the pages that are not zero, and, if
    `has_content`, the bytes of these pages. A run is the number of its first page and its number of
    pages. `absent_runs` is None if absent pages were not sought; they are `certain` or not, as in
    `Absent`.
    """

    gpa: int | None
    region: str
    offset: int
    pages: int
    position: int
    zero_runs: int
    absent_runs: int | None
    certain: bool
    has_content: bool

    @property
    def start(self) -> int:
        """The GPA of the first page, or its offset in the region if it is hidden."""
        return self.offset if self.gpa is None else self.gpa

    @property
    def hidden_in(self) -> str | None:
        """The region if the physical map hides the piece, else None."""
        return self.region if self.gpa is None else None


@dataclass
class SnapshotWriter:
    """Writes a snapshot into `file`, which `create` has made."""

    file: FileIO
    pieces: list[Piece] = field(default_factory=list)

    def add(
        self,
        place: tuple[int | None, str, int],
        pages: Pages,
        *,
        with_absent: bool,
        with_content: bool,
    ) -> None:
        """Append a piece.

        Args:
            place: the GPA, the memory region and the offset in it of the first page.
            pages: the pages.
            with_absent: whether to find the absent pages.
            with_content: whether to write the content of the pages that are not zero.
        """
        digests = pages.digests()
        is_zero = np.logical_not(digests.any(axis=1)).astype(np.bool_)
        zero_runs = counted_runs(is_zero)
        absence = pages.absent() if with_absent else None
        absent_runs = counted_runs(absence.absent) if absence else None
        position = self.file.tell()
        for data in (zero_runs, absent_runs, digests[~is_zero]):
            if data is not None:
                self._write(data.tobytes())
        if with_content:
            for page in np.flatnonzero(~is_zero):
                self._write(pages.content(int(page)) or b"")
        self.pieces.append(
            Piece(
                *place,
                pages=pages.count,
                position=position,
                zero_runs=len(zero_runs),
                absent_runs=None if absent_runs is None else len(absent_runs),
                certain=absence.certain if absence else False,
                has_content=with_content,
            )
        )

    def end(self, index: Mapping[str, Any]) -> None:
        """Write the index and the end of the file."""
        text = json.dumps({**index, "pieces": [asdict(piece) for piece in self.pieces]}).encode()
        self._write(text + len(text).to_bytes(_LENGTH_BYTES, "little") + END)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise UntestableError(
                f"cannot write {self.file.name}: {error.strerror}. A snapshot needs 16 bytes for "
                "each page that is not zero; name a file on another disk"
            ) from error


def counted_runs(flags: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return the runs of True, of shape (runs, 2): number of the first page, number of pages."""
    runs = runs_of(flags)
    return np.column_stack((runs[:, 0], runs[:, 1] - runs[:, 0])).astype(_COUNT)


class SnapshotFile:
    """A complete snapshot in a file; `name` is for messages."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        """Open the snapshot in `file`, which may be closed afterwards.

        Raises:
            UntestableError: the file is incomplete or damaged, or has an unknown version.
        """
        self.name = name
        # The file is not mapped: if it shrinks, an access to a mapping is a SIGBUS.
        self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        try:
            self.index: dict[str, Any] = json.loads(self._index())
            pieces = [_piece(members) for members in typed(self.index["pieces"], list)]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise incomplete(name, error) from None
        self._pieces: dict[str | None, list[Piece]] = {}
        for piece in sorted(pieces, key=lambda each: each.start):
            self._pieces.setdefault(piece.hidden_in, []).append(piece)

    def pages(self, start: int, count: int, *, hidden_in: str | None = None) -> SavedPages | None:
        """Return `count` pages from the GPA `start` on; None if one of them is missing.

        If the physical map hides the pages, `hidden_in` is their region and `start` their offset.
        """
        pieces = self._pieces.get(hidden_in, [])
        parts: list[SavedPages] = []
        found = 0
        while found < count:
            at = start + found * PAGE_BYTES
            number = bisect.bisect_right(pieces, at, key=lambda piece: piece.start) - 1
            first = (at - pieces[number].start) // PAGE_BYTES if number >= 0 else 0
            if number < 0 or first >= pieces[number].pages:
                return None
            parts.append(
                self._part(pieces[number], first, min(count - found, pieces[number].pages - first))
            )
            found += parts[-1].count
        return _joined(parts)

    def _part(self, piece: Piece, first: int, count: int) -> SavedPages:
        position = piece.position
        flags = []
        for runs in (piece.zero_runs, piece.absent_runs or 0):
            table = self._array(_COUNT, position, runs * 2).reshape(-1, 2)
            position += table.nbytes
            flags.append(_flags_of(table, piece.pages))
        is_zero, is_absent = flags
        saved = self._array(_COUNT, position, int((~is_zero).sum()) * 2).reshape(-1, 2)
        digests = np.zeros((piece.pages, 2), dtype=_COUNT)
        digests[~is_zero] = saved
        content_position = position + len(saved) * DIGEST_BYTES
        # The content of the pages that are not zero is in the order of the pages.
        rank = np.cumsum(~is_zero) - 1

        def content(page: int) -> bytes | None:
            if is_zero[first + page]:
                return bytes(PAGE_BYTES)
            if not piece.has_content:
                return None
            begin = content_position + int(rank[first + page]) * PAGE_BYTES
            found = self._read(begin, PAGE_BYTES)
            if xxhash.xxh3_128_digest(found) != digests[first + page].tobytes():
                raise UntestableError(
                    f"{self.name} is damaged: the content of a page does not fit its digest"
                )
            return found

        wanted = slice(first, first + count)
        return SavedPages(count, digests[wanted], Absent(is_absent[wanted], piece.certain), content)

    def _array(self, kind: np.dtype[Any], position: int, count: int) -> NDArray[Any]:
        return np.frombuffer(self._read(position, count * kind.itemsize), kind)

    def _read(self, position: int, length: int) -> bytes:
        if position + length > os.fstat(self._fd).st_size:
            raise UntestableError(f"{self.name} is damaged: its index names data after its end")
        content = os.pread(self._fd, length, position)
        if len(content) < length:
            raise UntestableError(f"{self.name} has changed while dmaproof read it")
        return content

    def _index(self) -> bytes:
        magic = os.pread(self._fd, len(MAGIC), 0)
        if not magic.startswith(_NAME):
            raise ValueError("it does not begin like a snapshot")
        if magic != MAGIC:
            raise UntestableError(
                f"{self.name} has another version of the format of snapshots than this dmaproof: "
                "use the dmaproof that took the snapshot"
            )
        end = os.fstat(self._fd).st_size - len(END) - _LENGTH_BYTES
        tail = os.pread(self._fd, _LENGTH_BYTES + len(END), max(end, 0))
        if tail[_LENGTH_BYTES:] != END:
            raise ValueError("the program that wrote it was ended")
        length = int.from_bytes(tail[:_LENGTH_BYTES], "little")
        if length > end:
            raise ValueError("its index is longer than the file")
        return self._read(end - length, length)


def incomplete(name: str, why: object) -> UntestableError:
    """Return the error about a file, called `name`, that is not a complete snapshot."""
    return UntestableError(
        f"{name} is not a complete snapshot ({why}): take it again with 'dmaproof snapshot'"
    )


def typed(value: Any, *kinds: type) -> Any:
    """Return a value of an index if it has one of these types.

    Raises:
        ValueError: it has another type, or is a number that no snapshot has.
    """
    # A bool is an int for isinstance.
    if type(value) not in kinds or (type(value) is int and not 0 <= value <= _LARGEST):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"its index has {str(value)[:40]!r} where it needs {expected}")
    return value


def made_of(kind: type[T], members: Any) -> T:
    """Make a dataclass from a JSON object of an index.

    Members that the dataclass does not have are from a later version of dmaproof, and are ignored.

    Raises:
        ValueError: `members` is not an object, or a member has another type.
        TypeError: a member is missing.
    """
    hints = get_type_hints(kind)
    return kind(
        **{
            name: typed(value, *(get_args(hints[name]) or (hints[name],)))
            for name, value in typed(members, dict).items()
            if name in hints
        }
    )


def _piece(members: Any) -> Piece:
    piece = made_of(Piece, members)
    if not 0 < piece.pages <= PIECE_BYTES // PAGE_BYTES:
        raise ValueError(f"its index has a piece of {piece.pages} pages")
    return piece


def _flags_of(runs: NDArray[np.uint64], pages: int) -> NDArray[np.bool_]:
    flags = np.zeros(pages, dtype=np.bool_)
    for first, count in runs.tolist():
        flags[first : first + count] = True
    return flags


def _joined(parts: list[SavedPages]) -> SavedPages:
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.count for part in parts)])

    def content(page: int) -> bytes | None:
        number = int(np.searchsorted(starts, page, side="right")) - 1
        return parts[number].content(page - int(starts[number]))

    return SavedPages(
        int(starts[-1]),
        np.concatenate([part.saved_digests for part in parts]),
        Absent(
            np.concatenate([part.saved_absent.absent for part in parts]),
            all(part.saved_absent.certain for part in parts),
        ),
        content,
    )


def is_snapshot(path: Path) -> bool:
    """Return whether a file begins like a snapshot of any version, complete or not."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_NAME)) == _NAME
    except OSError:
        return False


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # it may contain guest memory


def create(path: Path) -> FileIO:
    """Create the file at `path` for a snapshot, without a buffer, locked until it is closed.

    Raises:
        UsageError: the file cannot be created, or another program writes or reads it.
    """
    with contextlib.ExitStack() as stack:
        try:
            mode = "r+" if path.exists() else "x+"
            file = stack.enter_context(FileIO(path, mode, opener=_open_private))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(MAGIC)  # a reader that waits for the snapshot recognizes the file by it
        except BlockingIOError:
            raise UsageError(
                f"another program writes or reads the snapshot {path}: name another file"
            ) from None
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None
        stack.pop_all()
        return file
