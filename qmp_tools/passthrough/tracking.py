"""How a QEMU whose vfio-pci has the fake device is to hear of dirty pages."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .outcome import LackingError


@dataclass(frozen=True)
class Tracking:
    """How QEMU is to hear of dirty pages.

    `device`: by the device's own log, else by type1's, which iommufd does not have. `precopy`: from
    the start, else only once the device is stopped.
    """

    iommufd: bool = True
    device: bool = True
    precopy: bool = True

    @property
    def heard(self) -> bool:
        """Whether QEMU hears of what the device writes while that runs."""
        return self.precopy and (self.device or not self.iommufd)

    def arguments(self, sysfs: Path, known: Container[str] | None = None) -> list[str]:
        """QEMU's arguments for a vfio-pci on the device with the folder `sysfs`.

        `known`: the properties that this QEMU's vfio-pci has, where it was asked.

        Raises:
            LackingError: it does not have what this way of tracking takes.
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
            raise LackingError(f"this QEMU's vfio-pci has no property {', '.join(missing)}")
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
"""The ways by name: who owns the device, and who tracks if not the device's own log throughout."""
