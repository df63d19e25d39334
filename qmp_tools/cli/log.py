"""What a command logs, on standard error: plain lines, and on a terminal a progress bar."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Final

from dmaproof.errors import printable

if TYPE_CHECKING:  # the bar's module imports rich, which takes its time
    from ..migration.migration import Progress
    from ..migration.progress_log import OnProgress
    from .terminal import PrecopyBar

_STEPS_OF_A_PROOF: Final = ("qmp_tools.migration", "qmp_tools.proof.run")


class StderrLog(logging.Handler):
    """Prints each record as a line. The text may quote processes and guests that are not ours.

    What standard error raises is raised by whoever logs: it is how a command learns that nobody
    reads it any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_quiet = False
        self._bar: PrecopyBar | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; it ends a bar, which was of the step before."""
        if self.is_quiet:
            return
        self._end_bar()
        print(printable(record.getMessage()), file=sys.stderr, flush=True)

    @property
    def on_progress(self) -> OnProgress | None:
        """What draws a bar of a migration's progress; None where it is to be logged as lines."""
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
        """End the bar, where there is one."""
        self._end_bar()
        super().close()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.end()
            self._bar = None


class OfManyProofs(logging.Filter):
    """Leaves out the steps of each single proof, and whatever was logged in the same words before.

    Each of the proofs finds out the same of the machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be shown."""
        if record.levelno < logging.WARNING and record.name.startswith(_STEPS_OF_A_PROOF):
            return False
        text = record.getMessage()
        is_new = text not in self._seen
        self._seen.add(text)
        return is_new
