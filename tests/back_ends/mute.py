"""A third-party vhost-user back end that stops answering during a migration.

It is dmaproof's device, which does not answer SET_LOG_BASE or a message that arrives after it.

Run with the path to listen on, the message's name, and 'stops' (by SIGSTOP) or 'hangs'.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from unittest import mock

import unobserved
from dmaproof.vhost_user.connection import Connection
from dmaproof.vhost_user.messages import Message, Request


def main() -> None:
    """Serve until the message arrives."""
    path, name, how = sys.argv[1:]
    receive = Connection.receive
    logging = False

    def go_mute(connection: Connection) -> Iterator[Message]:
        nonlocal logging
        for message in receive(connection):
            logging |= message.request == Request.SET_LOG_BASE
            if logging and message.request == Request[name]:
                print(f"received {name}", flush=True)
                if how == "stops":
                    os.kill(os.getpid(), signal.SIGSTOP)
                signal.pause()
            yield message

    with mock.patch.object(Connection, "receive", go_mute):
        sys.exit(unobserved.serve(path))


if __name__ == "__main__":
    main()
