"""The user's own guest, for devices that dmaproof's guests cannot drive.

The guest is a kernel, usually with an initramfs. It makes the device write the guest's memory, and
speaks dmaproof's protocol (docs/guests.md) on its second serial port. Its command line is the
user's text followed by the workload.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError

from ..arch.architecture import Architecture
from ..qemu.machine import GIB
from .build import Guest

OWN_GUEST: Final = "own"
"""The name of the user's own guest among the guests of a device."""
MEMORY_BYTES: Final = GIB
"""The default size of the guest's RAM."""


def own_guest(
    architecture: Architecture, kernel: Path, initramfs: Path | None, options: str
) -> Guest:
    """Make the guest of `architecture` from these files.

    Raises:
        UsageError: a file does not exist.
    """
    for option, name in (("--kernel", kernel), ("--initrd", initramfs)):
        if name is not None and not name.is_file():
            raise UsageError(f"{option} {name}: not found, or not a regular file")
    return Guest(
        name=OWN_GUEST,
        version=str(kernel),
        architecture=architecture,
        kernel=kernel,
        initramfs=initramfs,
        options=options,
        memory_bytes=MEMORY_BYTES,
        kvm_timeout_s=0.0,
    )
