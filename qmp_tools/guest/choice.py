"""The guests that a proof can run, by name; see docs/guests.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .bare import bare_guest
from .build import Guest, Say
from .linux import linux_guest

GUESTS: Final[dict[str, Callable[[Say], Guest]]] = {"bare": bare_guest, "linux": linux_guest}
