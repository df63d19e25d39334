"""The back end's own way to ask its front end ("Back-end communication").

The front end hands over a socket (SET_BACKEND_REQ_FD). Here it is used for one thing: to ask for
the IOVAs that the IOTLB does not know. The answer tells only whether there is such a mapping; the
mapping itself comes as an IOTLB_MSG on the front end's socket, before. Nobody waits for an answer:
the front end may at the same time wait for one of ours.
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

_MOST_QUESTIONS: Final = 64
"""Open at a time: so few fit into every socket's buffer."""


class BackendChannel:
    """Asks by `fd`, which stays the caller's; `selector` calls back when an answer can be read.

    Raises:
        OSError: it is no socket.
    """

    def __init__(self, fd: int, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._socket = _socket_of(fd)
        self._received = bytearray()
        self._questions: deque[Miss | None] = deque()
        """Open ones, in their order; None is one whose answer matters no more."""
        self._readable = False
        try:
            selector.register(self._socket, selectors.EVENT_READ, self._wake)
        except OSError:
            self._socket.close()
            raise

    def _wake(self) -> None:
        self._readable = True

    @property
    def waits(self) -> bool:
        """Whether some question that matters is open."""
        return any(question is not None for question in self._questions)

    def ask(self, misses: Iterable[Miss]) -> None:
        """Ask for these pages, as far as they are not asked for, and there is room for questions.

        Raises:
            ProtocolError: the front end does not read its questions.
            EOFError: it has gone.
        """
        for miss in misses:
            if len(self._questions) == _MOST_QUESTIONS:
                break
            if miss in self._questions:
                continue
            question = encode_miss(*miss)
            sent = 0
            try:
                sent = self._socket.send(question, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # as if it had taken a part
            except OSError as error:
                raise EOFError(f"the back-end channel: {error}") from error
            if sent < len(question):
                raise ProtocolError("the back-end channel's messages are not read")
            self._questions.append(miss)

    def answers(self) -> list[tuple[Miss | None, bool]]:
        """The questions that have been answered since this was called last, and whether there is
        such a mapping; None is one that matters no more.

        Raises:
            ProtocolError: what has come is no answer.
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
                there_is = decode_backend_reply(bytes(self._received))
                self._received.clear()
                if not self._questions:
                    raise ProtocolError("the back-end channel brought an answer to no question")
                answers.append((self._questions.popleft(), there_is))
        except BlockingIOError:
            pass
        except OSError as error:
            raise EOFError(f"the back-end channel: {error}") from error
        return answers

    def forget_questions(self) -> None:
        """The device has stopped: whatever is answered now is of no use."""
        self._questions = deque(None for _ in self._questions)

    def close(self) -> None:
        """Let go of the socket."""
        self._selector.unregister(self._socket)
        self._socket.close()


def _socket_of(fd: int) -> socket.socket:
    own = os.dup(fd)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise
