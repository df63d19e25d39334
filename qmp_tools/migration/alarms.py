"""Why a step of a proof ended: of several processes that die, the death that says best why."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from dmaproof.errors import UntestableError

from ..host.process import ProcessDiedError
from ..qemu.qmp import QmpError

_LATE_NEWS_S: Final = 1.0


async def best_reason(alarms: Sequence[asyncio.Future[UntestableError]]) -> UntestableError | None:
    """The alarm that says best why something went wrong; None if there is no alarm.

    What ended by itself did so perhaps only because another was killed, and the kernel tells of
    that a moment later: a QEMU's memory is freed first.
    """
    told: set[asyncio.Future[UntestableError]] = set()
    silent = set(alarms)
    while silent and not any(_was_killed(alarm.result()) for alarm in told):
        news, silent = await asyncio.wait(
            silent, timeout=_LATE_NEWS_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not news:
            break
        told |= news
    reasons = [alarm.result() for alarm in alarms if alarm in told]
    return max(reasons, key=lambda reason: (_was_killed(reason), _says_why(reason)), default=None)


def with_failure(reason: UntestableError, failure: BaseException | None) -> UntestableError:
    """`reason`, with what QEMU said of it: a QEMU that has just been started is no alarm yet."""
    if isinstance(reason, ProcessDiedError) and isinstance(failure, QmpError):
        return ProcessDiedError(f"{reason}\n{failure}", reason.killed)
    return reason


def _says_why(reason: UntestableError) -> bool:
    return not isinstance(reason, ProcessDiedError)


def _was_killed(reason: UntestableError) -> bool:
    return isinstance(reason, ProcessDiedError) and reason.killed
