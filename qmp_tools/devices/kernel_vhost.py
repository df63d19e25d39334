"""Use a virtio device that the host's kernel serves (vhost), and whose DMA QEMU does not see.

The device keeps no journal. By default QEMU and the kernel are left alone. With the recorder
(`vhost_recorder`) dmaproof records what the kernel logs, and can inject a fault.
"""

from __future__ import annotations

import errno
import os
from abc import abstractmethod
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import ClassVar, Final

from dmaproof.errors import UntestableError, UsageError
from dmaproof.faults import make_fault
from dmaproof.faults.log import DropPages
from dmaproof.trace import Link

from ..guest.channel import GuestChannel
from ..guest.drivers import VIRTIO_NET, VIRTIO_SCSI, Driver
from ..guest.workload import Workload
from ..host.tap import Tap, open_tap
from ..qemu.pci_express import behind_iommu, device_port
from .device import AttachedDevice, DeviceFacts, ProofDevice, on_image, on_network
from .disk_image import write_image
from .registry import COMMON_OPTIONS, GUEST_OPTIONS, Control, DeviceKind, DeviceRequest, is_l1
from .scsi_target import scsi_target
from .vhost_recorder import KernelLogs, Recorder
from .vsock_echo import vsock_echo

RECORDER: Final = "recorder"
"""The option after the device's name: 'vhost-net:recorder'."""
_SCSI_IMAGE_BYTES: Final = 16 << 20
"""Less than other images: L1 takes long to write one."""
_FIRST_CID: Final = 3
"""The lower numbers are reserved (virtio 1.2, section 5.10.4)."""
_NOT_HERE: Final = (errno.ENOENT, errno.ENODEV, errno.ENXIO)
"""The errors of opening a device file that no driver of this kernel serves."""


@dataclass(frozen=True)
class KernelDevice(ProofDevice):
    """A vhost device of the kernel; `has_recorder` if QEMU runs with the recorder.

    The recorder withholds the `share` of pages that the `fault` names, and `seed` selects.
    """

    has_recorder: bool = False
    fault: str | None = None
    share: float = 0.0
    seed: int = 0
    behind_iommu: bool = False

    name: ClassVar[str]
    node: ClassVar[Path]
    """The device file by which QEMU uses the device."""

    @property
    def facts(self) -> DeviceFacts:
        return DeviceFacts(self.name, queues=1, ring="split", fault=self.fault)

    def require_node(self) -> None:
        """Check that this user may use the device.

        Raises:
            UntestableError: this user may not.
        """
        if number := _open_error(self.node):
            raise UntestableError(
                f"--device {self.name}: {self.node} cannot be opened ({os.strerror(number)}): let "
                "this user read and write it (usually as a member of the group kvm), and let the "
                "container have it"
            )

    def device_arguments(self, device: str) -> list[str]:
        """Return the arguments of QEMU's `device`, behind its IOMMU if there is one."""
        if not self.behind_iommu:
            return ["-device", device]
        return [*device_port(1), "-device", ",".join((device, *behind_iommu(1)))]

    def recorder(self, folder: Path, side: str) -> Recorder | None:
        """Make the recorder of the QEMU that is started next as `side`, if there is one."""
        return Recorder(folder, side, self.share, self.seed) if self.has_recorder else None


class AttachedKernelDevice(AttachedDevice):
    """A vhost device of the kernel in use, with the recorders of both sides."""

    def __init__(self, setup: KernelDevice, folder: Path) -> None:
        self._setup = setup
        self._folder = folder
        self._recorders: dict[str, Recorder | None] = {}

    async def attach(self, side: str) -> Sequence[str]:
        self._recorders[side] = self._setup.recorder(self._folder, side)
        return await self.arguments(side)

    @abstractmethod
    async def arguments(self, side: str) -> Sequence[str]:
        """Return the device's arguments for the QEMU that is about to be started as `side`."""

    def program(self, side: str, qemu: Path) -> Path:
        recorder = self._recorders[side]
        return qemu if recorder is None else recorder.program(qemu)

    def check_guest(self, guest: GuestChannel) -> None:
        for recorder in filter(None, self._recorders.values()):
            recorder.require_loaded()

    def kernel_logs(self, side: str) -> KernelLogs | None:
        recorder = self._recorders[side]
        return None if recorder is None else recorder.logs()


@dataclass(frozen=True)
class VhostNet(KernelDevice):
    """vhost-net on a tap that sends every frame back; each side has a tap of its own."""

    name: ClassVar = "vhost-net"
    node: ClassVar = Path("/dev/vhost-net")

    @property
    def guests(self) -> Collection[str]:
        return ("bare", "linux")

    @property
    def driver(self) -> Driver:
        return VIRTIO_NET

    @property
    def direct(self) -> bool:
        return False

    def adapt(self, workload: Workload) -> Workload:
        return on_network(workload)

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        self.require_node()
        attached = _AttachedNet(self, folder, timeout_s)
        try:
            yield attached
        finally:
            attached.close()


class _AttachedNet(AttachedKernelDevice):
    def __init__(self, setup: VhostNet, folder: Path, timeout_s: float) -> None:
        super().__init__(setup, folder)
        self._timeout_s = timeout_s
        self._taps: dict[str, Tap] = {}

    async def arguments(self, side: str) -> Sequence[str]:
        self.release(side)
        tap = self._taps[side] = open_tap(self._timeout_s)
        return [
            *("-netdev", f"tap,id=net,fd={tap.fd},vhost=on"),
            *self._setup.device_arguments("virtio-net-pci,netdev=net"),
        ]

    def inherited(self, side: str) -> Sequence[int]:
        return [self._taps[side].fd]

    def release(self, side: str) -> None:
        if side in self._taps:
            self._taps.pop(side).close()

    def close(self) -> None:
        for side in list(self._taps):
            self.release(side)


