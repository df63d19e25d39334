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

MEMORY_BYTES: Final = GIB
"""The guest's RAM, where no other size is asked for."""


def own_guest(kernel: str, initramfs: str | None, options: str) -> Guest:
    """The guest of these files.

    Raises:
        UsageError: one is not there.
    """
    for option, name in (("--kernel", kernel), ("--initrd", initramfs)):
        if name is not None and not Path(name).is_file():
            raise UsageError(f"{option} {name}: there is no such file")
    return Guest(
        name="own",
        version=kernel,
        kernel=Path(kernel),
        initramfs=Path(initramfs) if initramfs else None,
        options=options,
        memory_bytes=MEMORY_BYTES,
        kvm_patience_s=0.0,
    )
