"""Check the effective capabilities of a process (capabilities(7))."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

CAP_IPC_LOCK: Final = 14
CAP_SYS_ADMIN: Final = 21


def is_capable(capability: int, status: Path = Path("/proc/self/status")) -> bool:
    """Return whether a process has the capability of this number; False if its file cannot be read.

    `status` is the file of the process in /proc.
    """
    try:
        effective = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read_text(), re.MULTILINE)
    except OSError:
        return False
    return effective is not None and bool(int(effective[1], 16) >> capability & 1)
