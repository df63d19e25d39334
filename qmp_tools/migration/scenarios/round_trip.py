"""Migrations there and back of one guest."""

from __future__ import annotations

from .base import Scenario


class PingPong(Scenario):
    """Three migrations over a Unix socket."""

    name = "ping-pong"
    summary = "there, back and there again, each time verified"
    migrations = 3
