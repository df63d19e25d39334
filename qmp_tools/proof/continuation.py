"""Continue the guest on the destination after the comparison, and collect what it reports."""

from __future__ import annotations

from typing import Final

from dmaproof.errors import UntestableError

from ..guest.channel import RECHECK, GuestChannel, GuestLateError
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
        return await pair.guarded(
            _continue(pair, scenario, requests_after, pages_are_lost=pages_are_lost)
        )
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


async def _continue(
    pair: QemuPair, scenario: Scenario, requests_after: int, *, pages_are_lost: bool
) -> GuestOutcome:
    guest = pair.destination_guest
    timeout_s = _TIMEOUT_AFTER_LOSS_S if pages_are_lost else None
    before = pair.source_guest.number("progress", "requests")
    await scenario.finish(pair)
    rechecked = await _recheck(guest, timeout_s)
    requests = await _more_requests(guest, before, requests_after, timeout_s)
    if not pages_are_lost and await scenario.disturb_destination(pair):
        before = guest.number("progress", "requests")
        await _recheck(guest, timeout_s)
        requests += await _more_requests(guest, before, requests_after, timeout_s)
    earlier_errors = pair.source_guest.earlier_errors + guest.earlier_errors
    return GuestOutcome(
        requests=requests,
        errors=earlier_errors + guest.number("progress", "errors"),
        rechecked=rechecked,
        error_messages=guest.error_messages,
    )


async def _recheck(guest: GuestChannel, timeout_s: float | None) -> int:
    """Have the guest check all its pages, and return how many it has checked."""
    await guest.ask(RECHECK, "recheck", "rechecked its pages", timeout_s)
    return guest.number("recheck", "pages")


async def _more_requests(
    guest: GuestChannel, before: int, wanted: int, timeout_s: float | None
) -> int:
    """Wait for `wanted` requests more than `before`; return how many more the guest has done."""

    def done() -> int:
        return guest.number("progress", "requests") - before

    await guest.wait_for(lambda: done() >= wanted, f"done {wanted} more requests", timeout_s)
    return done()
