"""The guests that a proof can run, by name; see docs/guests.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .bare import bare_guest
from .build import Guest
from .linux import Driver, linux_guest

GUESTS: Final[dict[str, Callable[[Driver], Guest]]] = {
    "bare": lambda driver: bare_guest(),  # it drives virtio disks only
    "linux": linux_guest,
}
