"""Trees that model other distributions, each with a package manager that records its command lines.

All models are made from one Debian 13 system that has every package of a proof, and in which
dmaproof is built. In a model, the files that a package provides are set aside, and the model's
package manager moves them into place when it is asked for the package by its right name. What
differs between distributions is modelled: os-release, the shell, the names of packages, and the
place, mode and compression of the kernel and its modules. Debian's own package programs are
removed. The model of Ubuntu keeps them, and has an archive of Ubuntu with small packages.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from support import checkout
from support.debian_tree import VARIABLES, Tree, fresh_tree, kept_folder, with_pip

CHECKOUT: Final = Path("/srv/dmaproof")
_SUITE: Final = "trixie"
_TIMEOUT_S: Final = 900.0
_REQUESTS: Final = "var/log/requests"
_ASIDE: Final = "packages"
_DEBIAN: Final = ("usr/bin/apt*", "usr/bin/dpkg*", "etc/apt", "var/lib/dpkg", "var/log/apt")
"""What a system without Debian's package programs does not have."""

_ORIGIN: Final = "var/lib/made-from"
"""The file of a kept tree that says from what the tree was made."""
_KERNELS: Final = "var/lib/kernels"
_INSTALL: Final = f"""\
apt-get update -qq
apt-get install -qq -y --no-install-recommends \\
    gcc libc6-dev python3 python3-venv python3-dev qemu-system-x86 busybox kmod xz-utils zstd
# A kernel with the modules of a proof, which other distributions compress with xz or zstd.
cd "$(mktemp -d)"
package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: //p')
apt-get download -qq "$package"
dpkg-deb -x "$package"_*.deb .
version=$(basename usr/lib/modules/*)
ln -s usr/lib lib
depmod -b . "$version"
for module in virtio_blk virtio_net; do
    modprobe -d . -S "$version" --show-depends $module
done | awk '/^insmod/ {{ print $2 }}' >modules
for format in xz zst; do
    target=/{_KERNELS}/$format/$version
    mkdir -p "$target"
    cp boot/vmlinuz-* "$target/vmlinuz"
    cp usr/lib/modules/"$version"/modules.builtin* "$target"
    while read -r file; do
        name=${{file##*/}}
        case $format in
            xz) cp "$file" "$target/$name" ;;
            zst) xz -dc "$file" | zstd -q >"$target/${{name%.xz}}.zst" ;;
        esac
    done <modules
done
rm -rf "$PWD"
"""


@dataclass(frozen=True)
class Model:
    """A model of a distribution.

    `shell` is the program of /bin/sh, and `manager` the package manager. `accepts` is a pattern of
    ``case`` in the shell for its command line up to the names of packages; None is apt itself.
    `packages` maps each package to the files that it provides. `modules` is the compression of the
    kernel's modules, and `in_boot` says whether the kernel is in /boot, where only root may read
    it, or beside its modules. `kernel_package` is the package that provides both, if they are not
    installed.
    """

    os_release: str
    shell: str
    manager: str
    accepts: str | None
    packages: Mapping[str, Sequence[str]]
    modules: str
    in_boot: bool = False
    kernel_package: str | None = None


_PYTHON: Final = ("usr/bin/python3", "usr/bin/python3.13")
_HEADERS: Final = ("usr/include/python3.13/Python.h",)
_COMPILER: Final = ("usr/bin/cc",)
_LIBC: Final = ("usr/lib/x86_64-linux-gnu/libc.a",)
_START_FILES: Final = ("usr/lib/x86_64-linux-gnu/crt1.o",)
_QEMU: Final = ("usr/bin/qemu-system-x86_64",)

