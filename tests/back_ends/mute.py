"""A third-party vhost-user back end that goes mute in a migration: our own device, which does not
answer SET_LOG_BASE, or another message that comes after it.

Run with the path to listen on, the message's name, and 'stops' (by SIGSTOP) or 'hangs'.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import unobserved
from dmaproof.vhost_user.messages import Message, Request
from dmaproof.vhost_user.session import _HANDLERS, Session


def main() -> None:
    """Serve, until the message comes."""
    path, name, how = sys.argv[1:]
    set_log_base = _HANDLERS[Request.SET_LOG_BASE]

    def go_mute(session: Session, message: Message) -> None:
        print(f"received {name}", flush=True)
        if how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        signal.pause()

    def begin(session: Session, message: Message) -> Any:
        _HANDLERS[Request.SET_LOG_BASE] = set_log_base
        _HANDLERS[Request[name]] = go_mute
        return _HANDLERS[Request.SET_LOG_BASE](session, message)

    _HANDLERS[Request.SET_LOG_BASE] = begin
    sys.exit(unobserved.serve(path))


if __name__ == "__main__":
    main()
