"""Build the guests without a kernel.

``guests/bare`` carries out a workload as the Linux guest does, and sends its first request a few
hundredths of a second after the firmware. ``guests/passthrough/guest`` drives the fake VFIO device
instead of a disk. ``guests/probe`` only dirties pages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..arch.architecture import Architecture
from ..arch.x86_64 import X86_64
from ..host.cached_folder import digest, fresh_folder
from ..qemu.machine import MIB
from .build import Guest, cache, compile_c, sources

_logger = logging.getLogger(__name__)

_FREESTANDING: Final = ("-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none")
_BARE: Final = (
    *("-std=gnu11", "-ffreestanding", "-fno-pic", "-fno-stack-protector"),
    "-fno-asynchronous-unwind-tables",
)
MEMORY_BYTES: Final = 128 * MIB
"""The default size of the guest's RAM."""

_KVM_TIMEOUT_S: Final = 2.0
"""Under TCG the guest sends its first request after 0.2 s."""


def bare_guest(architecture: Architecture) -> Guest:
    """Return the freestanding guest of `architecture`, compiled if it is not in the cache.

    Raises:
        UntestableError: no C compiler is installed, or it fails.
    """
    folder = sources()
    common = sorted((folder / "bare").glob("*.c"))
    files = [*common, *_machine_files(architecture), folder / "workload.c"]
    target = _built("bare", architecture, files, _headers(), _freestanding(architecture))
    return Guest(
        name="bare",
        version=target.parent.name,
        architecture=architecture,
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
    own = folder / "passthrough" / "guest"
    files = [*sorted(own.glob("*.c")), *common, *_machine_files(X86_64)]
    headers = [*_headers(), *sorted(own.glob("*.h"))]
    return _built("vfio", X86_64, files, headers, _freestanding(X86_64))


def probe_guest(architecture: Architecture) -> Path:
    """Return an ELF whose vCPU dirties a few pages for ever.

    Raises:
        UntestableError: no C compiler is installed, or it fails.
    """
    source = sources() / "probe" / f"{architecture.name}.S"
    headers = sorted((sources() / "bare" / architecture.name).glob("*.h"))
    return _built("probe", architecture, [source], headers, architecture.probe_options)


def _freestanding(architecture: Architecture) -> Sequence[str]:
    return (*_BARE, *(architecture.freestanding_options or ()))


def _machine_files(architecture: Architecture) -> list[Path]:
    """Return the bare guest's sources for one architecture."""
    return sorted((sources() / "bare" / architecture.name).glob("*.[cS]"))


def _headers() -> list[Path]:
    folder = sources()
    return [*sorted((folder / "bare").rglob("*.h")), folder / "workload.h"]


def _built(
    name: str,
    architecture: Architecture,
    files: Sequence[Path],
    headers: Sequence[Path],
    options: Sequence[str],
) -> Path:
    options = (*options, *_FREESTANDING)
    parts = [file.read_bytes() for file in (*files, *headers)]
    how = f"{architecture.name} {' '.join(options)}"
    target = cache() / f"{name}-{architecture.name}-{digest([how.encode(), *parts])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("building the %s guest", name)
                compile_c(files, fresh / name, *options, architecture=architecture)
    return target / name
