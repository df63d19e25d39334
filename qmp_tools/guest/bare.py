"""Build the guests without a kernel, which QEMU enters by PVH.

``guests/bare`` carries out a workload as the Linux guest does, and sends its first request a few
hundredths of a second after the firmware. ``guests/passthrough/guest`` drives the fake VFIO device
instead of a disk. ``guests/probe`` only dirties pages.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from ..qemu.machine import MIB
from .build import Guest, cache, compile_c, digest, fresh_folder, sources

_logger = logging.getLogger(__name__)

_ARCHITECTURE: Final = "x86_64"
_FREESTANDING: Final = (
    *("-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"),
    "-Wl,-Ttext-segment=0x100000",  # above the firmware's memory
)
_BARE: Final = (
    *("-std=gnu11", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-fcf-protection=none"),
    "-mgeneral-regs-only",  # the FPU is not set up
    "-mno-red-zone",  # an exception uses the stack at once
    "-fno-asynchronous-unwind-tables",
)
MEMORY_BYTES: Final = 128 * MIB
"""The default size of the guest's RAM."""

_KVM_TIMEOUT_S: Final = 2.0
"""Under TCG the guest sends its first request after 0.2 s."""


def bare_guest() -> Guest:
    """Return the freestanding guest, compiled if it is not in the cache.

    Raises:
        UntestableError: no C compiler is installed, or it fails.
    """
    folder = sources()
    common = sorted((folder / "bare").glob("*.c"))
    files = [*common, *_machine_files(), folder / "workload.c"]
    target = _built("bare", files, _headers(), _BARE)
    return Guest(
        name="bare",
        version=target.parent.name,
        kernel=target,
        initramfs=None,
        options="",
        memory_bytes=MEMORY_BYTES,
        kvm_timeout_s=_KVM_TIMEOUT_S,
    )


def vfio_guest() -> Path:
    """Return the ELF of the freestanding guest that drives the fake VFIO device.

    Raises:
        UntestableError: no C compiler is installed, or it fails.
    """
    folder = sources()
    common = [folder / "bare" / f"{part}.c" for part in ("console", "memory", "pci")]
    files = [folder / "passthrough" / "guest" / "main.c", *common, *_machine_files()]
    return _built("vfio", files, _headers(), _BARE)


def probe_guest() -> Path:
    """Return an ELF whose vCPU dirties a few pages for ever.

    Raises:
        UntestableError: no C compiler is installed, or it fails.
    """
    return _built("probe", [sources() / "probe" / f"{_ARCHITECTURE}.S"], [], ("-m32",))


def _machine_files() -> list[Path]:
    """Return the bare guest's sources for its architecture."""
    return sorted((sources() / "bare" / _ARCHITECTURE).glob("*.[cS]"))


def _headers() -> list[Path]:
    folder = sources()
    return [*sorted((folder / "bare").rglob("*.h")), folder / "workload.h"]


def _built(name: str, files: list[Path], headers: list[Path], options: tuple[str, ...]) -> Path:
    options = (*options, *_FREESTANDING)
    parts = [file.read_bytes() for file in (*files, *headers)]
    target = cache() / f"{name}-{digest([' '.join(options).encode(), *parts])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("building the %s guest", name)
                compile_c(files, fresh / name, *options)
    return target / name