MODELS: Final = {
    "fedora": Model(
        os_release='PRETTY_NAME="Fedora Linux 43 (Server Edition)"\nID=fedora\n',
        shell="bash",
        manager="dnf",
        accepts="'install -y '*",
        packages={
            "python3": _PYTHON,
            "python3.13-devel": _HEADERS,
            "gcc": (*_COMPILER, *_START_FILES),
            "glibc-static": _LIBC,
            "qemu-system-x86-core": _QEMU,
        },
        modules="xz",
    ),
    # As a container: it has neither package databases nor a kernel.
    "arch": Model(
        os_release='PRETTY_NAME="Arch Linux"\nID=arch\n',
        shell="bash",
        manager="pacman",
        accepts="'-Syu --noconfirm --needed '*",
        packages={
            "python": (*_PYTHON, *_HEADERS),
            "gcc": _COMPILER,
            "qemu-system-x86": _QEMU,
        },
        modules="zst",
        kernel_package="linux",
    ),
    "opensuse": Model(
        os_release=(
            'PRETTY_NAME="openSUSE Tumbleweed"\nID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n'
        ),
        shell="bash",
        manager="zypper",
        accepts="'install -y --no-recommends '*",
        packages={
            "python3": _PYTHON,
            "python313-devel": _HEADERS,
            "gcc": _COMPILER,
            "glibc-devel": _START_FILES,
            "glibc-devel-static": _LIBC,
            "qemu-x86": _QEMU,
        },
        modules="zst",
    ),
    "ubuntu": Model(
        os_release=(
            'PRETTY_NAME="Ubuntu 24.04.3 LTS"\nID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n'
        ),
        shell="dash",
        manager="apt-get",
        accepts=None,
        packages={
            "python3": _PYTHON,
            "python3-venv": ("usr/lib/python3.13/ensurepip/__init__.py",),
            "python3.13-dev": _HEADERS,
            "gcc": _COMPILER,
            "libc6-dev": (*_LIBC, *_START_FILES),
            "qemu-system-x86": _QEMU,
        },
        modules="zst",
        in_boot=True,
    ),
    # dmaproof does not know its packages.
    "alpine": Model(
        os_release='PRETTY_NAME="Alpine Linux v3.22"\nID=alpine\n',
        shell="busybox",
        manager="apk",
        accepts="*",
        packages={"qemu-system-x86_64": _QEMU},
        modules="zst",
        in_boot=True,
    ),
}

_MANAGER: Final = """\
#!/bin/sh
echo "{name} $*" >>/{requests}
case "$*" in {accepts}) ;; *) echo "wrong usage: $*" >&2; exit 2 ;; esac
for package; do
    case $package in install | -*) continue ;; esac
    cd "/{aside}/$package" || exit 1
    find . ! -type d | while read -r file; do
        mkdir -p "/$(dirname "$file")"
        mv "$file" "/$file"
    done
done
"""


@contextmanager
def distribution_tree(model: Model) -> Iterator[Tree]:
    """Make a tree that models a distribution without the packages of `model`; remove it at the end.

    The checkout is in the folder `CHECKOUT` of the tree.
    """
    root = _kept() / f"tree-{os.getpid()}"
    try:
        _copy_built_tree(root)
        _write(root / "etc/os-release", model.os_release)
        (root / "usr/bin/sh").unlink()
        (root / "usr/bin/sh").symlink_to(model.shell)
        _add_kernel(root, model)
        _set_aside(root, model)
        if model.accepts is None:
            _add_archive(root, model)
        else:
            for pattern in _DEBIAN:
                _remove(root, pattern)
            _add_manager(root, model)
        yield Tree(root, {}, VARIABLES)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def requests(tree: Tree) -> list[str]:
    """Return the command lines with which the tree's package manager was to install packages."""
    file, history = tree.root / _REQUESTS, tree.root / "var/log/apt/history.log"
    if history.exists():
        return re.findall("^Commandline: (.*)", history.read_text(), re.MULTILINE)
    return file.read_text().splitlines() if file.exists() else []


def _add_kernel(root: Path, model: Model) -> None:
    (modules,) = (root / _KERNELS / model.modules).iterdir()
    target = root / "usr/lib/modules" / modules.name
    if model.kernel_package is not None:
        target = root / _ASIDE / model.kernel_package / "usr/lib/modules" / modules.name
    target.parent.mkdir(parents=True, exist_ok=True)
    modules.rename(target)
    if model.in_boot:
        kernel = root / "boot" / f"vmlinuz-{modules.name}"
        # The mode of a hard link is that of the kept tree's file.
        shutil.copyfile(target / "vmlinuz", kernel)
        (target / "vmlinuz").unlink()
        kernel.chmod(0o600)
    _remove(root, _KERNELS)


def _set_aside(root: Path, model: Model) -> None:
    for package, files in model.packages.items():
        for name in files:
            aside = root / _ASIDE / package / name
            aside.parent.mkdir(parents=True, exist_ok=True)
            (root / name).rename(aside)


def _add_manager(root: Path, model: Model) -> None:
    script = _MANAGER.format(
        name=model.manager, requests=_REQUESTS, accepts=model.accepts, aside=_ASIDE
    )
    _write(root / "usr/bin" / model.manager, script)
    (root / "usr/bin" / model.manager).chmod(0o755)


