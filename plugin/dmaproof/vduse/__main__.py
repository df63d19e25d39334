"""``python -m dmaproof.vduse``: the device process that `qmp_tools` starts for a proof.

It is a network card that sends every frame back (`dmaproof.devices.echo`), once for each
``--socket NAME=/dev/vduse/DEVICE``. Its arguments and its control socket are those of
``python -m dmaproof.vhost_user``; it ends when that socket is closed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..devices import make_device
from ..errors import DmaproofError, UsageError
from ..faults import make_fault
from ..faults.fault import uniform
from ..faults.log import DropPages
from ..system_errors import describe
from .chardev import CharacterDevice
from .session import Session, drop_nothing

_logger = logging.getLogger("dmaproof.vduse")

_DEVICE: Final = "echo"
_NETWORK_CARD: Final = 1
"""The virtio device type (virtio 1.2, section 5)."""
_FEATURES: Final = 1 << 5 | 1 << 32 | 1 << 33
"""VIRTIO_NET_F_MAC, VIRTIO_F_VERSION_1, and VIRTIO_F_ACCESS_PLATFORM, without which the kernel
refuses a VDUSE device."""
_QUEUES: Final = 2
_QUEUE_SIZE: Final = 256
MAC: Final = bytes.fromhex("525400123456")
_CONFIG: Final = struct.Struct("<6sHHH")
"""The configuration space: MAC address, status, queue pairs and MTU; only the first is offered."""


class Server:
    """Serves the sessions, and answers the control socket; one thread does all of it."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._commands = control.makefile("rb")
        self._selector = selectors.DefaultSelector()
        self._sessions: dict[str, Session] = {}
        self._running = True
        self._selector.register(control, selectors.EVENT_READ, self._receive_command)

    def add(self, name: str, path: Path, drops: Callable[[int], bool]) -> None:
        """Create the device whose character device is `path`, and serve it as session `name`.

        Raises:
            UntestableError: the kernel does not create the device.
        """
        config = _CONFIG.pack(MAC, 0, 0, 0)
        chardev = CharacterDevice(path.name, _NETWORK_CARD, _FEATURES, _QUEUES, _QUEUE_SIZE, config)
        device = make_device(_DEVICE)
        self._sessions[name] = Session(chardev, device, _QUEUES, self._selector, drops)
        self.send({"event": "listening", "session": name})

    def run(self) -> None:
        """Serve until the control socket is closed.

        Raises:
            DmaproofError: a driver broke the specification.
        """
        busy = False
        while self._running:
            for key, _ in self._selector.select(0 if busy else None):
                key.data()
            busy = False
            for session in self._sessions.values():
                busy |= session.serve()

    def close(self) -> None:
        """Destroy the devices."""
        for session in self._sessions.values():
            session.close()

    def send(self, event: dict[str, Any]) -> None:
        """Send an event to the parent."""
        line = json.dumps({**event, "time_ns": time.monotonic_ns()}).encode() + b"\n"
        with contextlib.suppress(OSError):  # the parent has died, so this process ends too
            self._control.sendall(line)

    def _receive_command(self) -> None:
        line = self._commands.readline()
        if not line:
            self._running = False
            return
        command = json.loads(line)
        answer = {"event": "evidence", "session": command["session"], "found": True}
        try:
            self._sessions[command["session"]].evidence().save(Path(command["folder"]))
        except OSError as error:
            answer["error"] = describe(error)
        self.send(answer)


def _drops(fault: str | None, seed: int) -> Callable[[int], bool]:
    """Return which pages the device never reports.

    Raises:
        UsageError: the device cannot have this fault.
    """
    injected = make_fault(fault, seed)
    if fault is None:
        return drop_nothing
    if not isinstance(injected, DropPages):
        raise UsageError(f"fault {fault}: a VDUSE device can only have {DropPages.name}")
    return lambda page: bool(uniform(np.array([page], dtype=np.uint64), seed)[0] < injected.value)


def main() -> int:
    """Serve until the control socket is closed."""
    parser = argparse.ArgumentParser(prog="python -m dmaproof.vduse", description=__doc__)
    parser.add_argument("--control", type=int, required=True, metavar="FD")
    parser.add_argument("--socket", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--fault", metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(format="dmaproof device: %(message)s")  # standard error is the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the control socket ends the process
    server = Server(socket.socket(fileno=arguments.control))
    try:
        for pair in arguments.socket:
            name, _, path = pair.partition("=")
            server.add(name, Path(path), _drops(arguments.fault, arguments.seed))
        server.run()
    except (DmaproofError, OSError) as error:
        why = describe(error) if isinstance(error, OSError) else str(error)
        server.send({"event": "failed", "session": "", "message": why})
        _logger.error("%s", why)
        return 2
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
