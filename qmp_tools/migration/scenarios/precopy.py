"""Live precopy migrations, which differ in the transport or in QEMU's capabilities."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from dmaproof.errors import UnsupportedError, UntestableError

from ...qemu.machine import Hardware
from ..certificates import SERVER_NAME, make_certificates
from ..procedure import HELD_BYTES_PER_S
from ..transport import FD, TCP, TCP_IPV6, VSOCK, VSOCK_LOCAL_CID, Ends
from .base import Scenario


class Unix(Scenario):
    """Migration over a Unix socket."""

    name = "unix"
    summary = "The source and destination use a Unix socket"


class Tcp(Scenario):
    """Migration over TCP."""

    name = "tcp"
    summary = "The source and destination use TCP, on a free port"
    transport = TCP


class TcpIpv6(Scenario):
    """Migration over TCP and IPv6."""

    name = "tcp-ipv6"
    summary = "The source and destination use TCP over IPv6 (::1), on a free port"
    transport = TCP_IPV6


class Tls(Scenario):
    """Migration over TCP under TLS, with certificates made for the run."""

    name = "tls"
    summary = "The source and destination use TCP under TLS, with certificates made by openssl"
    transport = TCP
    parameters: Mapping[str, Any] = {"tls-creds": "migration-tls", "tls-hostname": SERVER_NAME}

    async def set_up(self, ends: Ends) -> None:
        """Give each QEMU its certificate."""
        await give_certificates(ends)


async def give_certificates(ends: Ends) -> None:
    """Give each QEMU the certificate that the parameters of `Tls` name.

    Raises:
        UntestableError: openssl does not make the certificates.
        QmpRefusal: a QEMU does not support TLS.
    """
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


class Vsock(Scenario):
    """Migration over vsock, to the same host."""

    name = "vsock"
    summary = "The source and destination use vsock, on a free port of the same host"
    transport = VSOCK

    def require_host(self) -> None:
        """Check that the host can connect to itself; only then it has this address (vsock_bind)."""
        try:
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
                listener.bind((VSOCK_LOCAL_CID, socket.VMADDR_PORT_ANY))
        except OSError as error:
            raise UntestableError(
                f"--scenario {self.name}: this host cannot connect to itself by vsock "
                f"({error.strerror}); load the kernel module: sudo modprobe vsock_loopback"
            ) from error


class Fd(Scenario):
    """Migration over file descriptors that QEMU receives."""

    name = "fd"
    summary = "The source and destination use a socket pair, which they get as file descriptors"
    transport = FD

    async def set_up(self, ends: Ends) -> None:
        """Send each QEMU its end of a socket pair."""
        for qmp, end in zip((ends.source, ends.destination), socket.socketpair(), strict=True):
            with end:
                await qmp.send_fd(end.fileno(), "migration")


class _Multifd(Scenario):
    capabilities: tuple[str, ...] = ("multifd",)
    exercised_by = "ram.multifd-bytes"
    first_pass_bytes_per_s = HELD_BYTES_PER_S
    channels = 4
    compression: str | None = None

    def __init__(self) -> None:
        channels = f"{self.channels} channel{'s' if self.channels > 1 else ''}"
        self.summary = f"QEMU sends the pages over {channels} beside the main one (multifd)"
        self.parameters = {"multifd-channels": self.channels}
        if self.compression is not None:
            self.summary += f", compressed with {self.compression}"
            self.parameters["multifd-compression"] = self.compression


class Multifd1(_Multifd):
    """Migration over one channel beside the main one."""

    name = "multifd-1"
    channels = 1


class Multifd4(_Multifd):
    """Migration over four channels."""

    name = "multifd-4"


class Multifd8(_Multifd):
    """Migration over eight channels."""

    name = "multifd-8"
    channels = 8


class MultifdZlib(_Multifd):
    """Migration over four channels, compressed with zlib."""

    name = "multifd-zlib"
    compression = "zlib"


class MultifdZstd(_Multifd):
    """Migration over four channels, compressed with zstd."""

    name = "multifd-zstd"
    compression = "zstd"


class ZeroCopySend(_Multifd):
    """Migration over four channels, from which the kernel sends RAM without copying it."""

    name = "zero-copy-send"
    transport = TCP
    capabilities = ("multifd", "zero-copy-send")

    def __init__(self) -> None:
        super().__init__()
        self.summary += ", and Linux sends them without copying them (MSG_ZEROCOPY)"


class ZeroPageNone(Scenario):
    """Zero pages are sent like others."""

    name = "zero-page-none"
    summary = "QEMU sends zero pages like other pages"
    parameters: Mapping[str, Any] = {"zero-page-detection": "none"}


class ZeroPageLegacy(_Multifd):
    """The migration's main thread looks for zero pages."""

    name = "zero-page-legacy"

    def __init__(self) -> None:
        super().__init__()
        self.summary = (
            "QEMU's migration thread looks for zero pages, and 4 channels send the others"
        )
        self.parameters = {**self.parameters, "zero-page-detection": "legacy"}


class ValidateUuid(Scenario):
    """The destination checks the machine's UUID."""

    name = "validate-uuid"
    summary = "The destination checks that its machine has the UUID of the source's"
    capabilities = ("validate-uuid",)
    added = Hardware(qemu_arguments=("-uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"))


class Xbzrle(Scenario):
    """A page that QEMU has sent before is sent as a difference."""

    name = "xbzrle"
    summary = "QEMU sends only the difference of a page that it has sent before"
    capabilities = ("xbzrle",)
    exercised_by = "xbzrle-cache.pages"
    # The difference of a dirty page is some 20 bytes. The second pass still sends whole pages.
    held_bytes_per_s = 256 << 10


class AutoConverge(Scenario):
    """QEMU slows the vCPUs down."""

    name = "auto-converge"
    summary = "QEMU slows the vCPUs down until the migration converges"
    capabilities = ("auto-converge",)
    # The lowest threshold: QEMU throttles the vCPUs as soon as the guest dirties a page again.
    parameters: Mapping[str, Any] = {"throttle-trigger-threshold": 1}
    exercised_by = "cpu-throttle-percentage"


class DirtyLimit(Scenario):
    """QEMU slows down the vCPUs that dirty many pages."""

    name = "dirty-limit"
    summary = "QEMU slows down the vCPUs that dirty many pages, which KVM's dirty ring reports"
    capabilities = ("dirty-limit",)
    # The lowest limit, in MB/s of each vCPU, and the lowest threshold.
    parameters: Mapping[str, Any] = {"vcpu-dirty-limit": 1, "throttle-trigger-threshold": 1}
    exercised_by = "dirty-limit-throttle-time-per-round"
    added = Hardware(kvm_options=",dirty-ring-size=4096")

    def require_accelerator(self, accelerator: str) -> None:
        """Refuse an accelerator without a dirty ring."""
        if accelerator != "kvm":
            raise UnsupportedError(
                f"--scenario {self.name} needs KVM's dirty ring, and the accelerator is "
                f"{accelerator}; use --accel kvm on a host whose KVM runs the guest, or another "
                "scenario"
            )


class ReturnPath(Scenario):
    """The destination answers the source."""

    name = "return-path"
    summary = "The destination answers the source over a return path"
    capabilities = ("return-path",)


class SwitchoverAck(Scenario):
    """The destination acknowledges that the source may stop the guest."""

    name = "switchover-ack"
    summary = "The source waits for the destination's acknowledgement before it stops the guest"
    capabilities = ("return-path", "switchover-ack")
