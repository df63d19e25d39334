"""The guests that a proof can run, by name; see docs/guests.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from ..arch.architecture import Architecture
from .bare import bare_guest
from .build import Guest
from .drivers import Driver
from .kernels import KernelFiles
from .linux import linux_guest

_MakeGuest: TypeAlias = Callable[[Driver, Architecture, KernelFiles | None, int | None], Guest]

GUESTS: Final[dict[str, _MakeGuest]] = {
    # It drives virtio disks, SCSI hosts and networks only, and has no kernel.
    "bare": lambda driver, architecture, files, page_bytes: bare_guest(architecture),
    "linux": linux_guest,
}
