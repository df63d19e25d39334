"""Continue the guest on the destination after the comparison, and collect what it reports."""

from __future__ import annotations

from typing import Final

from dmaproof.errors import UntestableError

from ..guest.channel import RECHECK, GuestLateError
from ..migration.pair import QemuPair
from ..migration.scenarios.base import Scenario
from .verdict import GuestOutcome

_TIMEOUT_AFTER_LOSS_S: Final = 30.0
"""The bound of each wait for a guest whose RAM is damaged: it may never answer."""


async def continue_guest(
    pair: QemuPair, scenario: Scenario, requests_after: int, *, pages_are_lost: bool
) -> GuestOutcome:
    """Continue the guest, which rechecks all its pages and does `requests_after` more requests.

    Raises:
        UntestableError: the guest does not continue, although no page and no request was lost.
    """
    try:
        timeout_s = _TIMEOUT_AFTER_LOSS_S if pages_are_lost else None
        return await pair.guarded(_recheck(pair, scenario, requests_after, timeout_s))
    except UntestableError as error:
        unanswered = _unanswered(pair) if isinstance(error, GuestLateError) else 0
        if not (pages_are_lost or unanswered):
            raise
        error_messages = [str(error).splitlines()[0]]
        if unanswered:
            error_messages.append(
                f"{unanswered} of the guest's requests were not answered: the source's device "
                "released its rings before it had completed these requests, or its last writes to "
                "the rings were lost"
            )
        return GuestOutcome(0, unanswered or 1, 0, error_messages)


def _unanswered(pair: QemuPair) -> int:
    """Return how many requests the destination's guest still waits for, if it makes no new ones."""
    guest = pair.destination_guest
    return 0 if "recheck" in guest.latest else guest.number("progress", "under_way")


async def _recheck(
    pair: QemuPair, scenario: Scenario, requests_after: int, timeout_s: float | None
) -> GuestOutcome:
    """Continue on the destination; `timeout_s` bounds each wait, by default as in the pair."""
    guest = pair.destination_guest
    before = pair.source_guest.number("progress", "requests")
    await scenario.finish(pair)
    await guest.send(RECHECK)
    wanted = before + requests_after
    await guest.wait_for(lambda: "recheck" in guest.latest, "rechecked its pages", timeout_s)
    await guest.wait_for(
        lambda: guest.number("progress", "requests") >= wanted,
        f"done {requests_after} more requests",
        timeout_s,
    )
    return GuestOutcome(
        requests=guest.number("progress", "requests") - before,
        errors=guest.number("progress", "errors"),
        rechecked=guest.number("recheck", "pages"),
        error_messages=guest.error_messages,
    )
