"""Name the transports of a migration, as the migration URIs of both QEMUs."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..qemu.qmp import Qmp

LOCALHOST: Final = "127.0.0.1"
_LOCALHOST_IPV6: Final = "::1"
VSOCK_LOCAL_CID: Final = 1
"""VMADDR_CID_LOCAL of vsock(7), by which a host connects to itself. Python has no name for it."""


@dataclass(frozen=True)
class Ends:
    """Both QEMUs of a migration, and the `folder` and `host` that its transport may use.

    `printed()` returns the messages that the QEMUs have printed. `joined()` waits until the
    destination answers on QMP, for a scenario in which it does so only during the migration.
    """

    source: Qmp
    destination: Qmp
    folder: Path
    host: str = LOCALHOST
    printed: Callable[[], str] = lambda: ""
    joined: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True)
class Transport:
    """The migration URIs from which the destination reads and to which the source writes.

    If `saved_first`, the destination begins to read after the source has written everything. Else
    `written_to` is called when the destination listens.
    """

    read_from: Callable[[Ends], str]
    written_to: Callable[[Ends], Awaitable[str]]
    saved_first: bool = False


def socket_transport(uri: Callable[[Ends], str]) -> Transport:
    """Make a transport over a socket at `uri`; the source learns a TCP port that QEMU chooses."""

    async def written_to(ends: Ends) -> str:
        if not uri(ends).startswith("tcp:"):
            return uri(ends)
        address = (await ends.destination.execute("query-migrate"))["socket-address"][0]
        return tcp_uri(address["host"], address["port"])

    return Transport(uri, written_to)


def tcp_uri(host: str, port: str) -> str:
    """Return the URI of a TCP port; an IPv6 address is in brackets (inet_parse)."""
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def saved_transport(reading: Callable[[Path], str], writing: Callable[[Path], str]) -> Transport:
    """Make a transport over a file in the run's folder, from the URIs that read and write it."""

    def file(ends: Ends) -> Path:
        return ends.folder / "saved-guest"

    async def written_to(ends: Ends) -> str:
        return writing(file(ends))

    return Transport(lambda ends: reading(file(ends)), written_to, saved_first=True)


def cat_from(file: Path) -> str:
    """Return the URI of a shell command that reads `file`."""
    return f"exec:cat <{shlex.quote(str(file))}"


def _vsock_uri(cid: int | str, port: int | str) -> str:
    return f"vsock:{cid}:{port}"


async def _written_to_vsock(ends: Ends) -> str:
    address = (await ends.destination.execute("query-migrate"))["socket-address"][0]
    return _vsock_uri(address["cid"], address["port"])


UNIX: Final = socket_transport(lambda ends: f"unix:{ends.folder / 'destination-migration.sock'}")
TCP: Final = socket_transport(lambda ends: tcp_uri(ends.host, "0"))
TCP_IPV6: Final = socket_transport(lambda ends: tcp_uri(_LOCALHOST_IPV6, "0"))
VSOCK: Final = Transport(
    # The kernel chooses a free port (vsock(7)).
    lambda ends: _vsock_uri(VSOCK_LOCAL_CID, socket.VMADDR_PORT_ANY),
    _written_to_vsock,
)
FD: Final = socket_transport(lambda ends: "fd:migration")
EXEC: Final = saved_transport(cat_from, lambda file: f"exec:cat >{shlex.quote(str(file))}")
FILE: Final = saved_transport(lambda file: f"file:{file}", lambda file: f"file:{file}")


def channel(folder: Path, kind: str) -> dict[str, Any]:
    """Return the migration channel `kind`, 'main' or 'cpr', over a socket in `folder`."""
    address = {"transport": "socket", "type": "unix", "path": str(channel_path(folder, kind))}
    return {"channel-type": kind, "addr": address}


def channel_path(folder: Path, kind: str) -> Path:
    """Return the path at which the destination listens for channel `kind`."""
    return folder / f"{kind}-channel.sock"
