"""``python -m dmaproof.vhost_user``: the device process that `qmp_tools` starts for a proof.

The process ends when its control socket is closed, so it never outlives the tool that started it.
Device processes with other trackers call the same `main`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from ..devices import make_device
from ..dirty_tracker import EmulatedTracker, emulated_trackers
from ..errors import DmaproofError
from ..faults import make_fault
from ..faults.fault import Fault
from ..system_errors import describe
from .server import Server
from .session import Session

_logger = logging.getLogger("dmaproof.vhost_user")


def harvest_policy(text: str) -> tuple[float | None, bool]:
    """Parse ``--harvest`` into the interval in seconds and whether each write is harvested.

    Raises:
        ValueError: `text` is not 'immediate', 'final' or a number of seconds above 0.
    """
    if text == "immediate":
        return None, True
    if text == "final":
        return None, False
    interval_s = float(text)
    if not 0 < interval_s < 3600:
        raise ValueError(f"expected a harvest interval above 0 s and below 3600 s, got {text} s")
    return interval_s, False


def _arguments(trackers: Mapping[str, object], default: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dmaproof.vhost_user", description=__doc__)
    parser.add_argument("--control", type=int, required=True, metavar="FD")
    parser.add_argument(
        "--socket",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="listen on this socket for front ends; repeatable",
    )
    parser.add_argument(
        "--seek",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="connect to this socket, on which a front end listens; repeatable",
    )
    parser.add_argument(
        "--fd",
        action="append",
        default=[],
        metavar="NAME=FD",
        help="serve the front end at the other end of this connected socket; repeatable",
    )
    parser.add_argument(
        "--withhold",
        action="append",
        default=[],
        metavar="NAME=FEATURES",
        help="feature bits (a number) that are not offered to sessions of this name",
    )
    parser.add_argument("--device", default="blk", metavar="NAME[:OPTION=VALUE,…]")
    parser.add_argument("--tracker", choices=sorted(trackers), default=default)
    parser.add_argument("--harvest", type=harvest_policy, default="0.2", metavar="SECONDS")
    parser.add_argument("--fault", metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="save the state that a restarted process needs in this folder",
    )
    return parser.parse_args()


def main(
    trackers: Mapping[str, Callable[[], EmulatedTracker]],
    default: str,
    session_of: Callable[[Fault], Callable[..., Session]] = lambda fault: fault.make_session,
) -> int:
    """Serve until the control socket is closed.

    `trackers` has the trackers that ``--tracker`` accepts, by name; `default` is the name of the
    default one. `session_of` returns the function that makes the sessions of a fault.
    """
    arguments = _arguments(trackers, default)
    logging.basicConfig(format="dmaproof device: %(message)s")  # standard error is the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the control socket ends the process
    interval_s, immediate = arguments.harvest
    control = socket.socket(fileno=arguments.control)
    events = control.dup()  # the server closes `control`
    try:
        fault = make_fault(arguments.fault, arguments.seed)
        server = Server(
            make_device(arguments.device),
            trackers[arguments.tracker],
            control,
            make_session=session_of(fault),
            harvest_interval_s=interval_s,
            immediate=immediate,
            state=arguments.state,
        )
        for withheld in arguments.withhold:
            name, _, features = withheld.partition("=")
            server.withhold(name, int(features, 0))
        for listener in arguments.socket:
            name, _, path = listener.partition("=")
            server.listen(name, Path(path))
        for front_end in arguments.seek:
            name, _, path = front_end.partition("=")
            server.seek(name, Path(path))
        for connected in arguments.fd:
            name, _, fd = connected.partition("=")
            server.adopt(name, socket.socket(fileno=int(fd)))
        server.run()
    except (DmaproofError, OSError) as error:
        # The log may be on the disk that is full, so the error is sent as an event first.
        why = describe(error) if isinstance(error, OSError) else str(error)
        with contextlib.suppress(OSError):
            event = {"event": "failed", "session": "", "message": why}
            events.sendall(json.dumps(event).encode() + b"\n")
        _logger.error("%s", why)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(emulated_trackers(), "iommu"))
