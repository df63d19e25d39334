"""A guest of the user's own, for devices of which we have no driver.

It is a kernel, and mostly an initramfs, that makes the device write its memory, and speaks the line
to the tool (docs/guests.md) on its second serial port. What the workload says stands on its command
line, behind the user's own text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError

from ..qemu.machine import GIB
from .build import Guest

OWN_GUEST: Final = "own"
"""What a guest of the user's is called among the guests of a device."""
MEMORY_BYTES: Final = GIB
"""The guest's RAM, where no other size is asked for."""


def own_guest(kernel: Path, initramfs: Path | None, options: str) -> Guest:
    """The guest of these files.

    Raises:
        UsageError: one is not there.
    """
    for option, name in (("--kernel", kernel), ("--initrd", initramfs)):
        if name is not None and not name.is_file():
            raise UsageError(f"{option} {name}: there is no such file")
    return Guest(
        name=OWN_GUEST,
        version=str(kernel),
        kernel=kernel,
        initramfs=initramfs,
        options=options,
        memory_bytes=MEMORY_BYTES,
        kvm_timeout_s=0.0,
    )
