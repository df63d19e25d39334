"""Faults of a back end that was killed and started again."""

from __future__ import annotations

from typing import ClassVar

from ..trace import Link
from ..vhost_user.messages import Message
from ..vhost_user.session import Session
from .fault import Fault


class _Forgetful(Session):
    def _set_inflight_fd(self, message: Message) -> None:
        super()._set_inflight_fd(message)
        self._must_report_all = False


class ForgottenAtRestart(Fault):
    """A device that was killed goes on as if the process before it had reported everything."""

    name: ClassVar[str] = "forgotten-at-restart"
    link = Link.TRACKER
    needs_kill: ClassVar[bool] = True
    harvest = "final"  # what an interval's harvest has reported is not forgotten
    session_type = _Forgetful
