"""Root file systems of unpacked packages, in which programs of another release run without root.

No package is installed. A program runs inside as in a container, in user, mount and process
namespaces of its own, and is killed when dmaproof ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, WaitTimeoutError

from .archive import Archive, unpack
from .capabilities import CAP_SYS_ADMIN, is_capable
from .captured import run_captured
from .process import death_with_parent

_MOUNT_POINTS: Final = ("dev", "proc", "sys", "tmp", "run", "mnt", "usr/src")

SOURCE: Final = "/usr/src"
"""Where a script inside the root file system finds a folder with source code."""
_LOCKED: Final = {
    os.ST_NOSUID: "nosuid",
    os.ST_NODEV: "nodev",
    os.ST_NOEXEC: "noexec",
}
"""The options of a mount that a user namespace must keep when it makes the mount read-only."""

_ENTER: Final = """\
root=$1 mounted=$2 source=$3 place=$4 options=$5; shift 5
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind "$mounted" "$root/mnt"
if [ "$source" ]; then
    mount --bind "$source" "$root$place"
    mount -o "remount,bind,ro$options" "$root$place"
fi
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin HOME=/ LC_ALL=C "$@"
"""


def unpack_root(
    root: Path, suite: str, packages: Sequence[str], links: Mapping[str, str]
) -> list[str]:
    """Unpack `packages` of `suite` and all their dependencies into `root`.

    Args:
        root: an existing folder.
        suite: a suite of Debian's archive.
        packages: the packages that are needed.
        links: the links that the packages' maintainer scripts would create, with their targets.

    Returns:
        The names of the packages' files, which also the file ``packages`` in `root` lists.

    Raises:
        UntestableError: the archive cannot be reached.
    """
    archive = root / "archive"
    found = Archive(suite, archive).fetch_closure(packages)
    for package in found:
        unpack(package, root)
    shutil.rmtree(archive)
    for name, target in links.items():
        link = root / name
        if not link.is_symlink():
            link.symlink_to(target)
    for name in _MOUNT_POINTS:
        (root / name).mkdir(exist_ok=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    names = [package.name for package in found]
    (root / "packages").write_text("".join(f"{name}\n" for name in names))
    return names


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
        *("sh", "-ec", _ENTER, "sh", str(root), str(mounted)),
        *(("", "", "") if source is None else (str(source), SOURCE, _options(source))),
        *(f"{name}={value}" for name, value in variables.items()),
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
