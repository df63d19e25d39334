"""Faults of devices: a write of the device's own kind is not told to the tracker."""

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
        """A door that lets writes of `kind` through unseen."""
        dma = _BlindDma(*arguments, **options)
        dma.unseen = self.kind
        return dma


class _BlindDma(Dma):
    unseen: WriteKind

    def write(self, iova: int, data: bytes | memoryview, kind: WriteKind = WriteKind.DATA) -> None:
        if kind == self.unseen:
            self._put(iova, data, kind)
        else:
            super().write(iova, data, kind)


class UsedRingUnlogged(_Unlogged):
    """Writes to the used ring are not logged."""

    name: ClassVar[str] = "used-ring-unlogged"
    kind = WriteKind.USED_RING


class StatusUnlogged(_Unlogged):
    """The status byte of a request is not logged."""

    name: ClassVar[str] = "status-unlogged"
    kind = WriteKind.STATUS
