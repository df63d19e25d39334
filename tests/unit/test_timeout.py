"""Waits that poll: what they call, how long, and what they raise."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from dmaproof.errors import WaitTimeoutError
from qmp_tools.host.timeout import block_until, wait_until

Wait = Callable[[Callable[[], bool], float], None]
_LATE = WaitTimeoutError("it has not come")


def _asynchronous(reached: Callable[[], bool], timeout_s: float) -> None:
    asyncio.run(wait_until(reached, timeout_s, lambda: _LATE, pause_s=0.001))


def _awaited(reached: Callable[[], bool], timeout_s: float) -> None:
    async def look() -> bool:
        await asyncio.sleep(0)
        return reached()

    asyncio.run(wait_until(look, timeout_s, lambda: _LATE, pause_s=0.001))


def _blocking(reached: Callable[[], bool], timeout_s: float) -> None:
    block_until(reached, timeout_s, lambda: _LATE, pause_s=0.001)


@pytest.fixture(params=[_asynchronous, _awaited, _blocking], ids=lambda wait: wait.__name__)
def wait(request: pytest.FixtureRequest) -> Wait:
    chosen: Wait = request.param
    return chosen


def test_a_wait_ends_at_the_first_call_that_succeeds(wait: Wait) -> None:
    looks: Iterator[bool] = iter([False, False, True, True])
    wait(lambda: next(looks), 60)
    assert list(looks) == [True]


def test_a_condition_that_holds_already_needs_no_time(wait: Wait) -> None:
    wait(lambda: True, -1.0)


def test_a_wait_that_times_out_raises_the_given_error(wait: Wait) -> None:
    began_s = time.monotonic()
    with pytest.raises(WaitTimeoutError) as raised:
        wait(lambda: False, 0.02)
    assert raised.value is _LATE
    assert 0.02 <= time.monotonic() - began_s < 10


def test_an_error_of_the_call_ends_the_wait(wait: Wait) -> None:
    def fail() -> bool:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        wait(fail, 60)
