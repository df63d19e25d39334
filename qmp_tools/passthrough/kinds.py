"""The kinds of ``--device`` that are passed through to the guest (docs/passthrough.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dmaproof.errors import UsageError
from dmaproof.trace import Link

from ..devices.device import ProofDevice
from ..devices.registry import COMMON_OPTIONS, Control, DeviceKind, DeviceRequest, kind_of
from ..proof.options import ProofOptions
from ..proof.resolve import refuse_unsupported_options
from .host_functions import PREFIX, parse_functions
from .injected_faults import parse_fault
from .proof_device import NAME, FakeProofDevice
from .tracking import TRACKINGS
from .vfio_functions import Host

DEFAULT_TRACKING = "iommufd"
"""How dirty pages are reported to QEMU if ``--device vfio-fake`` does not say."""


class HostFunctionsKind(DeviceKind):
    """Two VFIO functions of this host, driven by the user's own guest."""

    name = "vfio"
    accepts = COMMON_OPTIONS | {"kernel", "initrd", "append"}

    def names(self) -> Sequence[str]:
        """Return the form of the name."""
        return [f"{PREFIX}SOURCE,DESTINATION"]

    def claims(self, name: str) -> bool:
        """Return whether the name has the prefix."""
        return name.startswith(PREFIX)

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Return the two functions, which must exist."""
        return parse_functions(request.names[0], Host())


class FakeVfioKind(DeviceKind):
    """The fake VFIO device, whose whole proof runs in the nested machine, with its own guest."""

    name = "vfio-fake"
    accepts: ClassVar[frozenset[str]] = frozenset(
        {"device", "qemu", "l1_kernel", "fault", "seed", "timeout"}
    )
    control = Control("drop=50", Link.TRACKER)

    def names(self) -> Sequence[str]:
        """Return the name of the fake device."""
        return [NAME]

    def claims(self, name: str) -> bool:
        """Return whether it is the name, with or without a way of tracking after a colon."""
        return name.partition(":")[0] == NAME

    def runs_here(self) -> bool:
        """Return False: the fake device exists only in L1."""
        return False

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Return the fake device with its way of tracking."""
        (name,) = request.names
        return _fake_device(name.partition(":")[2] or DEFAULT_TRACKING, request.options.fault)


def is_fake_vfio(options: ProofOptions) -> bool:
    """Return whether the options select the fake VFIO device."""
    return isinstance(kind_of(options.devices, options.device_command), FakeVfioKind)


def fake_device_of(options: ProofOptions) -> FakeProofDevice:
    """Return the fake VFIO device that the options select.

    Raises:
        UsageError: an option does not apply to the fake device, or has an invalid value.
    """
    refuse_unsupported_options(options, FakeVfioKind())
    return _fake_device(options.devices[0].partition(":")[2] or DEFAULT_TRACKING, options.fault)


def _fake_device(tracking: str, fault: str | None) -> FakeProofDevice:
    if tracking not in TRACKINGS:
        raise UsageError(
            f"--device {NAME}:{tracking}: expected one of {', '.join(TRACKINGS)} after {NAME}"
        )
    if fault is not None:
        parse_fault(fault)
        if not TRACKINGS[tracking].device:
            raise UsageError(
                f"--device {NAME}:{tracking}: QEMU does not ask the device for dirty pages, so "
                f"--fault {fault} would have no effect"
            )
    return FakeProofDevice(tracking, fault)
