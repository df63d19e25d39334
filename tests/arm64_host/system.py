"""The root file system of the emulated arm64 machine: Debian's packages and Python's wheels.

Nothing of it runs on this machine: the packages are unpacked without their maintainer scripts, and
pip chooses the wheels by their names. What the scripts would have set up is written here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError
from dmaproof.units import div_ceil
from qmp_tools.host.archive import Archive
from qmp_tools.host.cached_folder import digest, fresh_folder, prune
from support.debian_tree import kept_folder

SUITE: Final = "trixie"
ARCHITECTURE: Final = "arm64"
ROOT: Final = Path(__file__).parents[2]
_PYTHON: Final = "3.13"
"""The version of Python in the suite."""
_PACKAGES: Final = (
    "?essential",
    "busybox-static",
    "gcc",
    "libc6-dev",
    "libpython3-dev",
    "meson",
    "mount",
    "procps",
    "python3",
    "qemu-system-arm",
    "qemu-utils",
)
_TEST_REQUIREMENTS: Final = (
    "hypothesis",
    "jsonschema",
    "markdown-it-py",
    "meson-python",
    "mypy",
    "pip",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "pyyaml",
)
_PLATFORMS: Final = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
_SITE: Final = Path(f"usr/local/lib/python{_PYTHON}/dist-packages")
_MERGED: Final = ("bin", "lib", "sbin")
"""The folders that are links into /usr."""
_FREE_BYTES: Final = 2 << 30
_TIMEOUT_S: Final = 900.0

_ETC: Final = {
    "hostname": "arm64\n",
    "hosts": "127.0.0.1 localhost arm64\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


def system_image() -> Path:
    """Return the image of the root file system (ext4); build it if this is the first use.

    Raises:
        UntestableError: the archive cannot be reached, or a program is missing.
    """
    requirements = (*_requirements(), *_TEST_REQUIREMENTS)
    parts = [Path(__file__).read_bytes(), *(each.encode() for each in requirements)]
    target = kept_folder() / f"arm64_system-{digest(parts)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _build(fresh, requirements)
    return prune(target) / "image"


def _requirements() -> list[str]:
    """Return what dmaproof and its plugins for avocado require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    plugins = [each for each in extras["avocado-vt"] if not each.startswith(f"{project['name']}[")]
    return [*project["dependencies"], *extras["avocado"], *plugins]


def _build(folder: Path, requirements: tuple[str, ...]) -> None:
    tree = folder / "tree"
    for name in _MERGED:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    archive = Archive(SUITE, folder / "apt", ARCHITECTURE)
    for package in archive.fetch_closure(_PACKAGES):
        _unpack(package, tree)
    _set_up(tree)
    _install(requirements, tree / _SITE)
    _make_image(tree, folder / "image")
    shutil.rmtree(folder / "apt")
    shutil.rmtree(tree)


def _unpack(package: Path, tree: Path) -> None:
    """Unpack a .deb; unlike `dpkg-deb -x`, leave a folder's link into /usr as it is."""
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
    ) as content:
        run("tar", "-C", tree, "-x", "--keep-directory-symlink", stdin=content.stdout)
    if content.returncode:
        raise UntestableError(f"dpkg-deb cannot unpack {package}")


def _set_up(tree: Path) -> None:
    """Do what the maintainer scripts of the packages would do, as far as the tests need it."""
    for name in ("passwd", "group"):
        shutil.copy(tree / f"usr/share/base-passwd/{name}.master", tree / "etc" / name)
    for name, content in _ETC.items():
        (tree / "etc" / name).write_text(content)
    (tree / "usr/bin/cc").symlink_to("gcc")
    for name in ("dev", "proc", "root", "run", "sys", "tmp"):
        (tree / name).mkdir(exist_ok=True)


def _install(requirements: tuple[str, ...], site: Path) -> None:
    platforms = [f"--platform={platform}" for platform in _PLATFORMS]
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", site),
        *platforms,
        *("--implementation=cp", f"--python-version={_PYTHON}", "--only-binary=:all:"),
        *requirements,
    )


def _make_image(tree: Path, image: Path) -> None:
    used = sum(file.lstat().st_blocks * 512 for file in tree.rglob("*"))
    mib = div_ceil(used * 5 // 4 + _FREE_BYTES, 1 << 20)
    # The kernel's driver loads the module for checksums with a program, which the initramfs lacks.
    options = ("-t", "ext4", "-O", "^metadata_csum,^has_journal", "-E", "lazy_itable_init=1")
    run(
        "mke2fs", "-q", *options, "-d", tree, image, f"{mib}M", PATH=f"/usr/sbin:/sbin:{os.defpath}"
    )


def run(*command: str | Path, stdin: object = subprocess.DEVNULL, **variables: str) -> None:
    """Run a command of this machine.

    Raises:
        UntestableError: it is not installed, or it fails.
    """
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables},
            stdin=stdin,  # type: ignore[call-overload]
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise UntestableError(f"{command[0]} is not installed") from None
    if done.returncode:
        raise UntestableError(f"{command[0]} ended with exit code {done.returncode}: {done.stderr}")
