"""Faults of devices: the device does not report one kind of write to the tracker."""

from __future__ import annotations

from typing import Any, ClassVar

from ..dma import Dma
from ..journal import WriteKind
from ..trace import Link
from .fault import Fault


class _Unlogged(Fault):
    link = Link.TRACKER
    kind: ClassVar[WriteKind]

    def make_dma(self, *arguments: Any, **options: Any) -> Dma:
        """Return a `Dma` that does not report writes of `kind` to the tracker."""
        dma = _UnloggedDma(*arguments, **options)
        dma.unlogged_kind = self.kind
        return dma


class _UnloggedDma(Dma):
    unlogged_kind: WriteKind

    def write(self, iova: int, data: bytes | memoryview, kind: WriteKind = WriteKind.DATA) -> None:
        if kind == self.unlogged_kind:
            self._put(iova, data, kind)
        else:
            super().write(iova, data, kind)


class UsedRingUnlogged(_Unlogged):
    """The device does not log its writes to the used ring."""

    name: ClassVar[str] = "used-ring-unlogged"
    kind = WriteKind.USED_RING


class StatusUnlogged(_Unlogged):
    """The device does not log the status byte of a request."""

    name: ClassVar[str] = "status-unlogged"
    kind = WriteKind.STATUS
