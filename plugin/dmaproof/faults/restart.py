"""Faults of a back end that was killed and restarted."""

from __future__ import annotations

from typing import ClassVar

from ..trace import Link
from ..vhost_user.messages import Message
from ..vhost_user.session import Session
from .fault import Fault


class _ForgetsPredecessor(Session):
    def _set_inflight_fd(self, message: Message) -> None:
        super()._set_inflight_fd(message)
        self._must_report_all = False


class ForgottenAtRestart(Fault):
    """A restarted device does not report the pages that the killed process wrote last."""

    name: ClassVar[str] = "forgotten-at-restart"
    link = Link.TRACKER
    needs_kill: ClassVar[bool] = True
    harvest = "final"  # periodic harvests would report pages before the kill
    session_type = _ForgetsPredecessor
