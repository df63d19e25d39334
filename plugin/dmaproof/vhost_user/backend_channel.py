"""Requests from the back end to the front end ("Back-end communication").

The front end passes a socket (SET_BACKEND_REQ_FD). The back end uses the socket only to ask for
IOVAs that the IOTLB does not know. An answer says only whether the mapping exists; the mapping
itself arrives before the answer, as an IOTLB_MSG on the front end's socket. The back end never
blocks on an answer, because the front end may be waiting for the back end at the same time.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections import deque
from collections.abc import Iterable
from typing import Final

from ..errors import ProtocolError
from ..iotlb import Miss
from .messages import BACKEND_REPLY_BYTES, decode_backend_reply, encode_miss

_MOST_REQUESTS: Final = 64
"""The most open requests at a time; this many fit into any socket's buffer."""


class BackendChannel:
    """The back-end channel over `fd`, which stays the caller's.

    `selector` calls back when an answer can be read.

    Raises:
        OSError: `fd` is not a socket.
    """

    def __init__(self, fd: int, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._socket = _socket_of(fd)
        self._received = bytearray()
        self._requests: deque[Miss | None] = deque()
        """Open requests in order; None stands for a request that no longer matters."""
        self._readable = False
        try:
            selector.register(self._socket, selectors.EVENT_READ, self._wake)
        except OSError:
            self._socket.close()
            raise

    def _wake(self) -> None:
        self._readable = True

    @property
    def waiting(self) -> bool:
        """Whether a request that still matters is open."""
        return any(request is not None for request in self._requests)

    def ask(self, misses: Iterable[Miss]) -> None:
        """Request the pages that are not requested yet, up to the limit of open requests.

        Raises:
            ProtocolError: the front end does not read the requests.
            EOFError: the front end has disconnected.
        """
        for miss in misses:
            if len(self._requests) == _MOST_REQUESTS:
                break
            if miss in self._requests:
                continue
            request = encode_miss(*miss)
            sent = 0
            try:
                sent = self._socket.send(request, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # handled below like a partial send
            except OSError as error:
                raise EOFError(f"the back-end channel: {error}") from error
            if sent < len(request):
                raise ProtocolError(
                    "the front end does not read the requests on the back-end channel"
                )
            self._requests.append(miss)

    def answers(self) -> list[tuple[Miss | None, bool]]:
        """Return the requests answered since the last call, each with whether a mapping exists.

        None stands for a request that no longer matters.

        Raises:
            ProtocolError: a message is not an answer.
            EOFError: the front end has closed its end.
        """
        if not self._readable:
            return []
        self._readable = False
        answers = []
        try:
            while True:
                wanted = BACKEND_REPLY_BYTES - len(self._received)
                data = self._socket.recv(wanted, socket.MSG_DONTWAIT)
                if not data:
                    raise EOFError("the front end closed the back-end channel")
                self._received += data
                if len(data) < wanted:
                    continue
                mapped = decode_backend_reply(bytes(self._received))
                self._received.clear()
                if not self._requests:
                    raise ProtocolError(
                        "back-end channel: got an answer, but the device has sent no request"
                    )
                answers.append((self._requests.popleft(), mapped))
        except BlockingIOError:
            pass
        except OSError as error:
            raise EOFError(f"the back-end channel: {error}") from error
        return answers

    def forget_requests(self) -> None:
        """Ignore the answers to all open requests, because the device has stopped."""
        self._requests = deque(None for _ in self._requests)

    def close(self) -> None:
        """Close the socket."""
        self._selector.unregister(self._socket)
        self._socket.close()


def _socket_of(fd: int) -> socket.socket:
    own_fd = os.dup(fd)
    try:
        return socket.socket(fileno=own_fd)
    except OSError:
        os.close(own_fd)
        raise
