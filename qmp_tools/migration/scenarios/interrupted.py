"""Migrations after one that has failed: the source's guest must go on as if nothing had been.

The first attempt fails once every page has been sent. QEMU must take the dirty log from the device
then, and what the attempt had collected must not be missed by the next.
"""

from __future__ import annotations

import logging
from typing import Final

from ..attempt import Attempt
from ..pair import QemuPair
from .base import Scenario, migrate_until_all_sent

_logger = logging.getLogger(__name__)

_REQUESTS_BETWEEN: Final = 100
"""That the source's guest must do after an attempt has failed, before the next begins."""


class _Interrupted(Scenario):
    """A first attempt that fails in the way `interruption` says, carried out by `interrupt`."""

    interruption: str

    async def interrupt(self, attempt: Attempt) -> None:
        """Make the migration fail, in precopy when every page has been sent.

        Raises:
            UntestableError: it does not fail so.
        """
        raise NotImplementedError

    async def first_attempt(self, attempt: Attempt) -> None:
        """Migrate until every page has been sent, and let it fail; the source's guest goes on.

        The device's log must be taken from it, or it would go on logging for nobody. On a machine
        on which the guest gets nowhere for a while, only the pause keeps it from completing.
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
    """Cancelled, and migrated again."""

    name = "retry"
    summary = "cancelled in the middle of precopy, and migrated again"
    interruption = "cancelled in precopy"

    async def interrupt(self, attempt: Attempt) -> None:
        """Cancel the migration."""
        _expect_end_of_destination(attempt.pair)
        await attempt.migration.cancel()


class DestinationKilled(_Interrupted):
    """The destination killed in precopy."""

    name = "destination-killed"
    summary = "the destination killed in the middle of precopy, and migrated to a new one"
    interruption = "its destination killed in precopy"

    async def interrupt(self, attempt: Attempt) -> None:
        """Kill the destination."""
        _expect_end_of_destination(attempt.pair)
        await attempt.pair.destination.process.kill()
        await attempt.migration.fail()


class DestinationKilledLate(DestinationKilled):
    """The destination killed when the source's guest was paused."""

    name = "destination-killed-late"
    summary = (
        "the same when the source stood still already, and all but the last pages had been sent"
    )
    interruption = "its destination killed when the guest stood still"

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
