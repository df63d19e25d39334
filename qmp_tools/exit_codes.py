"""The exit codes of the command. This module imports nothing that could be missing."""

from __future__ import annotations

from typing import Final

EXIT_PASS: Final = 0
"""Every page is equal, and the guest continued without errors."""
EXIT_LOST: Final = 1
"""Pages were lost or not reported dirty, or the guest found errors."""
EXIT_USAGE: Final = 2
"""The caller's arguments are wrong."""
EXIT_UNTESTED: Final = 3
"""The proof came to no verdict; the message says why."""
BISECT: Final = "--bisect"
"""The option that makes dmaproof report its outcome to 'git bisect run'."""
BISECT_SKIP: Final = 125
"""Makes 'git bisect run' try another commit."""
BISECT_ABORT: Final = 128
"""Makes 'git bisect run' stop; from this code on, git does not take it for a bad commit."""


def for_bisect(exit_code: int) -> int:
    """Return the exit code that reports `exit_code` to 'git bisect run'."""
    known = {EXIT_PASS: EXIT_PASS, EXIT_LOST: EXIT_LOST, EXIT_UNTESTED: BISECT_SKIP}
    return known.get(exit_code, BISECT_ABORT)
