"""The device of a simulation: the real server, in a thread of this process or in its own process.

Both have the same interface: a connected vhost-user socket, and a control socket on which the
server reports events and is asked for its evidence.
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

_SESSION: Final = "simulation"
_POLL_S: Final = 0.001


class HostedDevice:
    """A device that serves the front end at the other end of `peer`.

    `timeout_s` bounds each wait for the device.
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
        """Return the events that the device has reported since the last call.

        Raises:
            RefusedError: the device refused a message.
            UntestableError: the device has ended.
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
                raise RefusedError(
                    f"the device of the test bed refused a message: {event['message']}"
                )
        return events

    def kill(self) -> None:
        """Kill the device's process with SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def evidence(self, folder: Path) -> Evidence:
        """Return the device's evidence on its session, which is passed through `folder`.

        Raises:
            UntestableError: the device does not answer.
        """
        command = {"do": "evidence", "session": _SESSION, "folder": str(folder)}
        self._control.sendall(json.dumps(command).encode() + b"\n")
        late = WaitTimeoutError(
            f"the device of the test bed has not sent its evidence within {self.timeout_s:g} s; "
            "try again when the host is less busy"
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
    """Run the device in a thread; `map_bus` maps the addresses of its bus to guest RAM."""
    fault = make_fault(options.fault, options.seed)
    interval_s, immediate = harvest_policy(options.harvest)
    control, device_control = socket.socketpair()
    peer, device_peer = socket.socketpair()
    server = Server(
        make_device(options.device),
        emulated_trackers()[options.tracker],
        device_control,
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
        with control, peer:
            yield HostedDevice(peer, control, timeout_s)
    finally:
        thread.join(timeout_s)


@contextlib.contextmanager
def device_process(
    options: DeviceOptions, state: Path | None, timeout_s: float
) -> Iterator[HostedDevice]:
    """Run the device in its own process, on a bus whose addresses are guest-physical.

    The folder `state` holds what the device's successor needs.
    """
    control, device_control = socket.socketpair()
    peer, device_peer = socket.socketpair()
    with device_control, device_peer:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dmaproof.vhost_user"),
                *("--control", str(device_control.fileno())),
                *("--fd", f"{_SESSION}={device_peer.fileno()}"),
                *options.arguments(),
                *(("--state", str(state)) if state else ()),
            ],
            pass_fds=(device_control.fileno(), device_peer.fileno()),
            stdin=subprocess.DEVNULL,
        )
    try:
        with control, peer:
            yield HostedDevice(peer, control, timeout_s, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
    finally:
        process.kill()
        process.wait()
