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
