"""Hold a migration in precopy, even if the guest is slow or its devices write little.

QEMU ends precopy when a bitmap sync finds fewer dirty pages than QEMU can send within the downtime
limit, which dmaproof sets to 1 ms. A guest that gets no CPU, or that KVM's write protection stops
at every page, dirties no pages. Instead, QEMU itself dirties the guest's hold pages
(guests/workload.h), which nothing in the guest uses: dmaproof writes to them over QEMU's test
channel after every sync. QEMU sends in portions of a tenth of a second (migration_rate_limit). If a
portion is smaller than the hold pages, some hold pages remain for the next portion, and dmaproof
dirties them again before that portion is sent. The longer this process takes from one poll of the
migration to the next, the smaller it makes the portions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dmaproof.units import PAGE_BYTES

from ..qemu.qtest import Qtest
from .migration import Migration, Progress

_PORTION_S: Final = 0.1
"""QEMU's BUFFER_DELAY."""
_SPARE_POLLS: Final = 4
"""The hold pages suffice for this number of polls: on a busy host, one may come late."""
_DECAY: Final = 0.9
"""The weight of a late poll falls by this factor with each poll that is in time."""


class PrecopyHold:
    """Keeps `migration` in precopy while the caller calls `keep` with each of its `Progress`.

    `pages` are the guest-physical addresses of pages that nothing in the guest uses. QEMU writes to
    them over `qtest`. Without such pages the guest has to dirty enough pages by itself.
    """

    def __init__(self, migration: Migration, qtest: Qtest, pages: Sequence[int]) -> None:
        self._migration = migration
        self._qtest = qtest
        self.pages = pages
        self._polled_ns: int | None = None
        self._poll_every_s = _PORTION_S
        self._dirtied = 0
        self._syncs_when_dirtied = -1

    async def keep(self, progress: Progress) -> None:
        """Dirty the hold pages if QEMU has synced since the last call, and limit the bandwidth.

        The limit is low enough for QEMU not to finish before the next call.

        Raises:
            QmpError: QEMU does not answer.
        """
        if self._polled_ns is not None:
            passed_s = (progress.time_ns - self._polled_ns) / 1e9
            self._poll_every_s = max(passed_s, self._poll_every_s * _DECAY, _PORTION_S)
        self._polled_ns = progress.time_ns
        await self._migration.limit_bandwidth(self._bytes_per_s(progress))
        if progress.syncs != self._syncs_when_dirtied and not progress.is_over:
            self._syncs_when_dirtied = progress.syncs
            await self._dirty()

    async def rest(self) -> None:
        """Hold the migration until the next call of `keep`, without writing to any page meanwhile.

        From now on QEMU sends so slowly that the dirty pages last longer than any wait.

        Raises:
            QmpError: QEMU does not answer.
        """
        await self._dirty()
        last_s = 2 * self._migration.limits.timeout_s
        await self._migration.limit_bandwidth(int(len(self.pages) * PAGE_BYTES / last_s))

    async def _dirty(self) -> None:
        self._dirtied += 1
        await self._qtest.write_words(self.pages, self._dirtied)

    def _bytes_per_s(self, progress: Progress) -> int:
        procedure = self._migration.procedure
        safe_s = _SPARE_POLLS * self._poll_every_s
        safe = int(len(self.pages) * PAGE_BYTES / safe_s) or procedure.held_bytes_per_s
        if self._migration.has_sent_all(progress):
            return min(self._migration.held_bytes_per_s, safe)
        left = progress.total if progress.remaining is None else progress.remaining
        return min(procedure.first_pass_bytes_per_s, max(safe, int((left or 0) / safe_s)))
