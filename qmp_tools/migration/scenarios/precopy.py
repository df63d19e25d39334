"""Live migrations in one precopy: what differs is the transport, or what QEMU is told."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from ..certificates import SERVER_NAME, make_certificates
from ..procedure import HELD_BYTES_PER_S
from ..transport import FD, TCP, Ends
from .base import Scenario


class Unix(Scenario):
    """Over a Unix socket."""

    name = "unix"
    summary = "a Unix socket in the run's private folder"


class Tcp(Scenario):
    """Over TCP."""

    name = "tcp"
    summary = "TCP, on a free port"
    transport = TCP


class Tls(Scenario):
    """Over TCP under TLS, with certificates of the run's own."""

    name = "tls"
    summary = "TCP under TLS: both sides show certificates, made for the run; needs openssl"
    transport = TCP
    parameters: Mapping[str, Any] = {"tls-creds": "migration-tls", "tls-hostname": SERVER_NAME}

    async def set_up(self, ends: Ends) -> None:
        """Give each QEMU its certificate."""
        await make_certificates(ends.folder)
        for qmp, endpoint in ((ends.source, "client"), (ends.destination, "server")):
            await qmp.execute(
                "object-add",
                qom_type="tls-creds-x509",
                id="migration-tls",
                dir=str(ends.folder),
                endpoint=endpoint,
                verify_peer=True,
            )


class Fd(Scenario):
    """Over file descriptors that QEMU is handed."""

    name = "fd"
    summary = "a socket pair, handed to both QEMUs"
    transport = FD

    async def set_up(self, ends: Ends) -> None:
        """Hand each QEMU its end of a socket pair."""
        for qmp, end in zip((ends.source, ends.destination), socket.socketpair(), strict=True):
            with end:
                await qmp.send_fd(end.fileno(), "migration")


class _Multifd(Scenario):
    capabilities = ("multifd",)
    exercised_by = "ram.multifd-bytes"
    first_pass_bytes_per_s = HELD_BYTES_PER_S
    channels = 4
    compression: str | None = None

    def __init__(self) -> None:
        self.summary = f"a Unix socket for each of {self.channels} channels"
        self.parameters = {"multifd-channels": self.channels}
        if self.compression is not None:
            self.summary += f", compressed by {self.compression}"
            self.parameters["multifd-compression"] = self.compression


class Multifd1(_Multifd):
    """Over one channel beside the main one."""

    name = "multifd-1"
    channels = 1


class Multifd4(_Multifd):
    """Over four channels."""

    name = "multifd-4"


class Multifd8(_Multifd):
    """Over eight channels."""

    name = "multifd-8"
    channels = 8


class MultifdZlib(_Multifd):
    """Over four channels, compressed by zlib."""

    name = "multifd-zlib"
    compression = "zlib"


class MultifdZstd(_Multifd):
    """Over four channels, compressed by zstd."""

    name = "multifd-zstd"
    compression = "zstd"


class Xbzrle(Scenario):
    """With a page that was sent before as its difference."""

    name = "xbzrle"
    summary = "pages sent before go as their difference"
    capabilities = ("xbzrle",)
    exercised_by = "xbzrle-cache.pages"
    # A dirty page is some 20 bytes then; the second pass still sends and caches whole pages.
    held_bytes_per_s = 256 << 10


class AutoConverge(Scenario):
    """With vCPUs that are slowed down."""

    name = "auto-converge"
    summary = "the vCPUs are slowed down"
    capabilities = ("auto-converge",)
    # The least that there is: throttled as soon as the guest dirties anything again.
    parameters: Mapping[str, Any] = {"throttle-trigger-threshold": 1}
    exercised_by = "cpu-throttle-percentage"


class ReturnPath(Scenario):
    """With a destination that answers the source."""

    name = "return-path"
    summary = "the destination answers the source"
    capabilities = ("return-path",)


class SwitchoverAck(Scenario):
    """With a destination that says when the source may stop."""

    name = "switchover-ack"
    summary = "the destination says when the source may stop"
    capabilities = ("return-path", "switchover-ack")
