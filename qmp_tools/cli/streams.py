"""Guards of the command's standard streams: against closed ones, full devices and lost readers.

Without the guards, Python would report a full device only at its exit, by a traceback and its own
exit code, and the next file or socket would get the number of a closed descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Final, TextIO

from dmaproof.errors import DmaproofError

_CLOSED: Final = {errno.EBADF: "it is closed"}


class OutputError(DmaproofError):
    """Standard output cannot be written to."""


class UnreadOutputError(OutputError):
    """The reader of the output has closed it, as ``head`` does."""


class _Raw(io.FileIO):
    """The descriptor of a stream; closing this object leaves it open."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError as error:
            raise UnreadOutputError("the reader has closed the output") from error
        except OSError as error:
            return self._failed(memoryview(data).nbytes, error)  # type: ignore[arg-type]

    def _failed(self, size: int, error: OSError) -> int:
        why = _CLOSED.get(error.errno or 0, error.strerror)
        raise OutputError(f"standard output cannot be written to: {why}") from error


class _RawErrors(_Raw):
    """Standard error: output that cannot be written is dropped, and the command continues."""

    def _failed(self, size: int, error: OSError) -> int:
        return size


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Make `sys.stdout` fail only by an `OutputError`, and `sys.stderr` only by a lost reader.

    What is left in their buffers afterwards is dropped. Streams that a program has replaced, as a
    test framework does, are left alone.
    """
    if (sys.stdout, sys.stderr) != (sys.__stdout__, sys.__stderr__):
        yield
        return
    before = sys.stdout, sys.stderr
    _number(sys.stdin, os.O_RDONLY)  # no other file may get its number
    output = _number(sys.stdout, os.O_RDONLY)  # so that writing fails, and is reported
    errors = _number(sys.stderr, os.O_WRONLY)
    sys.stdout = _guarded(_Raw(output), sys.__stdout__)
    sys.stderr = _guarded(_RawErrors(errors), sys.__stderr__, line_buffering=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _number(stream: TextIO | None, flags: int) -> int:
    """Return the descriptor of `stream`; if it was closed, /dev/null takes its number."""
    return stream.fileno() if stream is not None else os.open(os.devnull, flags)


def _guarded(raw: _Raw, before: TextIO | None, *, line_buffering: bool = False) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=line_buffering or (before is not None and before.isatty()),
    )
