"""Where the story of a proof goes while it runs."""

from __future__ import annotations

from typing import Protocol

from .migration import Progress


class Reporter(Protocol):
    """Takes the story of a run as it happens."""

    def say(self, text: str) -> None:
        """A step has begun, or something is worth knowing."""

    def precopy(self, progress: Progress) -> None:
        """The migration is this far."""
