"""The kernel's own selftests of iommufd and VFIO, and what a machine needs to run them.

They are built with each kernel, from the same source. They test hardware, which QEMU emulates: an
Intel IOMMU, and a network card (82576).
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...arch.x86_64 import X86_64
from ...host.captured import run_captured
from .root import quoted

_logger = logging.getLogger(__name__)

PROGRAMS: Final = {
    "iommu": ("iommufd", "iommufd_fail_nth"),
    "vfio": (
        "vfio_dma_mapping_test",
        "vfio_dma_mapping_mmio_test",
        "vfio_iommufd_setup_test",
        "vfio_pci_device_test",
        "vfio_pci_device_init_perf_test",
        "vfio_pci_sriov_uapi_test",
    ),
}
"""The programs by their folder in tools/testing/selftests."""
SELFTESTS: Final = "selftests"
"""The folder of the programs in a build, in a kernel's folder, and in /mnt of L1."""
LOG: Final = "log"
"""The output of a folder's build, in the folder."""

_TIMEOUT_S: Final = 60.0
_NIC: Final = "igb"
_MEMORY_MIB: Final = 2560
"""vfio_dma_mapping_test maps a page of 1 GiB."""


def build_script(make: str, source: str, build: str) -> str:
    """Return a script that builds the selftests in the folder `SELFTESTS` of `build`.

    A program that does not compile is missing there. Its folder has the compiler's output. The
    programs are built from scratch, because make does not know all headers that they include.

    Args:
        make: the command that runs the kernel's Makefile.
        source: the folder of the kernel's source.
        build: the folder of its build.
    """
    target = f"{build}/{SELFTESTS}"
    return f"""\
rm -rf {target}
mkdir {target}
if ! {make} headers >{target}/{LOG} 2>&1; then
    echo "making the kernel's headers for user space failed" >>{target}/{LOG}
fi
for folder in {" ".join(PROGRAMS)}; do
    tests={source}/tools/testing/selftests/$folder
    mkdir {target}/$folder
    if [ ! -d $tests ]; then
        echo "this kernel's source has no tools/testing/selftests/$folder" >{target}/$folder/{LOG}
    elif ! make -s -k -j"$JOBS" -C $tests OUTPUT={target}/$folder \\
        KHDR_INCLUDES="-isystem {build}/usr/include" >{target}/$folder/{LOG} 2>&1
    then
        cat {target}/{LOG} >>{target}/$folder/{LOG}
    fi
done
"""


def collect_selftests(build: Path, target: Path) -> None:
    """Copy the programs and the logs of a build to the folder `target`, which must not exist."""
    for folder in PROGRAMS:
        (target / folder).mkdir(parents=True)
    for file in selftest_files(build):
        shutil.copy(file, target / file.parent.name)


def selftest_files(build: Path) -> list[Path]:
    """Return the files that `collect_selftests` copies."""
    names = [(folder, name) for folder, found in PROGRAMS.items() for name in (*found, LOG)]
    files = [build / SELFTESTS / folder / name for folder, name in names]
    return [file for file in files if file.is_file()]


@dataclass(frozen=True)
class Hardware:
    """What a machine has for the selftests, besides what every L1 has."""

    binary: Path
    """The QEMU that runs the machine."""
    memory_mib: int = _MEMORY_MIB
    arguments: tuple[str, ...] = (
        *("-device", "intel-iommu"),
        *("-device", "pcie-root-port,id=selftests,slot=1,chassis=1"),
        *("-device", f"{_NIC},bus=selftests,romfile="),
    )


def selftest_hardware(binary: Path, root: Path, folder: Path) -> Hardware:
    """Return the hardware for the selftests.

    Args:
        binary: the QEMU that runs L1. It runs this machine too if it can emulate the card, which
            QEMU can from 8.0 on.
        root: L1's root file system, whose QEMU runs the machine otherwise.
        folder: a folder for a script.
    """
    devices = run_captured([binary, "-device", "help"], timeout_s=_TIMEOUT_S).stdout
    if f'name "{_NIC}"' in devices:
        return Hardware(binary)
    _logger.info("%s has no device %s; L1's own QEMU runs one machine", binary, _NIC)
    script = folder / f"l1-{X86_64.qemu_program}"
    libraries = root / "usr/lib/x86_64-linux-gnu"
    words = quoted(
        *(libraries / "ld-linux-x86-64.so.2", "--library-path", libraries),
        root / "usr/bin" / X86_64.qemu_program,
        *("-L", root / "usr/share/qemu", "-L", root / "usr/share/seabios"),
    )
    script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    script.chmod(0o755)
    return Hardware(script)
