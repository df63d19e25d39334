"""The ways in which dirty pages of a vfio-pci device are reported to QEMU."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .outcome import NotSupportedError

_IOMMUFD: Final = "iommufd0"
INTEL_IOMMU: Final = "intel-iommu,caching-mode=on,device-iotlb=on"
"""QEMU's VT-d, which reports a guest's mappings to vfio-pci only in caching mode.

The guest's driver (guests/bare/x86_64/vt_d.c) uses context entries for devices with a device TLB.
"""


@dataclass(frozen=True)
class Tracking:
    """How QEMU opens the device, and how dirty pages are reported to QEMU.

    `iommufd`: QEMU opens the device through iommufd, else through the legacy container. `device`:
    QEMU asks the device's own log, else type1's log, which only the legacy container has.
    `precopy`: QEMU asks during precopy too, else only when the device is stopped. `viommu`: the
    device is behind QEMU's intel-iommu.
    """

    iommufd: bool = True
    device: bool = True
    precopy: bool = True
    viommu: bool = False

    @property
    def reports_in_precopy(self) -> bool:
        """Whether dirty pages are reported to QEMU while the device runs."""
        return self.precopy and (self.device or not self.iommufd)

    @property
    def objects(self) -> tuple[str, ...]:
        """QEMU's arguments for what all devices with such a tracking share."""
        iommufd = ("-object", f"iommufd,id={_IOMMUFD}") if self.iommufd else ()
        return (*iommufd, *(("-device", INTEL_IOMMU) if self.viommu else ()))

    def arguments(self, sysfs: Path, known: Container[str] | None = None) -> list[str]:
        """Return QEMU's arguments for a vfio-pci on the device with the folder `sysfs`.

        `known` has the properties of this QEMU's vfio-pci; None skips the check.

        Raises:
            NotSupportedError: this QEMU's vfio-pci has no property that this tracking needs.
        """
        return [*self.objects, "-device", self.device_option(sysfs, known)]

    def device_option(
        self,
        sysfs: Path,
        known: Container[str] | None = None,
        *,
        migration: str = "on",
        **others: str,
    ) -> str:
        """Return the value of QEMU's ``-device`` for a vfio-pci; see `arguments`.

        With `migration` "on", QEMU does not start if it cannot migrate the device; with "auto", it
        refuses a migration. `others` are further properties.
        """
        old = known is not None and "enable-migration" not in known
        options = {
            "sysfsdev": str(sysfs),
            "x-enable-migration" if old else "enable-migration": migration,
            "rombar": "0",
        }
        if not self.device:
            options["x-device-dirty-page-tracking"] = "off"
        if not self.precopy:
            options["x-pre-copy-dirty-page-tracking"] = "off"
        if self.iommufd:
            options["iommufd"] = _IOMMUFD
        missing = [name for name in options if known is not None and name not in known]
        if missing:
            raise NotSupportedError(f"this QEMU's vfio-pci has no property {', '.join(missing)}")
        options |= others
        return ",".join(["vfio-pci", *(f"{name}={value}" for name, value in options.items())])


def joint(trackings: Sequence[Tracking]) -> list[Tracking]:
    """Return how QEMU tracks each of several devices of one machine.

    Devices on iommufd share an address space, and so do those in a legacy container. There, QEMU
    asks the devices' own logs only if it may ask all of them, and asks during precopy only if it
    may do so for all (vfio_devices_all_device_dirty_tracking, vfio_log_sync_needed).
    """
    found = []
    for tracking in trackings:
        shared = [other for other in trackings if other.iommufd == tracking.iommufd]
        device, precopy = all(o.device for o in shared), all(o.precopy for o in shared)
        found.append(Tracking(tracking.iommufd, device, precopy))
    return found


TRACKINGS: Final[dict[str, Tracking]] = {
    "iommufd": Tracking(),
    "iommufd-once-stopped": Tracking(precopy=False),
    "iommufd-untracked": Tracking(device=False),
    "container": Tracking(iommufd=False),
    "container-once-stopped": Tracking(iommufd=False, precopy=False),
    "container-type1": Tracking(iommufd=False, device=False),
    "container-type1-viommu": Tracking(iommufd=False, device=False, viommu=True),
}
"""By name: how QEMU opens the device, and what tracks if not the device's log from the start."""
