"""Holds a migration in precopy, however slow the guest is and whatever its devices do.

QEMU ends precopy when a bitmap sync finds fewer dirty pages than it can send within the downtime
limit, here 1 ms. A guest that gets no CPU, or that KVM's write protection stops at every page,
dirties none. So its hold pages (guests/workload.h), which nothing in the guest uses, are dirtied in
its place: QEMU itself writes to them, over its test channel, behind every sync. QEMU sends in
portions of a tenth of a second (migration_rate_limit). A portion that is smaller than the hold
pages leaves some of them for the next one, and before that is sent they are dirty again. The slower
this process gets to look at the migration, the smaller the portions are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dmaproof.units import PAGE_BYTES

from ..qemu.qtest import Qtest
from .migration import Migration, Progress

_PORTION_S: Final = 0.1
"""QEMU's BUFFER_DELAY."""
_LOOKS_TO_SPARE: Final = 2
_FORGOTTEN_SHARE: Final = 0.9
"""A look that came late counts less with each one that comes in time."""


class PrecopyHold:
    """Keeps `migration` in precopy for as long as `keep` is called with each of its `Progress`.

    `pages` are the guest-physical addresses of pages that nothing in the guest uses, to which QEMU
    writes over `qtest`. With none of them the guest has to dirty enough by itself.
    """

    def __init__(self, migration: Migration, qtest: Qtest, pages: Sequence[int]) -> None:
        self._migration = migration
        self._qtest = qtest
        self._pages = pages
        self._looked_ns: int | None = None
        self._look_every_s = _PORTION_S
        self._dirtied = 0
        self._syncs_when_dirtied = -1

    async def keep(self, progress: Progress) -> None:
        """Dirty the hold pages if QEMU has synced since, and bound what it sends until `keep` comes
        again.

        Raises:
            QmpError: QEMU does not answer.
        """
        if self._looked_ns is not None:
            passed_s = (progress.time_ns - self._looked_ns) / 1e9
            self._look_every_s = max(passed_s, self._look_every_s * _FORGOTTEN_SHARE, _PORTION_S)
        self._looked_ns = progress.time_ns
        await self._migration.limit_bandwidth(self._bytes_per_s(progress))
        if progress.syncs != self._syncs_when_dirtied and not progress.is_over:
            self._syncs_when_dirtied = progress.syncs
            self._dirtied += 1
            await self._qtest.write_words(self._pages, self._dirtied)

    def _bytes_per_s(self, progress: Progress) -> int:
        procedure = self._migration.procedure
        in_time_s = _LOOKS_TO_SPARE * self._look_every_s
        safe = int(len(self._pages) * PAGE_BYTES / in_time_s) or procedure.held_bytes_per_s
        if progress.syncs >= 2:
            return min(self._migration.held_bytes_per_s, safe)
        left = progress.total if progress.remaining is None else progress.remaining
        return min(procedure.first_pass_bytes_per_s, max(safe, int((left or 0) / in_time_s)))
