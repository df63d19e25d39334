"""The command's standard streams, guarded: closed ones, full devices, readers that go away.

Without this Python tells of a full device when it has ended already, by a traceback and an exit
code of its own; and a descriptor that is closed is the next file's or socket's.
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
    """Standard output takes nothing."""


class UnreadOutputError(OutputError):
    """Whoever read the output has seen enough of it."""


class _Raw(io.FileIO):
    """One of the streams' descriptors, which stays open."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError as error:
            raise UnreadOutputError("nobody reads the output any more") from error
        except OSError as error:
            return self._failed(memoryview(data).nbytes, error)  # type: ignore[arg-type]

    def _failed(self, size: int, error: OSError) -> int:
        why = _CLOSED.get(error.errno or 0, error.strerror)
        raise OutputError(f"standard output cannot be written to: {why}") from error


class _RawErrors(_Raw):
    """Standard error: what it does not take is not told, and nothing need end for that."""

    def _failed(self, size: int, error: OSError) -> int:
        return size


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Have `sys.stdout` and `sys.stderr` fail by an `OutputError`, or not at all.

    What is left in their buffers afterwards is dropped. Streams that somebody has put in their
    place, such as a test framework, are left alone.
    """
    if (sys.stdout, sys.stderr) != (sys.__stdout__, sys.__stderr__):
        yield
        return
    before = sys.stdout, sys.stderr
    _number(sys.stdin, os.O_RDONLY)  # its number must be no other file's
    output = _number(sys.stdout, os.O_RDONLY)  # what is written there fails, and is told
    errors = _number(sys.stderr, os.O_WRONLY)
    sys.stdout = _guarded(_Raw(output), sys.__stdout__)
    sys.stderr = _guarded(_RawErrors(errors), sys.__stderr__, line_buffering=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _number(stream: TextIO | None, flags: int) -> int:
    """The descriptor of `stream`; where it was closed, one that is open takes its number."""
    return stream.fileno() if stream is not None else os.open(os.devnull, flags)


def _guarded(raw: _Raw, before: TextIO | None, *, line_buffering: bool = False) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=line_buffering or (before is not None and before.isatty()),
    )
