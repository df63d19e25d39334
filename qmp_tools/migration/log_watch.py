"""Watch QEMU's vhost log, as evidence about a device that keeps no journal.

A `LogWatch` reads the log thousands of times a second, from the time when the migration is held in
precopy until the source's guest has been paused. It finds three faults that a comparison of RAM
usually misses:

- *A bit that the device sets before it writes the data.* If QEMU syncs between the two, it sends
  the old page. A sync rarely falls into these few milliseconds, so the watch imitates the sync: it
  takes the bit of a page that is still empty. QEMU has sent that page as empty before, so taking
  the bit has the same effect as sending the empty page again. If the device sets the bit after it
  has written the data, QEMU still sends the page. If the device does not, the page is lost, and the
  comparison finds it.
- *A bit that the device sets after QEMU has read the log for the last time*, when all rings have
  stopped: the bit stays in the log.
- *A used ring that the device never logs*, although the ring's index moves and other bits are set.
  The RAM may still be equal, because QEMU dirties a used ring when it stops the ring
  (vhost_virtqueue_stop).
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
from dmaproof.units import div_ceil

from ..memory.ram import RamFile
from ..qemu.qmp import Qmp, QmpRefusal

_PAUSE_S: Final = 100e-6
"""One pass over the log takes some 20 µs. The guest and the device need the processors more."""
_MOST_NEW: Final = 4096
"""A device that sets more bits than this between two passes may report pages that it has not
written. Reading all these pages would fill the holes of the guest's memory."""
_MOST_TAKEN: Final = 64
"""The most pages to take: they are enough to prove the fault, and the guest has to continue
without them."""
_REPORTS_TO_JUDGE: Final = 8
"""The passes that must have found new bits before used rings are judged. A device may hold bits
back until it is stopped; such a device has fewer passes with new bits."""
_REQUESTS_TO_JUDGE: Final = 64
"""The requests after which a queue is judged: it has been in use for the whole time, and not only
at the end."""
_PAUSES_KEPT: Final = 1 << 16
_CRASHES_FOR_SCSI_BEFORE: Final = (8, 2)
"""Older versions crash if they are asked about the queues of a vhost-user-scsi device that runs:
its class has no get_vhost, which qmp_x_query_virtio_vhost_queue_status calls."""


@dataclass(frozen=True)
class UsedRing:
    """The used ring of a queue, and its guest-physical address."""

    queue: int
    gpa: int


@dataclass(frozen=True)
class LogEvidence:
    """The findings of a `LogWatch`. `late_bits` and `early_bits` are page addresses in bytes.

    `looks` counts the passes over the log; 99 % of the pauses between two passes were no longer
    than `look_interval_s`. `early_bits` were taken from the log before the device had written the
    data; these pages are lost unless the device set the bits again. `unlogged_queues` are those of
    the `judged_queues` whose used rings the device never logged.
    """

    looks: int
    look_interval_s: float
    early_bits: Sequence[int] = ()
    late_bits: Sequence[int] = ()
    judged_queues: Sequence[int] = ()
    unlogged_queues: Sequence[int] = ()


async def used_rings(qmp: Qmp) -> list[UsedRing]:
    """Ask QEMU for the used rings of every started vhost device, unless it would crash."""
    found: list[UsedRing] = []
    with contextlib.suppress(QmpRefusal):  # QEMU before 7.2 does not have the command
        version = (await qmp.execute("query-version"))["qemu"]
        crashes_for_scsi = (version["major"], version["minor"]) < _CRASHES_FOR_SCSI_BEFORE
        for device in await qmp.execute("x-query-virtio"):
            if crashes_for_scsi and device["name"] == "virtio-scsi":
                continue
            with contextlib.suppress(QmpRefusal):  # no more queues, or not a vhost device
                for queue in itertools.count():
                    status = await qmp.execute(
                        "x-query-virtio-vhost-queue-status", path=device["path"], queue=queue
                    )
                    found.append(UsedRing(queue, status["used-phys"]))
    return found


