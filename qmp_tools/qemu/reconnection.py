"""Have QEMU connect again to a vhost-user back end that was restarted.

QEMU 9.2 introduced the option 'reconnect-ms' of a socket's -chardev, and later versions do not have
the older 'reconnect', in seconds. 9.1 and older know only that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .qemu import idle_qemu
from .qmp import QmpRefusal

RECONNECT: Final = "reconnect-ms=100"
"""The option of ``-chardev socket`` with which QEMU connects again, in QEMU 9.2 and newer."""
_OLD: Final = "reconnect=1"
_BACKEND: Final[dict[str, Any]] = {
    "type": "socket",
    "data": {
        "addr": {"type": "unix", "data": {"path": "/nonexistent"}},
        "server": False,
        "reconnect-ms": 100,
    },
}


async def with_reconnection(arguments: Sequence[str], qemu: Path, *, timeout_s: float) -> list[str]:
    """Return `arguments` with the name that this `qemu` has for the option `RECONNECT`.

    Raises:
        UntestableError: the QEMU cannot be asked.
    """
    if not any(RECONNECT in argument for argument in arguments):
        return [*arguments]
    async with idle_qemu("QEMU", qemu, timeout_s=timeout_s) as asked:
        try:
            await asked.qmp.execute("chardev-add", id="probe", backend=_BACKEND)
        except QmpRefusal:
            return [argument.replace(RECONNECT, _OLD) for argument in arguments]
    return [*arguments]
