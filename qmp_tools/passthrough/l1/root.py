"""L1's root file system: unpacked packages of the distribution's archive; none is installed.

The same tree holds the tools that build L1's kernel. They run in it as in a container, without
root, in user, mount and process namespaces of their own. They are killed when dmaproof ends.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, WaitTimeoutError

from ...guest.build import cache, digest, fresh_folder, prune, sources
from ...host.archive import Archive, unpack
from ...host.capabilities import CAP_SYS_ADMIN, is_capable
from ...host.captured import run_captured
from ...host.process import death_with_parent

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
_MOUNT_POINTS: Final = ("dev", "proc", "sys", "tmp", "run", "mnt")

SOURCE: Final = "/usr/src"
"""Where a script inside the root file system finds a folder with source code."""
_LOCKED: Final = {
    os.ST_NOSUID: "nosuid",
    os.ST_NODEV: "nodev",
    os.ST_NOEXEC: "noexec",
}
"""The options of a mount that a user namespace must keep when it makes the mount read-only."""

_ENTER: Final = """\
root=$1; shift
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind "$1" "$root/mnt"; shift
if [ "$1" ]; then
    mount --bind "$1" "$root$2"
    mount -o "remount,bind,ro$3" "$root$2"
fi
shift 3
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin HOME=/ LC_ALL=C "$@"
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
    archive = fresh / "archive"
    found = Archive(SUITE, archive).fetch_closure(packages)
    _logger.info("unpacking %d packages", len(found))
    for package in found:
        unpack(package, fresh)
    (fresh / "packages").write_text("".join(f"{package.name}\n" for package in found))
    shutil.rmtree(archive)
    for name, target in _LINKS.items():
        link = fresh / name
        if not link.is_symlink():
            link.symlink_to(target)
    for name in _MOUNT_POINTS:
        (fresh / name).mkdir(exist_ok=True)
    (fresh / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    shutil.copy(init, fresh / "init")
    (fresh / "init").chmod(0o755)
    nothing = fresh / "mnt"
    what = "/usr/lib/python3 /usr/lib/python3.*"
    run_inside(fresh, nothing, COMPILE_PYTHON, "compiling Python for L1", _COMPILE_S, WHAT=what)


def run_inside(
    root: Path,
    mounted: Path,
    script: str,
    what: str,
    timeout_s: float,
    *,
    source: Path | None = None,
    **variables: str,
) -> str:
    """Run a shell script inside `root`, with the folder `mounted` as ``/mnt``; return its output.

    The folder `source` is mounted read-only at `SOURCE`. `variables` are the script's environment.
    `what` describes its task in messages.

    Raises:
        UntestableError: the script failed or took too long, or namespaces are not permitted.
    """
    command = [
        *("unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"),
        # In a chroot not even root can have a user namespace (create_user_ns in the kernel).
        *(() if is_capable(CAP_SYS_ADMIN) else ("--map-root-user",)),
        *("sh", "-ec", _ENTER, "sh", os.fspath(root), os.fspath(mounted)),
        *(("", "", "") if source is None else (os.fspath(source), SOURCE, _options(source))),
        *_assignments(variables),
        *("sh", "-ec", script),
    ]
    try:
        done = run_captured(command, timeout_s=timeout_s, preexec_fn=death_with_parent())
    except FileNotFoundError:
        raise UntestableError(
            f"{what} needs the program unshare: install the package util-linux"
        ) from None
    except subprocess.TimeoutExpired:
        raise WaitTimeoutError(
            f"{what} has not ended within {timeout_s:g} s; try again when the host is less busy"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-12:]
        if any(line.startswith("unshare:") for line in lines):
            lines.append(
                "user namespaces are not permitted: allow them "
                "(sysctl kernel.unprivileged_userns_clone=1), or run dmaproof outside the container"
            )
        raise UntestableError(f"{what} failed:\n" + "\n".join(f"    {line}" for line in lines))
    return done.stdout


def _options(folder: Path) -> str:
    flags = os.statvfs(folder).f_flag
    return "".join(f",{name}" for flag, name in _LOCKED.items() if flags & flag)


def _assignments(variables: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]


def quoted(*words: str | Path) -> str:
    """Return `words` quoted as one line for a shell."""
    return shlex.join(os.fspath(word) for word in words)
