"""The guests that a proof can run, by name; see docs/guests.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..arch.architecture import Architecture
from .bare import bare_guest
from .build import Guest
from .linux import Driver, linux_guest

GUESTS: Final[dict[str, Callable[[Driver, Architecture], Guest]]] = {
    "bare": lambda driver, architecture: bare_guest(architecture),  # it drives virtio disks only
    "linux": linux_guest,
}
