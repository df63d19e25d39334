"""Faults of the dirty log: bits do not reach the log that QEMU reads, or do not stay there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..collector import Collector
from ..dirty_log import LOG_PAGE_BYTES, BufferDirtyLog, DirtyLog, Words
from ..errors import BitmapError
from ..guest_memory import Bus, GuestMemory
from ..trace import Link, set_bits
from ..units import div_ceil
from .fault import Fault, uniform

_HIGH_PAGE: Final = (4 << 30) // LOG_PAGE_BYTES
_BETWEEN_READ_AND_WRITE_S: Final = 0.002


class _FilteredLog:
    """Passes on only the dirty pages for which `keep` is true, given their page numbers."""

    def __init__(
        self, log: DirtyLog, keep: Callable[[NDArray[np.uint64]], NDArray[np.bool_]]
    ) -> None:
        self._log = log
        self._keep = keep

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        dirty = set_bits(words, first_bit, pages)
        kept = self._keep(dirty.astype(np.uint64) + np.uint64(gpa // LOG_PAGE_BYTES))
        bits = np.zeros(div_ceil(pages, 64) * 64, dtype=np.uint8)
        bits[dirty[kept]] = 1
        self._log.merge(gpa, np.packbits(bits, bitorder="little").view("<u8"), 0, pages)

    def close(self) -> None:
        self._log.close()


class DropPages(Fault):
    """The log never receives the dirty bits of some pages, however often these are written."""

    name: ClassVar[str] = "drop-pages"
    link = Link.LOG
    value_means = "the share of pages"
    default = 0.01

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """Return a log that never receives the chosen pages."""
        return _FilteredLog(log, lambda pages: uniform(pages, self.seed) >= self.value)


class DropBits(Fault):
    """Each merge into the log drops some dirty bits; a later write can set them again."""

    name: ClassVar[str] = "drop-bits"
    link = Link.LOG
    value_means = "the share of bits"
    default = 0.02

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """Return a log that loses different pages at each merge."""
        merges = 0

        def keep(pages: NDArray[np.uint64]) -> NDArray[np.bool_]:
            nonlocal merges
            merges += 1
            return uniform(pages + np.uint64(merges << 32), self.seed) >= self.value

        return _FilteredLog(log, keep)


class ForgetHighSlot(Fault):
    """The log never receives dirty bits of pages above 4 GiB."""

    name: ClassVar[str] = "forget-high-slot"
    link = Link.LOG
    needs_high_ram = True

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """Return a log of the first 4 GiB."""
        return _FilteredLog(log, lambda pages: pages < np.uint64(_HIGH_PAGE))


class _KeepsOldLog(Collector):
    def switch_log(self, log: DirtyLog) -> None:
        self.harvest()
        log.close()


class ShortLog:
    """Drops bits beyond the log's end: those of slots that were added with the resize."""

    def __init__(self, log: DirtyLog) -> None:
        self._log = log

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        with contextlib.suppress(BitmapError):
            self._log.merge(gpa, words, first_bit, pages)

    def close(self) -> None:
        self._log.close()


class LogNotSwitched(Fault):
    """After QEMU has resized its log, the back end still writes dirty bits to the old log."""

    name: ClassVar[str] = "log-not-switched"
    link = Link.LOG
    needs = "a log that is resized"
    collector_type = _KeepsOldLog

    def wrap_log(self, log: DirtyLog) -> DirtyLog:
        """Return the first log, which is too short for the slots that were added later."""
        return ShortLog(log)


class _ReadModifyWrite:
    def __init__(self, log: DirtyLog) -> None:
        assert isinstance(log, BufferDirtyLog)
        self._log = log

    def merge(self, gpa: int, words: Words, first_bit: int, pages: int) -> None:
        log = np.frombuffer(self._log.memory, dtype=np.uint64)
        first_page = gpa // LOG_PAGE_BYTES
        low, high = first_page // 64, div_ceil(first_page + pages, 64)
        if high > len(log):
            raise BitmapError(f"dirty log: {pages} pages at GPA {gpa:#x} reach beyond its end")
        bits = np.zeros(high - low, dtype=np.uint64)
        _core.or_bits(bits, first_page - low * 64, words, first_bit, pages)
        changed = np.flatnonzero(bits)
        before = log[low + changed]
        time.sleep(_BETWEEN_READ_AND_WRITE_S)
        log[low + changed] = before | bits[changed]

    def close(self) -> None:
        self._log.close()


class _NonAtomicCollector(Collector):
    def start(self, log: DirtyLog, memory: GuestMemory, bus: Bus) -> None:
        super().start(_ReadModifyWrite(log), memory, bus)

    def switch_log(self, log: DirtyLog) -> None:
        super().switch_log(_ReadModifyWrite(log))


class NonAtomicOr(Fault):
    """The back end sets dirty bits without atomics while another device writes the same log."""

    name: ClassVar[str] = "non-atomic-or"
    link = Link.LOG
    needs = "a second device on the same log"
    collector_type = _NonAtomicCollector
