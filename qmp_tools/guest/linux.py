"""Build the Linux guest: any kernel of `kernels`, and dmaproof's init.

The initramfs holds the modules that the device needs and one static program,
``guests/linux/init.c`` with ``guests/workload.c``.
"""

from __future__ import annotations

import logging
from typing import Final

from ..arch.architecture import Architecture
from ..host.cached_folder import digest, fresh_folder
from ..qemu.machine import MIB
from .build import Guest, cache, compile_c, sources
from .drivers import Driver
from .initramfs import with_modules
from .kernels import KernelFiles, find_kernel

_logger = logging.getLogger(__name__)

_COMMAND_LINE: Final = (
    "quiet panic=-1 nokaslr mitigations=off "
    "random.trust_cpu=on cryptomgr.notests transparent_hugepage=never "
    "memhp_default_state=online_movable "
    "cma=0"  # from CMA's memory, Linux may move even locked pages (alloc_contig_range)
)
_INIT_OPTIONS: Final = ("-static", "-pthread", "-std=c11")

MEMORY_BYTES: Final = 256 * MIB
"""The default size of the guest's RAM."""

_KVM_TIMEOUT_S: Final = 6.0
"""Under TCG the guest sends its first request after 2 s."""


def linux_guest(
    driver: Driver,
    architecture: Architecture,
    files: KernelFiles | None = None,
    page_bytes: int | None = None,
) -> Guest:
    """Return the Linux guest of `architecture` with one of the drivers.

    The first call may fetch the kernel, and compiles the init.

    Args:
        driver: what drives the proof's device.
        architecture: the guest's architecture.
        files: the user's kernel; `find_kernel` chooses one by default.
        page_bytes: the size of the kernel's pages; None is any size.

    Raises:
        UsageError: a file or folder of `files` does not exist, or has no modules of this kernel.
        UntestableError: there is no usable kernel, or no C compiler is installed.
    """
    kernel = find_kernel(architecture, driver.modules, files, page_bytes)
    modules = kernel.modules.load_order(driver.modules)
    folder = sources()
    sources_of_init = [*sorted((folder / "linux").glob("*.c")), folder / "workload.c"]
    headers = [*sorted((folder / "linux").glob("*.h")), folder / "workload.h"]
    parts = [file.read_bytes() for file in (*sources_of_init, *headers)]
    how = f"{kernel.version} {_INIT_OPTIONS} {list(modules)}"
    made_of = [how.encode(), *modules.values(), *parts]
    target = cache() / f"linux-{architecture.name}-{digest(made_of)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("building the guest's initramfs")
                init = fresh / "init"
                compile_c(sources_of_init, init, *_INIT_OPTIONS, architecture=architecture)
                (fresh / "initramfs").write_bytes(with_modules(init.read_bytes(), modules))
    return Guest(
        name="linux",
        version=f"{kernel.version} {target.name}",
        architecture=architecture,
        kernel=kernel.image,
        initramfs=target / "initramfs",
        options=(
            f"{_COMMAND_LINE} {architecture.linux_options} -- report={architecture.report_tty} "
            f"{driver.place}"
        ),
        memory_bytes=MEMORY_BYTES,
        kvm_timeout_s=_KVM_TIMEOUT_S,
        linux=str(kernel),
    )
