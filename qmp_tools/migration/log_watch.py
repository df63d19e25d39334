"""QEMU's vhost log as evidence against a device that keeps no journal.

A `LogWatch` looks at the log thousands of times a second while a migration is held in precopy, and
on until the source's guest has been paused for good. It tells three faults that a comparison alone
mostly misses:

- *A bit before its data.* QEMU sends the page as it was, if a sync comes just then; with some
  milliseconds between the two it hardly ever does. So the watch itself does at such a moment what
  QEMU's sync would have done: it takes the bit of a page that is still empty. Of a page that has
  been empty since it was sent, this is as if it had been sent again. A device that marks the page
  when its data is there, or once more then, brings it across all the same. The page of a device
  that does not is lost, and the comparison shows it.
- *A bit after QEMU has taken the log for the last time*, which is when all rings have stopped: it
  stays in the log.
- *A used ring whose bit is never seen*, though the ring's index moves and other bits come. Nothing
  need differ, as QEMU dirties a used ring when it stops it (vhost_virtqueue_stop).
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dmaproof import _core
from dmaproof.dirty_log import LOG_PAGE_BYTES
from dmaproof.evidence import Slot
from dmaproof.stamp import read_stamp

from ..memory.ram import RamFile
from ..qemu.qmp import Qmp, QmpRefusal

_LOOK_EVERY_S: Final = 100e-6
"""A look takes some 20 µs: the guest and the device need the processors more."""
_MOST_NEW: Final = 4096
"""With more new bits in one look than this, the device may well report what it has not written, and
reading all of that would fill the holes of the guest's memory."""
_MOST_TAKEN: Final = 64
"""Pages enough to tell the fault; the guest has to go on without them."""
_REPORTS_TO_JUDGE: Final = 8
"""Looks that found new bits. A device that keeps bits to itself until it is stopped, as it may, has
fewer, and its used rings are not judged."""
_REQUESTS_TO_JUDGE: Final = 64
"""With so many in its ring, a queue has been in use all the time, and not just at the end."""
_PAUSES_KEPT: Final = 1 << 16


@dataclass(frozen=True)
class UsedRing:
    """Where the used ring of a queue is."""

    queue: int
    gpa: int


@dataclass(frozen=True)
class LogEvidence:
    """What the log has shown. `late_bits` and `early_bits` are page addresses in bytes.

    `look_interval_s` is how long all but one in a hundred pauses between looks have been at most.
    Early bits were taken from the log before their pages' data had come; if the device has not set
    them again, these pages are lost. Of the `judged_queues`, the used rings of `unlogged_queues`
    were never logged.
    """

    looks: int
    look_interval_s: float
    early_bits: Sequence[int] = ()
    late_bits: Sequence[int] = ()
    judged_queues: Sequence[int] = ()
    unlogged_queues: Sequence[int] = ()


async def used_rings(qmp: Qmp) -> list[UsedRing]:
    """The used rings of every vhost device that has been started, by QEMU's own word."""
    found: list[UsedRing] = []
    with contextlib.suppress(QmpRefusal):  # QEMU before 7.2 cannot tell
        for device in await qmp.execute("x-query-virtio"):
            with contextlib.suppress(QmpRefusal):  # it has no more queues, or is no vhost device
                for queue in itertools.count():
                    status = await qmp.execute(
                        "x-query-virtio-vhost-queue-status", path=device["path"], queue=queue
                    )
                    found.append(UsedRing(queue, status["used-phys"]))
    return found


