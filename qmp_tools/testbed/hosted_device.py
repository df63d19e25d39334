"""The device of a scene: the real server, in a thread of ours or in a process of its own.

Both are spoken to in the same way: a connected vhost-user socket, and the control socket on which
the server tells what happens and is asked for its evidence.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from dmaproof.devices import make_device
from dmaproof.dirty_tracker import emulated_trackers
from dmaproof.errors import RefusedError, UntestableError, WaitTimeoutError
from dmaproof.evidence import Evidence
from dmaproof.faults import make_fault
from dmaproof.guest_memory import GuestMemory, IovaMap
from dmaproof.vhost_user.__main__ import harvest_policy
from dmaproof.vhost_user.server import Server

from ..devices.process import DeviceOptions
from ..host.timeout import block_until

_SESSION: Final = "scene"
_POLL_S: Final = 0.001


class HostedDevice:
    """A device that serves the front end at the other end of `peer`.

    `timeout_s` bounds each wait for it.
    """

    def __init__(
        self,
        peer: socket.socket,
        control: socket.socket,
        timeout_s: float,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.peer = peer
        self.timeout_s = timeout_s
        self._process = process
        self._control = control
        self._control.setblocking(False)
        self._received = b""

    def events(self) -> list[dict[str, Any]]:
        """What the device has told since this was called last.

        Raises:
            RefusedError: it has refused what it was sent.
            UntestableError: it is gone.
        """
        try:
            while data := self._control.recv(1 << 16):
                self._received += data
            raise UntestableError("the device of the test bed has ended")
        except BlockingIOError:
            pass
        *lines, self._received = self._received.split(b"\n")
        events = [json.loads(line) for line in lines]
        for event in events:
            if event["event"] == "refused":
                raise RefusedError(f"the device refused what it was sent: {event['message']}")
        return events

    def kill(self) -> None:
        """End its process by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def evidence(self, folder: Path) -> Evidence:
        """What the device knows of its session, passed through `folder`.

        Raises:
            UntestableError: it does not answer.
        """
        command = {"do": "evidence", "session": _SESSION, "folder": str(folder)}
        self._control.sendall(json.dumps(command).encode() + b"\n")
        late = WaitTimeoutError(
            f"the device of the test bed has not told its evidence within {self.timeout_s:g} s"
        )
        block_until(
            lambda: any(event["event"] == "evidence" for event in self.events()),
            self.timeout_s,
            lambda: late,
            _POLL_S,
        )
        return Evidence.load(folder)


@contextlib.contextmanager
def device_thread(
    options: DeviceOptions, map_bus: Callable[[GuestMemory], IovaMap], timeout_s: float
) -> Iterator[HostedDevice]:
    """The device in a thread, on a bus whose addresses `map_bus` leads to guest RAM."""
    fault = make_fault(options.fault, options.seed)
    interval_s, immediate = harvest_policy(options.harvest)
    ours, theirs = socket.socketpair()
    peer, device_peer = socket.socketpair()
    server = Server(
        make_device(options.device),
        emulated_trackers()[options.tracker],
        theirs,
        make_session=lambda *arguments, **parts: fault.make_session(
            *arguments, map_bus=map_bus, **parts
        ),
        harvest_interval_s=interval_s,
        immediate=immediate,
    )
    server.adopt(_SESSION, device_peer)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        with ours, peer:
            yield HostedDevice(peer, ours, timeout_s)
    finally:
        thread.join(timeout_s)


@contextlib.contextmanager
def device_process(
    options: DeviceOptions, state: Path | None, timeout_s: float
) -> Iterator[HostedDevice]:
    """The device in a process of its own, on a bus whose addresses are guest-physical.

    What its successor has to know is kept in the folder `state`.
    """
    ours, theirs = socket.socketpair()
    peer, device_peer = socket.socketpair()
    with theirs, device_peer:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dmaproof.vhost_user"),
                *("--control", str(theirs.fileno())),
                *("--fd", f"{_SESSION}={device_peer.fileno()}"),
                *options.arguments(),
                *(("--state", str(state)) if state else ()),
            ],
            pass_fds=(theirs.fileno(), device_peer.fileno()),
            stdin=subprocess.DEVNULL,
        )
    try:
        with ours, peer:
            yield HostedDevice(peer, ours, timeout_s, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    finally:
        process.kill()
        process.wait()
