"""The kinds of ``--device`` that are passed through to the guest (docs/passthrough.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dmaproof.errors import UsageError
from dmaproof.trace import Link

from ..devices.device import ProofDevice
from ..devices.registry import COMMON_OPTIONS, Control, DeviceKind, DeviceRequest, kind_of
from ..proof.options import ProofOptions
from ..proof.resolve import refuse_strangers
from .host_functions import PREFIX, parse_functions
from .injected_faults import parse_fault
from .proof_device import NAME, FakeProofDevice
from .tracking import TRACKINGS
from .vfio_functions import Host

TRACKING = "iommufd"
"""How QEMU is to hear of dirty pages where ``--device vfio-fake`` does not say."""


class HostFunctionsKind(DeviceKind):
    """Two VFIO functions of this host, which a guest of the user's own drives."""

    name = "vfio"
    accepts = COMMON_OPTIONS | {"kernel", "initrd", "append"}

    def names(self) -> Sequence[str]:
        """The form of such a name."""
        return [f"{PREFIX}SOURCE,DESTINATION"]

    def claims(self, name: str) -> bool:
        """Whether the name has the prefix."""
        return name.startswith(PREFIX)

    def make(self, request: DeviceRequest) -> ProofDevice:
        """The two functions, which must exist."""
        return parse_functions(request.names[0], Host())


class FakeVfioKind(DeviceKind):
    """The fake VFIO device; all of its proof happens in the nested machine, with its own guest."""

    name = "vfio-fake"
    accepts: ClassVar[frozenset[str]] = frozenset({"device", "qemu", "fault", "seed", "timeout"})
    control = Control("drop=50", Link.TRACKER)

    def names(self) -> Sequence[str]:
        """Its name alone."""
        return [NAME]

    def claims(self, name: str) -> bool:
        """Whether it is the name, with or without how QEMU is to hear of dirty pages."""
        return name.partition(":")[0] == NAME

    def make(self, request: DeviceRequest) -> ProofDevice:
        """Refuse it: only in the nested machine it can be started (`prove.prove_fake_vfio`)."""
        raise UsageError(f"--device {NAME} is for 'dmaproof prove', which makes a machine for it")


def is_fake_vfio(options: ProofOptions) -> bool:
    """Whether the options are of a proof on the fake VFIO device."""
    return isinstance(kind_of(options.devices, options.device_command), FakeVfioKind)


def fake_device_of(options: ProofOptions) -> FakeProofDevice:
    """The fake VFIO device that the options are about.

    Raises:
        UsageError: an option means nothing to it, or cannot have its value.
    """
    refuse_strangers(options, FakeVfioKind())
    tracking = options.devices[0].partition(":")[2] or TRACKING
    if tracking not in TRACKINGS:
        raise UsageError(
            f"--device {NAME}:{tracking}: expected one of {', '.join(TRACKINGS)} after {NAME}"
        )
    if options.fault is not None:
        parse_fault(options.fault)
        if not TRACKINGS[tracking].device:
            raise UsageError(
                f"--device {NAME}:{tracking}: QEMU does not ask the device there, so none of its "
                "faults can show"
            )
    return FakeProofDevice(tracking, options.fault)
