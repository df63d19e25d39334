"""The device process: one thread that waits for sockets, kicks and the time of the next harvest.

One thread is enough, and it excludes races between a request, a harvest and a message: everything
the device wrote before GET_VRING_BASE arrived is in the tracker when the last harvest runs.

Each listening socket serves one front end after another, so a QEMU that disconnects may reconnect.
The *control* socket connects the process to its parent. Events go to the parent as lines of JSON,
and the parent sends commands the same way. The process ends when the control socket is closed, so
it also ends when the parent dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..devices import VirtioDevice
from ..dirty_tracker import EmulatedTracker
from ..errors import MemoryAccessError, ProtocolError, UsageError
from ..evidence import collect_evidence
from ..system_errors import describe
from .connection import Connection
from .session import Session

_ACCEPTED_AT_ONCE = 1
_SEEK_EVERY_S = 0.02


class Server:
    """Serves a device on several sockets, with one session at a time on each.

    Args:
        device: the device, which all sessions share.
        make_tracker: makes the tracker of each session.
        control: a connected socket for events and commands, both as lines of JSON. The server owns
            the socket, and ends when the other end is closed.
        make_session: makes each front end's session, from the arguments of `Session`.
        harvest_interval_s: the seconds between harvests; None harvests only when a device stops.
        immediate: whether each write is harvested at once instead.
        state: the folder in which sessions save the state that a restarted process needs.
    """

    def __init__(
        self,
        device: VirtioDevice,
        make_tracker: Callable[[], EmulatedTracker],
        control: socket.socket,
        *,
        make_session: Callable[..., Session] = Session,
        harvest_interval_s: float | None,
        immediate: bool,
        state: Path | None = None,
    ) -> None:
        self._device = device
        self._make_tracker = make_tracker
        self._make_session = make_session
        self._control = control
        self._commands = bytearray()
        self._harvest_interval_s = harvest_interval_s
        self._immediate = immediate
        self._state = state
        self._selector = selectors.DefaultSelector()
        self._sessions: dict[str, Session] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._withheld: dict[str, int] = {}
        self._front_ends: dict[str, Path] = {}
        self._running = True
        self._busy = False
        self._next_harvest_s = time.monotonic()
        self._selector.register(control, selectors.EVENT_READ, self._receive_commands)

    def listen(self, name: str, path: Path) -> None:
        """Accept front ends on a socket of mode 0600.

        Args:
            name: the name of the socket's sessions in events.
            path: the path of the socket; the file must not exist yet.

        Raises:
            OSError: the socket cannot be made.
        """
        listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(_ACCEPTED_AT_ONCE)
        listener.setblocking(False)
        self._listeners[name] = listener
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(name))
        self._send_event({"event": "listening", "session": name})

    def withhold(self, name: str, features: int) -> None:
        """Withhold features from some sessions.

        Args:
            name: the name of the sessions in events.
            features: the virtio feature bits that are not offered to these sessions.
        """
        self._withheld[name] = features

    def seek(self, name: str, path: Path) -> None:
        """Connect to a socket on which a front end listens, again after each session.

        Args:
            name: the name of the socket's sessions in events.
            path: the path of the front end's socket.
        """
        self._front_ends[name] = path
        self._send_event({"event": "seeking", "session": name})

    def _seek(self) -> None:
        for name, path in self._front_ends.items():
            if name in self._sessions:
                continue
            peer = socket.socket(socket.AF_UNIX)
            try:
                peer.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                peer.close()  # no front end listens yet
            else:
                self.adopt(name, peer)

    def adopt(self, name: str, peer: socket.socket) -> None:
        """Serve the front end at the other end of a connected socket.

        Args:
            name: the name of the session in events.
            peer: the socket; the session takes ownership of it.
        """
        connection = Connection(peer)
        self._sessions[name] = self._make_session(
            connection,
            self._device,
            self._make_tracker(),
            self._selector,
            immediate=self._immediate,
            withheld=self._withheld.get(name, 0),
            state=self._state / name if self._state else None,
            on_event=lambda event: self._send_event({**event, "session": name}),
        )
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(name))
        self._send_event({"event": "connected", "session": name})

    def run(self) -> None:
        """Serve until the control socket is closed.

        Raises:
            UsageError: a line from the control socket is not a command.
            OSError: a session cannot write its state.
        """
        try:
            while self._running:
                self.turn(self._timeout_s())
        finally:
            self.close()

    def fileno(self) -> int:
        """Return the file descriptor for which an event loop waits before it calls `turn`.

        Returns:
            A file descriptor that is readable while a socket or a kick waits to be served. The
            server keeps ownership of it.
        """
        return self._selector.fileno()

    def turn(self, timeout_s: float | None) -> bool:
        """Serve messages and requests once, and harvest if the interval is over.

        Args:
            timeout_s: the longest wait for a message or a kick, in seconds; None waits for ever.

        Returns:
            True if some ring is not empty yet.
        """
        for key, _ in self._selector.select(timeout_s):
            key.data()
        self._seek()
        self._busy = self._serve_rings()
        if self._harvest_interval_s is not None and time.monotonic() >= self._next_harvest_s:
            self._next_harvest_s = time.monotonic() + self._harvest_interval_s
            for name, session in list(self._sessions.items()):
                if session.collector.active:
                    self._harvest(name, session)
        return self._busy

    def _timeout_s(self) -> float | None:
        if self._busy:
            return 0
        if any(name not in self._sessions for name in self._front_ends):
            return _SEEK_EVERY_S
        if self._harvest_interval_s is None or not any(
            session.collector.active for session in self._sessions.values()
        ):
            return None
        return max(0.0, self._next_harvest_s - time.monotonic())

    def close(self) -> None:
        """End every session and close every socket."""
        for name in list(self._sessions):
            self._end(name, "the device process ends")
        for listener in self._listeners.values():
            Path(listener.getsockname()).unlink(missing_ok=True)
            listener.close()
        self._control.close()
        self._selector.close()

    # Sessions -----------------------------------------------------------------------------------

    def _accept(self, name: str) -> None:
        listener = self._listeners[name]
        peer, _ = listener.accept()
        self._selector.unregister(listener)  # one session at a time: the next one queues
        self.adopt(name, peer)

    def _receive(self, name: str) -> None:
        session = self._sessions.get(name)
        if session is None:  # the session ended earlier in this turn
            return
        try:
            if session.connection.wants_to_write:
                session.connection.flush()
            session.receive()
        except ProtocolError as error:
            self._refuse(name, error)
        except EOFError as error:
            self._end(name, str(error))
        else:
            events = selectors.EVENT_READ
            if session.connection.wants_to_write:
                events |= selectors.EVENT_WRITE
            self._selector.modify(session.connection, events, lambda: self._receive(name))

    def _serve_rings(self) -> bool:
        busy = False
        for name, session in list(self._sessions.items()):
            try:
                busy |= session.serve_rings()
            except (ProtocolError, MemoryAccessError) as error:
                self._refuse(name, error)
            except EOFError as error:
                self._end(name, str(error))
        return busy

    def _harvest(self, name: str, session: Session) -> None:
        try:
            pages = session.harvest()
        except ProtocolError as error:
            self._refuse(name, error)
            return
        self._send_event({"event": "harvest", "session": name, "pages": pages})

    def _refuse(self, name: str, error: Exception) -> None:
        self._send_event({"event": "refused", "session": name, "message": str(error)})
        self._end(name, str(error))

    def _end(self, name: str, reason: str) -> None:
        session = self._sessions.pop(name)
        self._selector.unregister(session.connection)
        session.close()
        if name in self._listeners:
            listener = self._listeners[name]
            self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(name))
        self._send_event({"event": "disconnected", "session": name, "reason": reason})

    # Control ------------------------------------------------------------------------------------

    def _send_event(self, event: dict[str, Any]) -> None:
        event = {**event, "time_ns": time.monotonic_ns()}
        try:
            self._control.sendall(json.dumps(event).encode() + b"\n")
        except OSError:  # the parent has died, so this process ends too
            self._running = False

    def _receive_commands(self) -> None:
        with contextlib.suppress(ConnectionError):
            received = self._control.recv(1 << 16)
            if received:
                self._commands += received
                *lines, rest = self._commands.split(b"\n")
                self._commands = rest
                for line in lines:
                    self._run_command(bytes(line))
                return
        self._running = False

    def _run_command(self, line: bytes) -> None:
        try:
            command = json.loads(line)
            if command["do"] != "evidence":
                raise ValueError(f"unknown command {command['do']!r}")
            name, folder = str(command["session"]), Path(command["folder"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"control socket: {line[:200]!r} is not a command: {error!r}"
            ) from error
        session = self._sessions.get(name)
        answer = {"event": "evidence", "session": name, "found": session is not None}
        if session is not None:
            evidence = collect_evidence(
                session.journal,
                session.collector,
                session.memory,
                requests=session.journal.writes,
            )
            try:
                evidence.save(folder)
            except OSError as error:
                answer["error"] = describe(error)
        self._send_event(answer)
