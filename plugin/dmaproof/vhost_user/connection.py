"""The non-blocking socket of one front end: whole messages with their file descriptors."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from ..errors import ProtocolError
from .messages import HEADER_BYTES, MAX_FILE_DESCRIPTORS, Header, Message, decode_header

_MAX_UNSENT_BYTES: Final = 1 << 16


class Connection:
    """A connected Unix socket that receives messages and sends answers without blocking.

    Header and payload are read with exact lengths: file descriptors belong to the first byte of
    their message, and a longer read could pair them with the message before.
    """

    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._socket = peer
        self._header: Header | None = None
        self._received = bytearray()
        self._fds: list[int] = []
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()

    def fileno(self) -> int:
        """Return the socket's file descriptor."""
        return self._socket.fileno()

    @property
    def wants_to_write(self) -> bool:
        """Whether an answer waits until the socket accepts it."""
        return bool(self._unsent)

    def receive(self) -> Iterator[Message]:
        """Yield the messages that have arrived completely.

        Raises:
            ProtocolError: a header or the number of file descriptors breaks the specification.
            EOFError: the front end has disconnected.
        """
        while True:
            if self._header is None:
                if not self._read_up_to(HEADER_BYTES):
                    return
                self._header = decode_header(bytes(self._received))
                self._received.clear()
            if not self._read_up_to(self._header.payload_bytes):
                return
            message = Message(
                self._header.request,
                bytes(self._received),
                tuple(self._fds),
                self._header.needs_reply,
            )
            self._header = None
            self._received.clear()
            self._fds = []
            yield message

    def _read_up_to(self, length: int) -> bool:
        """Read until `length` bytes are buffered; return False if some are still missing."""
        while len(self._received) < length:
            try:
                data, fds, flags, _ = socket.recv_fds(
                    self._socket, length - len(self._received), MAX_FILE_DESCRIPTORS
                )
            except BlockingIOError:
                return False
            except ConnectionError as error:
                raise EOFError(str(error)) from error
            self._fds += fds
            if not data:
                raise EOFError("the front end closed the connection")
            if len(self._fds) > MAX_FILE_DESCRIPTORS or flags & socket.MSG_CTRUNC:
                raise ProtocolError(
                    f"a message carries more than {MAX_FILE_DESCRIPTORS} file descriptors"
                )
            self._received += data
        return True

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send `data` with `fds`; `flush` later sends what the socket does not accept now.

        Raises:
            EOFError: the front end has disconnected.
            ProtocolError: the front end keeps sending requests without reading the answers.
        """
        self._unsent.append((data, tuple(os.dup(fd) for fd in fds)))
        self.flush()
        unsent = sum(len(data) for data, _ in self._unsent)
        if unsent > _MAX_UNSENT_BYTES:
            raise ProtocolError(
                f"the front end does not read its answers: {unsent} bytes are unread"
            )

    def flush(self) -> None:
        """Send what `send` could not send at once.

        Raises:
            EOFError: the front end has disconnected.
        """
        try:
            while self._unsent:
                data, fds = self._unsent[0]
                sent = socket.send_fds(self._socket, [data], fds)
                for fd in fds:
                    os.close(fd)
                self._unsent[0] = (data[sent:], ())
                if sent == len(data):
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except ConnectionError as error:
            raise EOFError(str(error)) from error

    def close(self) -> None:
        """Close the socket, and every file descriptor not yet handed to a message."""
        for fd in (*self._fds, *(fd for _, fds in self._unsent for fd in fds)):
            os.close(fd)
        self._fds = []
        self._unsent.clear()
        self._socket.close()