@dataclass(frozen=True)
class VhostScsi(KernelDevice):
    """vhost-scsi on a target of the kernel, which both sides use, one after the other."""

    name: ClassVar = "vhost-scsi"
    node: ClassVar = Path("/dev/vhost-scsi")

    @property
    def guests(self) -> Collection[str]:
        return ("bare", "linux")

    @property
    def driver(self) -> Driver:
        return VIRTIO_SCSI

    def adapt(self, workload: Workload) -> Workload:
        return on_image(workload)

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        self.require_node()
        image = folder / "disk"
        write_image(image, _SCSI_IMAGE_BYTES)
        with scsi_target(image) as target:
            yield _AttachedScsi(self, folder, target)


class _AttachedScsi(AttachedKernelDevice):
    def __init__(self, setup: VhostScsi, folder: Path, target: str) -> None:
        super().__init__(setup, folder)
        self._target = target

    async def arguments(self, side: str) -> Sequence[str]:
        device = f"vhost-scsi-pci,wwpn={self._target},migratable=on,num_queues=1"
        return self._setup.device_arguments(device)


@dataclass(frozen=True)
class VhostVsock(KernelDevice):
    """vhost-vsock, and a program on the host that sends every byte back."""

    name: ClassVar = "vhost-vsock"
    node: ClassVar = Path("/dev/vhost-vsock")

    @property
    def guests(self) -> Collection[str]:
        return ("bare",)

    def adapt(self, workload: Workload) -> Workload:
        return on_network(workload)

    @asynccontextmanager
    async def start(self, folder: Path, timeout_s: float) -> AsyncIterator[AttachedDevice]:
        self.require_node()
        async with vsock_echo():
            yield _AttachedVsock(self, folder)


class _AttachedVsock(AttachedKernelDevice):
    """Each QEMU has another CID, which the kernel gives to one device at a time."""

    def __init__(self, setup: VhostVsock, folder: Path) -> None:
        super().__init__(setup, folder)
        self._cids = count(_FIRST_CID)

    async def arguments(self, side: str) -> Sequence[str]:
        return self._setup.device_arguments(f"vhost-vsock-pci,guest-cid={next(self._cids)}")


class KernelDeviceKind(DeviceKind):
    """The base class of the kernel's vhost devices: one kind for each."""

    accepts = COMMON_OPTIONS | GUEST_OPTIONS | {"iommu", "fault", "l1_kernel"}
    control = Control(f"{DropPages.name}=0.01", Link.LOG)
    device: ClassVar[type[KernelDevice]]

    def names(self) -> Sequence[str]:
        """Return the device's name."""
        return [self.device.name]

    def summary(self, name: str) -> str:
        """Return what the device is, and what its option does."""
        return f"{super().summary(name)}; {name}:{RECORDER} also records what the kernel logs"

    def claims(self, name: str) -> bool:
        """Return whether it is the device's name, with or without an option after a colon."""
        return name.partition(":")[0] == self.device.name

    def runs_here(self) -> bool:
        """Return whether the kernel of this machine has the device."""
        return _open_error(self.device.node) not in _NOT_HERE

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Make the device; a fault needs the recorder, which injects it."""
        name, _, option = request.names[0].partition(":")
        if option not in ("", RECORDER):
            raise UsageError(f"--device {request.names[0]}: expected {name} or {name}:{RECORDER}")
        fault, seed = request.options.fault, request.options.seed
        dropped = None if fault is None else make_fault(fault, seed)
        if not isinstance(dropped, DropPages | None):
            raise UsageError(
                f"--fault {fault}: the kernel keeps {name}'s chain, so dmaproof can only withhold "
                f"pages that the kernel has logged; expected {DropPages.name}=SHARE"
            )
        return self.device(
            has_recorder=bool(option or dropped),
            fault=fault,
            share=dropped.value if dropped else 0.0,
            seed=seed,
            behind_iommu=request.behind_iommu,
        )


class VhostNetKind(KernelDeviceKind):
    """The kernel's vhost-net, on a tap that sends every frame back"""

    name = VhostNet.name
    device = VhostNet


class VhostScsiKind(KernelDeviceKind):
    """The kernel's vhost-scsi with a disk of the kernel's own SCSI target"""

    name = VhostScsi.name
    accepts = KernelDeviceKind.accepts - {"iommu"}  # it lacks VIRTIO_F_ACCESS_PLATFORM
    device = VhostScsi

    def runs_here(self) -> bool:
        """Return whether this machine is L1: a target would stay if dmaproof was killed."""
        return is_l1() and super().runs_here()


class VhostVsockKind(KernelDeviceKind):
    """The kernel's vhost-vsock, and a program on the host that sends every byte back"""

    name = VhostVsock.name
    device = VhostVsock

    def runs_here(self) -> bool:
        """Return whether this machine is L1: all of a kernel's guests share its CIDs and ports."""
        return is_l1() and super().runs_here()


def _open_error(node: Path) -> int:
    """Return the error of opening a device file; 0 if it can be opened.

    The kernel loads the driver if the file is opened.
    """
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    return 0
