"""Migrations after one that has failed: the source's guest must continue as before.

The first attempt fails after QEMU has sent every page. QEMU must then remove the dirty log from the
device, and the next attempt must not lose what the first one has collected.
"""

from __future__ import annotations

import logging
from typing import Final

from ..attempt import Attempt
from ..pair import QemuPair
from .base import Scenario, migrate_until_all_sent

_logger = logging.getLogger(__name__)

_REQUESTS_BETWEEN: Final = 100
"""Requests that the source's guest must finish after a failed attempt, before the next begins."""


class _Interrupted(Scenario):
    """A first attempt that `interrupt` makes fail; `interruption` describes the failure."""

    interruption: str

    async def interrupt(self, attempt: Attempt) -> None:
        """Make the migration fail in precopy, after QEMU has sent every page.

        Raises:
            UntestableError: the migration does not fail as expected.
        """
        raise NotImplementedError

    async def first_attempt(self, attempt: Attempt) -> None:
        """Migrate until every page has been sent, make it fail, and continue the source's guest.

        QEMU must remove the device's log, or the device would continue to log. If the guest makes
        no progress for a while, only pause-before-switchover keeps the migration from completing.
        """
        pair = attempt.pair
        _logger.info("a first migration, %s", self.interruption)
        guest, destination = pair.source_guest, pair.destination
        await _let_pause_before_switchover(pair, True)
        await migrate_until_all_sent(attempt)
        await self.interrupt(attempt)
        await pair.device.logging_ended(pair.source_side)
        pair.destination_guest.close()
        await destination.end()
        await _let_pause_before_switchover(pair, False)
        wanted = guest.number("progress", "requests") + _REQUESTS_BETWEEN
        await guest.wait_for(
            lambda: guest.number("progress", "requests") >= wanted,
            f"done {_REQUESTS_BETWEEN} more requests after the first migration",
        )
        await pair.start_destination()


class Retry(_Interrupted):
    """The migration is cancelled during precopy, and the guest migrates again."""

    name = "retry"
    summary = "The migration is cancelled during precopy; the guest migrates again"
    interruption = "cancelled in precopy"

    async def interrupt(self, attempt: Attempt) -> None:
        """Cancel the migration."""
        _expect_end_of_destination(attempt.pair)
        await attempt.migration.cancel()


class DestinationKilled(_Interrupted):
    """The destination is killed during precopy."""

    name = "destination-killed"
    summary = "The destination is killed during precopy; the guest migrates to a new destination"
    interruption = "its destination killed in precopy"

    async def interrupt(self, attempt: Attempt) -> None:
        """Kill the destination."""
        _expect_end_of_destination(attempt.pair)
        await attempt.pair.destination.process.kill()
        await attempt.migration.fail()


class DestinationKilledLate(DestinationKilled):
    """The destination is killed after the source's guest has been paused."""

    name = "destination-killed-late"
    summary = "The same as destination-killed, but only after the source's guest has been paused"
    interruption = "its destination killed after the guest was paused"

    async def interrupt(self, attempt: Attempt) -> None:
        """Kill the destination at the switchover."""
        await attempt.migration.pause_before_switchover()
        await super().interrupt(attempt)


def _expect_end_of_destination(pair: QemuPair) -> None:
    pair.destination.process.expect_end()
    pair.device.release(pair.destination_side)


async def _let_pause_before_switchover(pair: QemuPair, state: bool) -> None:
    capability = {"capability": "pause-before-switchover", "state": state}
    await pair.source.qmp.execute("migrate-set-capabilities", capabilities=[capability])
