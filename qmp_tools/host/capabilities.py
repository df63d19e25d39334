"""What this process may do: its effective capabilities (capabilities(7))."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

CAP_IPC_LOCK: Final = 14
CAP_SYS_ADMIN: Final = 21


def is_capable(capability: int, status: Path = Path("/proc/self/status")) -> bool:
    """Whether the process of `status`, its file in /proc, has the capability of this number.

    It has none where the file cannot be read.
    """
    try:
        effective = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read_text(), re.MULTILINE)
    except OSError:
        return False
    return effective is not None and bool(int(effective[1], 16) >> capability & 1)
