"""Choose the best reason for a failed step of a proof, when several processes have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from dmaproof.errors import UntestableError

from ..host.process import ProcessDiedError
from ..qemu.qmp import QmpError

_LATE_ALARM_S: Final = 1.0
"""Longest wait for the next alarm: one process's death often causes another's."""


async def best_reason(alarms: Sequence[asyncio.Future[UntestableError]]) -> UntestableError | None:
    """Return the alarm that explains a failure best; None if there is no alarm.

    A process that ended by itself may have ended only because another process was killed. The
    kernel reports the killed process a moment later, because it frees a QEMU's memory first.
    """
    raised: set[asyncio.Future[UntestableError]] = set()
    pending = set(alarms)
    while pending and not any(_was_killed(alarm.result()) for alarm in raised):
        newly_raised, pending = await asyncio.wait(
            pending, timeout=_LATE_ALARM_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not newly_raised:
            break
        raised |= newly_raised
    reasons = [alarm.result() for alarm in alarms if alarm in raised]
    return max(reasons, key=lambda reason: (_was_killed(reason), _says_why(reason)), default=None)


def with_failure(reason: UntestableError, failure: BaseException | None) -> UntestableError:
    """Add QEMU's message to `reason`: a QEMU that has just been started raises no alarm yet."""
    if isinstance(reason, ProcessDiedError) and isinstance(failure, QmpError):
        return ProcessDiedError(f"{reason}\n{failure}", reason.killed)
    return reason


def _says_why(reason: UntestableError) -> bool:
    return not isinstance(reason, ProcessDiedError)


def _was_killed(reason: UntestableError) -> bool:
    return isinstance(reason, ProcessDiedError) and reason.killed