_APT_STATE: Final = (
    *("var/lib/dpkg/info/*", "var/lib/dpkg/status*", "var/lib/apt/*", "var/cache/apt/*"),
    *("var/log/apt/*", "var/log/dpkg.log", "etc/apt/sources.list*"),
)
_CONTROL: Final = """\
Package: {package}
Version: 1
Architecture: amd64
Maintainer: dmaproof <dmaproof@localhost>
Description: a model of this package
"""
_RELEASE: Final = """\
Origin: Ubuntu
Label: Ubuntu
Suite: noble
Codename: noble
Architectures: amd64
Components: main
SHA256:
 {digest} {size} {index}
"""


def _add_archive(root: Path, model: Model) -> None:
    """Make apt forget what is installed, and give it an archive with the model's packages."""
    for pattern in _APT_STATE:
        _remove(root, pattern)
    (root / "var/lib/dpkg/status").touch()
    archive = root / "var/lib/archive"
    release, index = archive / "dists/noble", "main/binary-amd64/Packages"
    (release / index).parent.mkdir(parents=True)
    stanzas = []
    for package in model.packages:
        control = _CONTROL.format(package=package)
        folder, file = root / _ASIDE / package, archive / f"{package}.deb"
        (folder / "DEBIAN").mkdir()
        (folder / "DEBIAN/control").write_text(control)
        command = ("dpkg-deb", "--root-owner-group", "-Znone", "-b", str(folder), str(file))
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
        facts = f"Filename: {file.name}\nSize: {file.stat().st_size}\n"
        stanzas.append(f"{control}{facts}SHA256: {_sha256(file)}\n")
    (release / index).write_text("\n".join(stanzas))
    size, digest = (release / index).stat().st_size, _sha256(release / index)
    (release / "Release").write_text(_RELEASE.format(digest=digest, size=size, index=index))
    sources = "deb [trusted=yes] file:/var/lib/archive noble main\n"
    (root / "etc/apt/sources.list").write_text(sources)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _remove(root: Path, pattern: str) -> None:
    for path in root.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write(file: Path, text: str) -> None:
    """Write a new file; the old one may be a hard link to a file of the kept tree."""
    file.unlink(missing_ok=True)
    file.write_text(text)


def _copy_built_tree(root: Path) -> None:
    """Make `root` a copy, of hard links, of the system in which dmaproof is built.

    A program in the copy must not write into the files that it finds there.
    """
    cache = _kept()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_leftovers(cache)
        complete, built = cache / "complete", cache / "built"
        if _read(complete / _ORIGIN) != _INSTALL:
            for folder in (complete, built):
                shutil.rmtree(folder, ignore_errors=True)
            _make_complete(complete)
        if _read(built / _ORIGIN) != checkout.digest():
            shutil.rmtree(built, ignore_errors=True)
            _build(complete, built)
        _copy_links(built, root)


def _remove_leftovers(cache: Path) -> None:
    """Remove the trees of processes that were killed; a tree's name ends with the process's id."""
    for tree in cache.glob("*-*"):
        if not Path("/proc", tree.name.rpartition("-")[2]).exists():
            shutil.rmtree(tree, ignore_errors=True)


def _kept() -> Path:
    return kept_folder() / "distributions"


def _read(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def _copy_links(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-al", source, target], check=True, timeout=_TIMEOUT_S)


def _make_complete(complete: Path) -> None:
    with fresh_tree(_SUITE, complete.with_name(f"complete-{os.getpid()}"), {}) as tree:
        _run(tree, "sh", "-ec", _INSTALL, folder=Path("/"))
        _write(tree.root / _ORIGIN, _INSTALL)
        tree.root.rename(complete)


def _build(complete: Path, built: Path) -> None:
    """Copy the complete system, and build dmaproof in it, as './dmaproof doctor' does."""
    root = built.with_name(f"built-{os.getpid()}")
    try:
        _copy_links(complete, root)
        checkout.check_out(root / CHECKOUT.relative_to("/"))
        _run(with_pip(root, {}), "./dmaproof", "doctor", folder=CHECKOUT)
        _write(root / _ORIGIN, checkout.digest())
        root.rename(built)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _run(tree: Tree, *command: str, folder: Path) -> None:
    done = tree.run(*command, folder=folder, timeout_s=_TIMEOUT_S)
    assert done.returncode == 0, done.stdout
