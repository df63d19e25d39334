"""What the command's exit codes mean; they stand alone, for a command that cannot be imported."""

from __future__ import annotations

from typing import Final

EXIT_PASS: Final = 0
EXIT_LOST: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNTESTED: Final = 3
