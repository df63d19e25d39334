"""The guest that continues on the destination, whose device a proof may kill and start again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.guest.channel import GuestGaveUpError, GuestLateError
from qmp_tools.migration.pair import QemuPair
from qmp_tools.migration.scenarios.base import Scenario
from qmp_tools.proof.continuation import continue_guest
from qmp_tools.proof.verdict import GuestOutcome
from qmp_tools.qemu.machine import DESTINATION

UNDER_WAY = 4
REQUESTS_AFTER = 1000
LATE = GuestLateError("the guest has not rechecked its pages within 300 s")


class Guest:
    """A guest whose device is killed; it reports `UNDER_WAY` requests while the device is dead.

    `failure` is raised when the guest is to recheck its pages.
    """

    earlier_errors = 0
    error_messages = ()

    def __init__(self, steps: list[str], failure: UntestableError | None = None) -> None:
        self.latest: dict[str, object] = {}
        self._numbers = {"under_way": 0, "requests": 0, "pages": 50, "errors": 0}
        self._steps = steps
        self._failure = failure

    def number(self, verb: str, key: str) -> int:
        return self._numbers[key] if verb in self.latest else 0

    async def wait_for(
        self, reached: Callable[[], bool], what: str, timeout_s: float | None = None
    ) -> None:
        self.latest["progress"] = None
        is_dead = self._steps[-1:] == ["kill"]
        self._numbers["under_way"] = UNDER_WAY if is_dead else 1
        while not reached():
            self._numbers["requests"] += 100

    async def ask(
        self, command: bytes, verb: str, what: str, timeout_s: float | None = None
    ) -> None:
        if verb == "recheck":
            self._steps.append(verb)
            if self._failure is not None:
                self.latest["progress"] = None
                self._numbers["under_way"] = 2
                raise self._failure
            self._numbers["requests"] += 7
        self.latest[verb] = None


class Pair:
    """A pair that records what is done with the destination's device."""

    destination_side = DESTINATION

    def __init__(self, *, is_killed: bool, failure: UntestableError | None = None) -> None:
        self.steps: list[str] = []
        self.device = SimpleNamespace(
            is_killed_on_destination=is_killed,
            kill=self._step("kill"),
            start_again=self._step("start again"),
        )
        self.source_guest = Guest(self.steps)
        self.destination_guest = Guest(self.steps, failure)
        self.destination = SimpleNamespace(qmp=SimpleNamespace(execute=self._continue))

    def _step(self, name: str) -> Callable[[str], Awaitable[None]]:
        async def take(side: str) -> None:
            assert side == DESTINATION
            self.steps.append(name)

        return take

    async def _continue(self, command: str) -> None:
        self.steps.append(command)

    async def guarded(self, work: Awaitable[Any]) -> Any:
        return await work


def outcome(pair: Pair, *, pages_are_lost: bool = False) -> GuestOutcome:
    return asyncio.run(
        continue_guest(
            cast(QemuPair, pair), Scenario(), REQUESTS_AFTER, pages_are_lost=pages_are_lost
        )
    )


def test_the_device_is_dead_until_the_guest_has_reported_unanswered_requests() -> None:
    pair = Pair(is_killed=True)
    found = outcome(pair)
    assert pair.steps == ["cont", "kill", "start again", "recheck"]
    assert found.awaiting_restart == UNDER_WAY
    assert found.errors == 0


def test_only_requests_after_the_restart_count() -> None:
    """The guest has finished 7 requests by the end of its recheck."""
    assert outcome(Pair(is_killed=True)).requests == REQUESTS_AFTER
    assert outcome(Pair(is_killed=False)).requests == REQUESTS_AFTER + 7


@pytest.mark.parametrize("pages_are_lost", [False, True])
def test_a_device_that_is_not_to_be_killed_lives(pages_are_lost: bool) -> None:
    """A guest whose pages are lost may not answer anyway, so its device is not killed either."""
    pair = Pair(is_killed=pages_are_lost)
    assert outcome(pair, pages_are_lost=pages_are_lost).awaiting_restart is None
    assert pair.steps == ["cont", "recheck"]


def test_unanswered_requests_are_lost_by_the_restart() -> None:
    found = outcome(Pair(is_killed=True, failure=LATE))
    assert (found.errors, found.awaiting_restart) == (2, UNDER_WAY)
    assert found.error_messages[0] == str(LATE)
    assert found.error_messages[1].startswith(
        "2 of the guest's requests were not answered: the destination's device was killed and "
    )


def test_requests_that_are_unanswered_without_a_restart_are_lost_by_the_source() -> None:
    found = outcome(Pair(is_killed=False, failure=LATE))
    assert (found.errors, found.awaiting_restart) == (2, None)
    assert "the source's device released its rings" in found.error_messages[1]


def test_a_guest_that_gives_up_fails_the_proof_only_after_a_restart() -> None:
    gave_up = GuestGaveUpError("the disk has finished a request that was not in flight")
    found = outcome(Pair(is_killed=True, failure=gave_up))
    assert (found.errors, found.awaiting_restart) == (1, UNDER_WAY)
    assert "repeated or damaged requests" in found.error_messages[1]
    with pytest.raises(GuestGaveUpError):
        outcome(Pair(is_killed=False, failure=gave_up))


def test_a_device_that_does_not_start_again_is_not_tested() -> None:
    pair = Pair(is_killed=True, failure=UntestableError("the destination device has ended"))
    with pytest.raises(UntestableError, match="the destination device has ended"):
        outcome(pair)