class LogWatch:
    """A thread that watches the vhost log, which is open as `log_fd` for reading and writing.

    `files` and `slots` say where the guest has its RAM, and `rings` where its used rings are.
    `looks` counts the passes over the log, and `reports` those that found new bits.
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
        self._thread = threading.Thread(target=self._watch, name="log-watch", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Take no more bits; give back the bits that were not early, before QEMU needs them."""
        with self._taking:
            self._takes = False
            for number in list(self._taken):
                page = self._page(number)
                if page is None or read_stamp(page.tobytes()) is None:  # still without the data
                    self._give_back(number)
                    self._taken.remove(number)

    def end(self) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def evidence(self) -> LogEvidence:
        """Return the findings after the migration; every bit in the log now was set too late."""
        judged = [
            ring
            for ring, index in self._rings.items()
            if self.reports >= _REPORTS_TO_JUDGE
            and (self._used_index(ring) - index) % (1 << 16) >= _REQUESTS_TO_JUDGE
        ]
        # QEMU takes only the bits of RAM, and may have read the log before a bit was given back.
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

    def _watch(self) -> None:
        before = np.zeros_like(self._log)
        last_s = time.monotonic()
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
            time.sleep(_PAUSE_S)
            self._pauses_s.append(-last_s + (last_s := time.monotonic()))

    def _take_early(self, pages: NDArray[np.int64]) -> None:
        """Take the bits of those `pages` (GPA page numbers) that are still empty."""
        if len(pages) > _MOST_NEW:
            return
        for first, memory in self._memory:
            inside = pages[(pages >= first) & (pages < first + len(memory))] - first
            for page in inside[memory[inside, 0] == 0].tolist():
                if len(self._taken) >= _MOST_TAKEN or memory[page].any():
                    continue
                number = first + page
                if not _core.take_set(self._log, number, 1):  # QEMU has taken the bit
                    continue
                if memory[page].any():  # the device may have set the bit again after the data
                    self._give_back(number)
                else:
                    self._taken.add(number)

    def _give_back(self, number: int) -> None:
        self._given_back.add(number)
        _core.set_bits(self._log, number, 1)

    def _page(self, number: int) -> NDArray[np.uint64] | None:
        """Return the words of GPA page `number`; None if there is no RAM."""
        for first, memory in self._memory:
            if first <= number < first + len(memory):
                page: NDArray[np.uint64] = memory[number - first]
                return page
        return None

    def _used_index(self, ring: UsedRing) -> int:
        """Return the ring's current index, the 16 bits after 16 bits of flags."""
        number, offset = divmod(ring.gpa, LOG_PAGE_BYTES)
        page = self._page(number)
        return 0 if page is None else int(page.view(np.uint16)[offset // 2 + 1])

    def _was_logged(self, ring: UsedRing) -> bool:
        """Return whether the bit of the page with the ring's index was ever set."""
        word, bit = divmod(ring.gpa // LOG_PAGE_BYTES, 64)
        return bool((self._ever[word] | self._log[word]) >> np.uint64(bit) & np.uint64(1))


def _pages_of(ram: RamFile, slot: Slot) -> NDArray[np.uint64]:
    """Map the slot's pages, as words that change when the guest or a device writes."""
    page_bytes = max(ram.page_bytes, mmap.PAGESIZE)  # a mapping consists of whole pages
    skipped = slot.file_offset % page_bytes
    start = slot.file_offset - skipped
    end = div_ceil(slot.file_offset + slot.length, page_bytes) * page_bytes
    memory = mmap.mmap(
        ram.fd,
        min(end, ram.length) - start,
        mmap.MAP_SHARED,
        mmap.PROT_READ,
        offset=start,
    )
    words = np.frombuffer(memory, dtype=np.uint64, offset=skipped, count=slot.length // 8)
    return words.reshape(-1, LOG_PAGE_BYTES // 8)


def _bits(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the numbers of the bits that are set."""
    places = np.flatnonzero(words)
    bytes_ = words[places].astype("<u8").view(np.uint8).reshape(-1, 8)
    rows, bits = np.nonzero(np.unpackbits(bytes_, axis=1, bitorder="little"))
    return places[rows] * 64 + bits


def _addresses(pages: Iterable[int]) -> list[int]:
    return sorted(page * LOG_PAGE_BYTES for page in pages)
