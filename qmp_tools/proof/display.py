"""Where the story of a proof goes while it runs: nowhere, or to plain lines."""

from __future__ import annotations

import sys
import time
from typing import Final, Protocol

from dmaproof.errors import printable

from ..migration.migration import Progress
from ..migration.reporter import Reporter

_LINE_EVERY_S: Final = 1.0


class Display(Reporter, Protocol):
    """Takes the story of a run as it happens, until it is over."""

    def close(self) -> None:
        """Nothing more will come."""


class LineDisplay:
    """Plain lines on standard error."""

    def __init__(self) -> None:
        self._next_line_s = 0.0

    def say(self, text: str) -> None:
        """See `Display.say`."""
        print(printable(text), file=sys.stderr, flush=True)

    def precopy(self, progress: Progress) -> None:
        """See `Display.precopy`: a line now and then."""
        now_s = time.monotonic()
        if now_s >= self._next_line_s:
            self._next_line_s = now_s + _LINE_EVERY_S
            self.say(f"migration {progress.status}: {progress.summary}")

    def close(self) -> None:
        """See `Display.close`."""


class QuietDisplay:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """See `Display.say`."""

    def precopy(self, progress: Progress) -> None:
        """See `Display.precopy`."""

    def close(self) -> None:
        """See `Display.close`."""
