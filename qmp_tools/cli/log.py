"""The log of a command on standard error: plain lines, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Final

from dmaproof.errors import printable

if TYPE_CHECKING:  # the module of the bar imports rich, which is slow
    from ..migration.migration import Progress
    from ..migration.progress_log import OnProgress
    from .terminal import PrecopyBar

_STEPS_OF_A_PROOF: Final = ("qmp_tools.migration", "qmp_tools.proof.run")


class StderrLog(logging.Handler):
    """Prints each record as a line. The text may quote third-party processes and guests.

    An error of standard error is raised to the code that logs: by it a command learns that its
    output has no reader any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_quiet = False
        self._bar: PrecopyBar | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, and end the progress bar of the step before."""
        if self.is_quiet:
            return
        self._end_bar()
        print(printable(record.getMessage()), file=sys.stderr, flush=True)

    @property
    def on_progress(self) -> OnProgress | None:
        """The function that draws a progress bar; None where progress is to be logged as lines."""
        if self.is_quiet or not sys.stderr.isatty():
            return None
        from .terminal import PrecopyBar

        def draw(progress: Progress) -> None:
            self._bar = self._bar or PrecopyBar()
            self._bar.draw(progress)
            if progress.status == "completed":
                self._end_bar()

        return draw

    def close(self) -> None:
        """End the bar if one is drawn."""
        self._end_bar()
        super().close()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.end()
            self._bar = None


class OfManyProofs(logging.Filter):
    """Leaves out the steps of each single proof, and every message that was logged before.

    All proofs log the same facts about the machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be shown."""
        if record.levelno < logging.WARNING and record.name.startswith(_STEPS_OF_A_PROOF):
            return False
        text = record.getMessage()
        is_new = text not in self._seen
        self._seen.add(text)
        return is_new
