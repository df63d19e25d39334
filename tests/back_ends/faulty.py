"""A third-party vhost-user back end with a fault: dmaproof's device, without a control socket.

Run with the path to listen on, the fault to inject ('none': no fault), and optionally when to
harvest (as ``--harvest``). The faults are those of `dmaproof.faults` and three more:
``dma-after-stop=SECONDS`` writes a page again that many seconds after the device has stopped,
``base=EXPRESSION`` answers GET_VRING_BASE with an expression of the ``right`` answer, and
``no-pagefault`` does not offer the protocol feature PAGEFAULT.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Final
from unittest import mock

import unobserved
from dmaproof.dma import Dma
from dmaproof.guest_memory import WRITE
from dmaproof.journal import WriteKind
from dmaproof.stamp import stamped_page
from dmaproof.units import PAGE_BYTES
from dmaproof.vhost_user import session
from dmaproof.vhost_user.features import PROTOCOL_FEATURES
from dmaproof.vhost_user.messages import ProtocolFeature, VringState, encode_vring_state
from dmaproof.vhost_user.session import Session

_DMA_AFTER_STOP: Final = "dma-after-stop="
_BASE: Final = "base="
_NO_PAGEFAULT: Final = "no-pagefault"


class _LastPage:
    """Makes a `Dma` that remembers the last whole page it wrote."""

    def __init__(self) -> None:
        self.page = memoryview(bytearray(PAGE_BYTES))

    def make_dma(self, *arguments: Any, **options: Any) -> Dma:
        dma = _RememberingDma(*arguments, **options)
        dma.last = self
        return dma


class _RememberingDma(Dma):
    last: _LastPage

    def write(self, iova: int, data: bytes | memoryview, kind: WriteKind = WriteKind.DATA) -> None:
        super().write(iova, data, kind)
        for gpa, size in self.bus.translate(iova, len(data), WRITE):
            if size == PAGE_BYTES:
                self.last.page = self.memory.view(gpa, size)


class _WritesAfterStopSession(Session):
    """A session that writes a page again after its device has stopped."""

    after_s: float
    last: _LastPage
    _done = False

    def receive(self) -> None:
        super().receive()
        if self.collector.active and not self.running and not self._done:
            self._done = True
            content = stamped_page(lba=8, request=1 << 40)
            threading.Timer(
                self.after_s, self.last.page.__setitem__, (slice(None), content)
            ).start()


def _make_session(after_s: float) -> Callable[..., Session]:
    def make(connection: Any, device: Any, tracker: Any, *others: Any, **options: Any) -> Session:
        last = _LastPage()
        session = _WritesAfterStopSession(
            connection, device, tracker, *others, make_dma=last.make_dma, **options
        )
        session.after_s, session.last = after_s, last
        return session

    return make


def _wrong_encoder(answer: str) -> Callable[[VringState], bytes]:
    def encode(state: VringState) -> bytes:
        value = eval(answer, {"right": state.value}) & 0xFFFF
        return encode_vring_state(state._replace(value=value))

    return encode


def main() -> int:
    """Serve with the fault of the command line."""
    path, fault, *harvest = sys.argv[1:]
    options = ["--harvest", *harvest] if harvest else []
    if fault.startswith(_DMA_AFTER_STOP):
        make = _make_session(float(fault.removeprefix(_DMA_AFTER_STOP)))
        return unobserved.serve(path, *options, session_of=lambda _: make)
    if fault.startswith(_BASE):
        wrong = _wrong_encoder(fault.removeprefix(_BASE))
        with mock.patch.object(session, "encode_vring_state", wrong):
            return unobserved.serve(path, *options)
    if fault == _NO_PAGEFAULT:
        others = PROTOCOL_FEATURES & ~ProtocolFeature.PAGEFAULT
        with mock.patch.object(session, "PROTOCOL_FEATURES", others):
            return unobserved.serve(path, *options)
    options += ["--fault", fault] if fault != "none" else []
    return unobserved.serve(path, *options)


if __name__ == "__main__":
    sys.exit(main())