class LogWatch:
    """Watches the vhost log that is open as `log_fd` for reading and writing, from now on.

    `files` and `slots` say where the guest has its RAM, and `rings` where its used rings are. It
    has looked `looks` times so far, and `reports` times found new bits.
    """

    def __init__(
        self,
        log_fd: int,
        files: Sequence[RamFile],
        slots: Sequence[Slot],
        rings: Sequence[UsedRing],
    ) -> None:
        size = os.fstat(log_fd).st_size // 8 * 8
        self._log = np.frombuffer(mmap.mmap(log_fd, size), dtype=np.uint64)
        self._ever = np.zeros_like(self._log)
        self._memory = [
            (slot.gpa // LOG_PAGE_BYTES, _pages_of(ram, slot))
            for ram in files
            for slot in slots
            if (slot.device, slot.inode) == (ram.device, ram.inode)
        ]
        self._rings = {ring: self._used_index(ring) for ring in rings}
        self._taken: set[int] = set()
        self._given_back: set[int] = set()
        self._takes = True
        self._taking = threading.Lock()
        self._over = threading.Event()
        self.looks = 0
        self.reports = 0
        self._pauses_s: deque[float] = deque(maxlen=_PAUSES_KEPT)
        self._thread = threading.Thread(target=self._look_on, name="log-watch", daemon=True)
        self._thread.start()

    def let_go(self) -> None:
        """Take no more bits, and give those back that were not early, before QEMU needs them."""
        with self._taking:
            self._takes = False
            for number in list(self._taken):
                page = self._page(number)
                if page is None or read_stamp(page.tobytes()) is None:  # it was not read into yet
                    self._give_back(number)
                    self._taken.remove(number)

    def end(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def evidence(self) -> LogEvidence:
        """What has been seen, once it is over; what stands in the log now has come too late."""
        judged = [
            ring
            for ring, index in self._rings.items()
            if self.reports >= _REPORTS_TO_JUDGE
            and (self._used_index(ring) - index) % (1 << 16) >= _REQUESTS_TO_JUDGE
        ]
        # QEMU reads only the bits of RAM, and may have read the log before a bit was given back.
        late = [
            number
            for number in _bits(self._log).tolist()
            if number not in self._given_back and self._page(number) is not None
        ]
        return LogEvidence(
            looks=self.looks,
            look_interval_s=float(np.percentile([*self._pauses_s] or [0.0], 99)),
            early_bits=_addresses(self._taken),
            late_bits=_addresses(late),
            judged_queues=[ring.queue for ring in judged],
            unlogged_queues=[ring.queue for ring in judged if not self._was_logged(ring)],
        )

    def _look_on(self) -> None:
        before = np.zeros_like(self._log)
        looked_s = time.monotonic()
        while not self._over.is_set():
            now = self._log.copy()
            fresh = now & ~before
            if fresh.any():
                self._ever |= fresh
                self.reports += 1
                with self._taking:
                    if self._takes:
                        self._take_early(_bits(fresh))
            before = now
            self.looks += 1
            time.sleep(_LOOK_EVERY_S)
            self._pauses_s.append(-looked_s + (looked_s := time.monotonic()))

    def _take_early(self, pages: NDArray[np.int64]) -> None:
        """Take the bits of those of the pages (GPA page numbers) that are still empty."""
        if len(pages) > _MOST_NEW:
            return
        for first, memory in self._memory:
            inside = pages[(pages >= first) & (pages < first + len(memory))] - first
            for page in inside[memory[inside, 0] == 0].tolist():
                if len(self._taken) >= _MOST_TAKEN or memory[page].any():
                    continue
                number = first + page
                if not _core.take_set(self._log, number, 1):  # QEMU has
                    continue
                if memory[page].any():  # its data may have come, and its bit, before that was taken
                    self._give_back(number)
                else:
                    self._taken.add(number)

    def _give_back(self, number: int) -> None:
        self._given_back.add(number)
        _core.set_bits(self._log, number, 1)

    def _page(self, number: int) -> NDArray[np.uint64] | None:
        """The words of page `number` of GPA; None where there is no RAM."""
        for first, memory in self._memory:
            if first <= number < first + len(memory):
                page: NDArray[np.uint64] = memory[number - first]
                return page
        return None

    def _used_index(self, ring: UsedRing) -> int:
        """The ring's index, 16 bits after 16 bits of flags, as the device has written it last."""
        number, offset = divmod(ring.gpa, LOG_PAGE_BYTES)
        page = self._page(number)
        return 0 if page is None else int(page.view(np.uint16)[offset // 2 + 1])

    def _was_logged(self, ring: UsedRing) -> bool:
        """Whether the bit of the page that has the ring's index was ever seen."""
        word, bit = divmod(ring.gpa // LOG_PAGE_BYTES, 64)
        return bool((self._ever[word] | self._log[word]) >> np.uint64(bit) & np.uint64(1))


def _pages_of(ram: RamFile, slot: Slot) -> NDArray[np.uint64]:
    """The words of the slot's pages, as they are from moment to moment."""
    memory = mmap.mmap(
        ram.fd, slot.length, mmap.MAP_SHARED, mmap.PROT_READ, offset=slot.file_offset
    )
    return np.frombuffer(memory, dtype=np.uint64).reshape(-1, LOG_PAGE_BYTES // 8)


def _bits(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The numbers of the bits that are set."""
    places = np.flatnonzero(words)
    bytes_ = words[places].astype("<u8").view(np.uint8).reshape(-1, 8)
    rows, bits = np.nonzero(np.unpackbits(bytes_, axis=1, bitorder="little"))
    return places[rows] * 64 + bits


def _addresses(pages: Iterable[int]) -> list[int]:
    return sorted(page * LOG_PAGE_BYTES for page in pages)
