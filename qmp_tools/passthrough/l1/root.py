"""L1's root file system: unpacked packages of the distribution's archive; none is installed.

The same tree holds the tools that build L1's kernel, which run inside it (`host.unpacked_root`).
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ...guest.build import cache, sources
from ...host.cached_folder import digest, fresh_folder, prune
from ...host.unpacked_root import run_inside, unpack_root

_logger = logging.getLogger(__name__)

SUITE: Final = "trixie-backports"
_RUNNING: Final = ("coreutils", "dash", "libc-bin", "mount", "kmod", "python3", "python3-numpy")
_QEMU: Final = ("qemu-system-x86", "qemu-system-data", "qemu-utils", "seabios")
_NETWORK: Final = ("iproute2",)
_BUILDING: Final = (
    *("gcc", "libc6-dev", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "tar"),
    *("xz-utils", "mawk", "bash", "sed", "grep", "gzip", "findutils", "diffutils", "perl-base"),
    *("patch", "libcap-dev", "uuid-dev"),
)
_LINKS: Final = {
    "usr/bin/awk": "mawk",
    "usr/lib/x86_64-linux-gnu/libblas.so.3": "blas/libblas.so.3",
    "usr/lib/x86_64-linux-gnu/liblapack.so.3": "lapack/liblapack.so.3",
    "etc/mtab": "/proc/self/mounts",
}
"""The links that the packages' maintainer scripts would create."""
_COMPILE_S: Final = 600.0
COMPILE_PYTHON: Final = (
    "python3 -m compileall -q -j0 --invalidation-mode unchecked-hash $WHAT >/dev/null 2>&1 || true"
)
"""Compiled in advance, because under TCG that takes longer than running the modules.

Errors are ignored, because some files are not valid Python.
"""


def l1_root() -> Path:
    """Fetch the root file system (about 150 MB), or take it from the cache; return its folder.

    The file ``packages`` in it lists the packages that it was made of.

    Raises:
        UntestableError: the archive cannot be reached.
    """
    packages = (*_RUNNING, *_QEMU, *_NETWORK, *_BUILDING)
    init = sources() / "passthrough" / "init"
    recipe = "\n".join((SUITE, *packages, *_LINKS.values())).encode()
    target = cache() / "l1" / f"root-{digest([recipe, init.read_bytes()])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _fill(fresh, packages, init)
    return prune(target)


def _fill(fresh: Path, packages: Sequence[str], init: Path) -> None:
    _logger.info("fetching L1's root file system from %s (first use only)", SUITE)
    unpack_root(fresh, SUITE, packages, _LINKS)
    shutil.copy(init, fresh / "init")
    (fresh / "init").chmod(0o755)
    nothing = fresh / "mnt"
    what = "/usr/lib/python3 /usr/lib/python3.*"
    run_inside(fresh, nothing, COMPILE_PYTHON, "compiling Python for L1", _COMPILE_S, WHAT=what)


def quoted(*words: str | Path) -> str:
    """Return `words` quoted as one line for a shell."""
    return shlex.join(os.fspath(word) for word in words)
