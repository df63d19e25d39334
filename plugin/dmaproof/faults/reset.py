"""Faults of a device that the guest resets while QEMU logs, and then initialises again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

from ..collector import Collector
from ..dirty_log import DirtyLog
from ..guest_memory import Bus, GuestMemory, IovaMapping
from ..trace import Link
from ..vhost_user.messages import Message, VringState, decode_vring_state, encode_vring_state
from ..vhost_user.session import Session
from .fault import Fault


class _CollectsUntilReset(Collector):
    was_reset = False

    def start(self, log: DirtyLog, memory: GuestMemory, bus: Bus) -> None:
        super().start(log, memory, bus)
        self.was_reset = False

    def _collect(self, mappings: Iterable[IovaMapping]) -> int:
        if not self.was_reset:
            return super()._collect(mappings)
        self.trace.epoch += 1
        return 0


class _LogsUntilReset(Session):
    collector: _CollectsUntilReset

    def _get_vring_base(self, message: Message) -> bytes:
        answer = super()._get_vring_base(message)
        if self.collector.active and not self.running:
            self.collector.was_reset = True
        return answer


class LogForgottenAtReset(Fault):
    """A device that was reset while QEMU logs reports none of its later writes."""

    name: ClassVar[str] = "log-forgotten-at-reset"
    link = Link.TRACKER
    needs_reset: ClassVar[bool] = True
    collector_type = _CollectsUntilReset
    session_type = _LogsUntilReset


class _CountsOn(Session):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._counted: Counter[int] = Counter()

    def _get_vring_base(self, message: Message) -> bytes:
        answer = super()._get_vring_base(message)
        if not self.collector.active:
            return answer
        index, _ = decode_vring_state(message)
        self._counted[index] += self._vrings[index].base
        return encode_vring_state(VringState(index, self._counted[index]))


class IndexKeptAtReset(Fault):
    """A device that was reset while QEMU logs counts its ring indices on from those before."""

    name: ClassVar[str] = "index-kept-at-reset"
    link = None
    needs_reset: ClassVar[bool] = True
    session_type = _CountsOn
