"""Report the progress of a migration to a callback, by default to the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from .migration import Progress

_logger = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]
"""Called with the progress of a migration, several times a second."""

_LINE_EVERY_S: Final = 1.0


class ProgressLog:
    """Logs the progress of migrations, one line a second by `clock_s`, which returns seconds."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._next_line_s = 0.0

    def __call__(self, progress: Progress) -> None:
        """Log `progress`, unless the last line was logged less than a second ago."""
        now_s = self._clock_s()
        if now_s >= self._next_line_s:
            self._next_line_s = now_s + _LINE_EVERY_S
            _logger.info("migration %s: %s", progress.status, progress.summary)
