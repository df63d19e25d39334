"""The ways in which dirty pages of a vfio-pci device are reported to QEMU."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .outcome import NotSupportedError


@dataclass(frozen=True)
class Tracking:
    """How QEMU opens the device, and how dirty pages are reported to QEMU.

    `iommufd`: QEMU opens the device through iommufd, else through the legacy container. `device`:
    QEMU asks the device's own log, else type1's log, which only the legacy container has.
    `precopy`: QEMU asks during precopy too, else only when the device is stopped.
    """

    iommufd: bool = True
    device: bool = True
    precopy: bool = True

    @property
    def reports_in_precopy(self) -> bool:
        """Whether dirty pages are reported to QEMU while the device runs."""
        return self.precopy and (self.device or not self.iommufd)

    def arguments(self, sysfs: Path, known: Container[str] | None = None) -> list[str]:
        """Return QEMU's arguments for a vfio-pci on the device with the folder `sysfs`.

        `known` has the properties of this QEMU's vfio-pci; None skips the check.

        Raises:
            NotSupportedError: this QEMU's vfio-pci has no property that this tracking needs.
        """
        old = known is not None and "enable-migration" not in known
        options = {
            "sysfsdev": str(sysfs),
            "x-enable-migration" if old else "enable-migration": "on",
            "rombar": "0",
        }
        if not self.device:
            options["x-device-dirty-page-tracking"] = "off"
        if not self.precopy:
            options["x-pre-copy-dirty-page-tracking"] = "off"
        if self.iommufd:
            options["iommufd"] = "iommufd0"
        missing = [name for name in options if known is not None and name not in known]
        if missing:
            raise NotSupportedError(f"this QEMU's vfio-pci has no property {', '.join(missing)}")
        joined = ",".join(f"{name}={value}" for name, value in options.items())
        iommufd = ["-object", "iommufd,id=iommufd0"] if self.iommufd else []
        return [*iommufd, "-device", f"vfio-pci,{joined}"]


TRACKINGS: Final[dict[str, Tracking]] = {
    "iommufd": Tracking(),
    "iommufd-once-stopped": Tracking(precopy=False),
    "iommufd-untracked": Tracking(device=False),
    "container": Tracking(iommufd=False),
    "container-once-stopped": Tracking(iommufd=False, precopy=False),
    "container-type1": Tracking(iommufd=False, device=False),
}
"""By name: how QEMU opens the device, and what tracks if not the device's log from the start."""
