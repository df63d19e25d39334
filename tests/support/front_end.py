"""A vhost-user front end for tests: messages that QEMU sends, and messages that it never sends."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable, Sequence
from typing import Any

from dmaproof.devices import VirtioDevice
from dmaproof.devices.blk import Blk
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.faults import make_fault
from dmaproof.vfio.vhost_session import StandIn, StandInSession
from dmaproof.vhost_user.connection import Connection
from dmaproof.vhost_user.messages import Request, encode_u64
from dmaproof.vhost_user.session import Session
from qmp_tools.testbed import front_end
from qmp_tools.testbed.front_end import FEATURES
from qmp_tools.testbed.guest_iommu import GuestIommu

__all__ = ["FEATURES", "FrontEnd"]


class FrontEnd(front_end.FrontEnd):
    """Drives one `Session` in this thread: sends, lets the session receive, and reads the answer.

    `options` are those of `Session`.
    """

    def __init__(
        self,
        device: VirtioDevice | None = None,
        *,
        fault: str | None = None,
        stand_in: StandIn | None = None,
        iommu: GuestIommu | None = None,
        **options: Any,
    ) -> None:
        front_end_socket, back_end_socket = socket.socketpair()
        super().__init__(front_end_socket, iommu=iommu)
        self.selector = selectors.DefaultSelector()
        self.events: list[dict[str, Any]] = []
        """The events of the session."""
        emulated = make_fault(fault, seed=3).make_session
        make_session: Callable[..., Session] = StandInSession if stand_in else emulated
        self.session = make_session(
            Connection(back_end_socket),
            device or Blk(1 << 30, queues=2),
            stand_in or emulated_trackers()["iommu"](),
            self.selector,
            on_event=self.events.append,
            **options,
        )

    def begin_postcopy(self) -> int:
        """Send the messages with which QEMU begins a postcopy; return the session's userfaultfd."""
        self.send(Request.POSTCOPY_ADVISE)
        answer, (userfaultfd,) = self._receive(Request.POSTCOPY_ADVISE)
        assert answer == b""
        assert self.ask(Request.POSTCOPY_LISTEN) == encode_u64(0)
        return userfaultfd

    def close(self) -> None:
        """Close everything."""
        self.session.close()
        self.selector.close()
        super().close()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are and let the session receive them."""
        super().send_raw(data, fds)
        self.session.receive()

    def serve(self) -> None:
        """Kick, and let the session serve its rings until they are empty."""
        os.eventfd_write(self.kick, 1)
        self.turn()
        while self.iommu is not None and self.answer_misses():
            self.turn()

    def turn(self) -> None:
        """Let the session do what it can without an answer to its requests for mappings."""
        for key, _ in self.selector.select(0):
            key.data()
        while self.session.serve_rings():
            pass
