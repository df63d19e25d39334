"""Several migrations of one guest, to the destination and back."""

from __future__ import annotations

from .base import Scenario


class PingPong(Scenario):
    """Three migrations over a Unix socket."""

    name = "ping-pong"
    summary = "The guest migrates there, back and there again; each migration is verified"
    migrations = 3
