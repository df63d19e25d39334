"""Continue the guest on the destination after the comparison, and collect what it reports.

If the proof kills the destination's device, it does so as soon as the device has done requests of
the guest there and others are under way. The device is started again only when the guest has
reported, after the device's death, how many requests are unanswered: so the restarted device has
requests to find. The guest pauses before it rechecks its pages, until every request is answered.
All requests that it does after that are answered by the restarted device.
"""

from __future__ import annotations

import logging
from typing import Final

from dmaproof.errors import UntestableError

from ..guest.channel import QUIET, RECHECK, GuestChannel, GuestGaveUpError, GuestLateError
from ..migration.pair import QemuPair
from ..migration.scenarios.base import Scenario
from .verdict import GuestOutcome

_logger = logging.getLogger(__name__)

_TIMEOUT_AFTER_LOSS_S: Final = 30.0
"""The bound of each wait for a guest whose RAM is damaged: it may never answer."""

_REMEDY: Final = (
    "requests that were under way survive if the back end notes them in QEMU's file (protocol "
    "feature INFLIGHT_SHMFD)"
)


async def continue_guest(
    pair: QemuPair, scenario: Scenario, requests_after: int, *, pages_are_lost: bool
) -> GuestOutcome:
    """Continue the guest, which rechecks all its pages and does `requests_after` more requests.

    Raises:
        UntestableError: the guest does not continue, although no page and no request was lost.
    """
    continuation = _Continuation(pair, scenario, requests_after, pages_are_lost=pages_are_lost)
    try:
        return await pair.guarded(continuation.run())
    except UntestableError as error:
        return continuation.failed(error)


class _Continuation:
    """One guest that continues; `failed` judges why it does not."""

    def __init__(
        self, pair: QemuPair, scenario: Scenario, requests_after: int, *, pages_are_lost: bool
    ) -> None:
        self._pair = pair
        self._scenario = scenario
        self._requests_after = requests_after
        self._pages_are_lost = pages_are_lost
        self._timeout_s = _TIMEOUT_AFTER_LOSS_S if pages_are_lost else None
        self._awaiting_restart: int | None = None

    @property
    def _guest(self) -> GuestChannel:
        return self._pair.destination_guest

    async def run(self) -> GuestOutcome:
        """Continue the guest, and return what it has found."""
        pair, guest = self._pair, self._guest
        before = pair.source_guest.number("progress", "requests")
        await self._scenario.finish(pair)
        if pair.device.is_killed_on_destination and not self._pages_are_lost:
            await self._restart_device()
        rechecked = await self._recheck()
        if self._awaiting_restart is not None:
            await self._new_progress()
            before = guest.number("progress", "requests")
        requests = await self._more_requests(before)
        if not self._pages_are_lost and await self._scenario.disturb_destination(pair):
            before = guest.number("progress", "requests")
            await self._recheck()
            requests += await self._more_requests(before)
        earlier_errors = pair.source_guest.earlier_errors + guest.earlier_errors
        return GuestOutcome(
            requests=requests,
            errors=earlier_errors + guest.number("progress", "errors"),
            rechecked=rechecked,
            error_messages=guest.error_messages,
            awaiting_restart=self._awaiting_restart,
        )

    async def _restart_device(self) -> None:
        """Kill the destination's device while the guest has requests under way; start it again."""
        pair, side, guest = self._pair, self._pair.destination_side, self._guest
        await self._new_progress()
        first = guest.number("progress", "requests")
        await guest.wait_for(
            lambda: self._under_way > 0 and guest.number("progress", "requests") > first,
            "done requests while others were under way",
        )
        _logger.info("killing the destination's device")
        await pair.device.kill(side)
        # The guest answers after the death of the device, so its next report is newer than that.
        await guest.ask(QUIET, "quiet", "answered a command")
        guest.latest.pop("progress", None)
        await guest.wait_for(lambda: self._under_way > 0, "made requests of its dead device")
        self._awaiting_restart = self._under_way
        await pair.device.start_again(side)

    @property
    def _under_way(self) -> int:
        return self._guest.number("progress", "under_way")

    async def _new_progress(self) -> None:
        guest = self._guest
        guest.latest.pop("progress", None)
        await guest.wait_for(lambda: "progress" in guest.latest, "reported its progress")

    async def _recheck(self) -> int:
        """Have the guest check all its pages, and return how many it has checked."""
        await self._guest.ask(RECHECK, "recheck", "rechecked its pages", self._timeout_s)
        return self._guest.number("recheck", "pages")

    async def _more_requests(self, before: int) -> int:
        """Wait for the wanted requests more than `before`; return how many more there are."""
        guest, wanted = self._guest, self._requests_after

        def done() -> int:
            return guest.number("progress", "requests") - before

        await guest.wait_for(
            lambda: done() >= wanted, f"done {wanted} more requests", self._timeout_s
        )
        return done()

    def failed(self, error: UntestableError) -> GuestOutcome:
        """Return what the guest has lost, if that is why it does not continue.

        Raises:
            UntestableError: `error`, if nothing was lost.
        """
        is_restarted = self._awaiting_restart is not None
        unanswered = self._unanswered if isinstance(error, GuestLateError) else 0
        gave_up = is_restarted and isinstance(error, GuestGaveUpError)
        if not (self._pages_are_lost or unanswered or gave_up):
            raise error
        error_messages = [str(error).splitlines()[0]]
        if unanswered and is_restarted:
            error_messages.append(
                f"{unanswered} of the guest's requests were not answered: the destination's device "
                f"was killed and restarted, and the back end or QEMU lost them; {_REMEDY}"
            )
        elif unanswered:
            error_messages.append(
                f"{unanswered} of the guest's requests were not answered: the source's device "
                "released its rings before it had completed these requests, or its last writes to "
                "the rings were lost"
            )
        elif gave_up:
            error_messages.append(
                "the guest gave up after the destination's device had been killed and restarted: "
                f"the back end or QEMU repeated or damaged requests; {_REMEDY}"
            )
        return GuestOutcome(
            0, unanswered or 1, 0, error_messages, awaiting_restart=self._awaiting_restart
        )

    @property
    def _unanswered(self) -> int:
        """How many requests the destination's guest waits for, if it makes no new ones."""
        return 0 if "recheck" in self._guest.latest else self._under_way
