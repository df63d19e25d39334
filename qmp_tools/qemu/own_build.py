"""Build QEMU on this machine: the distribution's source with patches, or the user's own tree.

The compiler and the libraries are those of a suite of the distribution, in an unpacked root file
system (`host.unpacked_root`). The result is like a fetched QEMU (`builds`): the suite's own QEMU
with firmware and libraries, in which the programs are replaced.

The distribution's source is unpacked, patched with its own patches and compiled once for each
version, in the cache. A build with the user's patches begins with a copy of this tree, so it
compiles only what the patches change. The user's own tree has a folder in the cache, in which it is
compiled again each time.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from ..arch.architecture import Architecture
from ..host.archive import Archive
from ..host.cached_folder import changed_folder, digest, fresh_folder, prune
from ..host.source_package import SourcePackage, read_source_package
from ..host.unexpected import writing_to
from ..host.unpacked_root import SOURCE, run_inside, unpack_root
from ..host.user_folders import cache_folder
from .builds import (
    REMEDY,
    QemuBuild,
    find_suite,
    finish,
    home,
    installed,
    new_build,
    own_builds,
    unpack_qemu,
)

_logger = logging.getLogger(__name__)

TOOLS_SUITE: Final = "trixie"
"""The suite whose compiler and libraries build the user's own tree, unless another is named."""
BUILD_TIMEOUT_S: Final = 3 * 3600.0
_SHORT_S: Final = 600.0
_MADE_OF_FILE: Final = "made-of"
_CACHE_REMEDY: Final = "set XDG_CACHE_HOME to a writable folder with enough space"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PACKAGES: Final = (
    *("coreutils", "dash", "libc-bin", "mount", "gcc", "libc6-dev", "bash", "sed", "grep", "gzip"),
    *("findutils", "diffutils", "perl-base", "tar", "xz-utils", "mawk", "patch", "make", "flex"),
    *("bison", "python3", "python3-venv", "python3-pip", "python3-setuptools", "meson"),
    *("ninja-build", "pkgconf", "libglib2.0-dev", "zlib1g-dev", "libzstd-dev", "libgnutls28-dev"),
    *("libpixman-1-dev", "libaio-dev", "libnuma-dev", "libseccomp-dev", "libfdt-dev"),
    *("libattr1-dev", "libcap-ng-dev"),
)
_LINKS: Final = {"usr/bin/cc": "gcc", "usr/bin/awk": "mawk"}
_OPTIONS: Final = (
    *("--without-default-features", "--disable-download", "--disable-docs", "--disable-werror"),
    *("--disable-debug-info", "--disable-install-blobs", "--disable-user", "--enable-system"),
    *("--enable-tools", "--enable-tcg", "--enable-kvm", "--enable-pixman", "--enable-gnutls"),
    *("--enable-zstd", "--enable-linux-aio", "--enable-numa", "--enable-seccomp"),
    *("--enable-fdt=system", "--enable-vhost-kernel", "--enable-vhost-net", "--enable-vhost-user"),
    *("--enable-vhost-vdpa", "--enable-vhost-crypto", "--enable-vhost-user-blk-server"),
    *("--enable-virtfs", "--enable-attr", "--enable-cap-ng", "--enable-malloc-trim"),
    *("--enable-coroutine-pool", "--audio-drv-list="),
)
"""What dmaproof's proofs use, and the nested machine's file systems (virtfs).

Options that a version does not know are left out.
"""
_TOOLS: Final = {
    "qemu-img": "qemu-img",
    "qemu-storage-daemon": "storage-daemon/qemu-storage-daemon",
}
"""The programs besides the emulator, and make's names for them."""

_UNPACK: Final = """\
mkdir source
tar -xf package/$ORIGINAL -C source --strip-components=1
tar -xf package/$PACKAGING -C source
cd source
grep -v -e '^#' -e '^$' debian/patches/series | while read -r patch options; do
    patch -p1 -s -F0 --no-backup-if-mismatch <debian/patches/$patch >&2
done
rm -rf roms/*
"""
"""The sources of the firmware are the largest part of QEMU's, and are not compiled."""
_APPLY: Final = "cd /mnt/source && patch -p1 -s -F0 --no-backup-if-mismatch </mnt/applied >&2"
_CONFIGURE: Final = """\
mkdir -p build && cd build
[ ! -f configured ] || [ "$(cat configured)" != "$OPTIONS" ] || exit 0
known=$($SOURCE/configure --help)
options=
for option in $OPTIONS; do
    name=${option#--}
    name=${name#enable-} name=${name#disable-}
    case $known in *"${name%%=*}"*) options="$options $option" ;; esac
done
$SOURCE/configure $options >configure.log 2>&1 || { tail -n 12 configure.log >&2; exit 1; }
echo "$OPTIONS" >configured
"""
_COMPILE: Final = """\
cd build
make -j"$JOBS" $GOALS >make.log 2>&1 || { grep -m 6 -e 'error:' -e Error make.log >&2; exit 1; }
"""


@dataclass(frozen=True)
class _Tree:
    """A folder with the subfolder ``build``, and ``source`` unless the source is elsewhere."""

    folder: Path
    source: Path | None = None

    def compile(self, root: Path, architecture: Architecture) -> None:
        """Configure and compile QEMU; what is up to date is not compiled again.

        Raises:
            UntestableError: this fails; the message has the errors.
        """
        target = architecture.qemu_program.removeprefix("qemu-system-")
        options = " ".join((f"--target-list={target}-softmmu", *_OPTIONS))
        goals = " ".join((architecture.qemu_program, *_TOOLS.values()))
        where = "/mnt/source" if self.source is None else SOURCE
        self._run(root, _CONFIGURE, "configuring QEMU", SOURCE=where, OPTIONS=options)
        jobs = str(len(os.sched_getaffinity(0)))
        self._run(root, _COMPILE, "building QEMU", GOALS=goals, JOBS=jobs)

    def _run(self, root: Path, script: str, what: str, **variables: str) -> None:
        whole, bound = f"cd /mnt\n{script}", BUILD_TIMEOUT_S
        run_inside(root, self.folder, whole, what, bound, source=self.source, **variables)

    def programs(self, architecture: Architecture) -> Iterator[Path]:
        """Yield the compiled programs."""
        for goal in (architecture.qemu_program, *_TOOLS.values()):
            yield self.folder / "build" / goal


def build_patched(
    wanted: str, architecture: Architecture, patches: Sequence[Path], name: str | None = None
) -> QemuBuild:
    """Build the distribution's QEMU of a suite or a version, with `patches`.

    A build that exists already, of the same source and patches, is not made again.

    Args:
        wanted: as for `builds.fetch`.
        architecture: the architecture of the guests.
        patches: files that are applied in this order with ``patch -p1``.
        name: the name of the build; None is 'patched', or 'built' without patches.

    Raises:
        UsageError: a patch cannot be read or does not apply, or the name is not a valid one.
        UntestableError: the source cannot be fetched or built here.
    """
    name = _checked_name(name or ("patched" if patches else "built"))
    contents = [_content(patch) for patch in patches]
    with writing_to(home(architecture), REMEDY), new_build(architecture) as fresh:
        archive, version = find_suite(wanted, architecture, fresh.parent)
        described = QemuBuild(
            f"{version}+{name}", archive.suite, Path(), tuple(patch.name for patch in patches)
        )
        root = _tools(archive.suite)
        package = _source(archive)
        made_of = digest([package.digest.encode(), root.name.encode(), *contents])
        existing = _existing(described, architecture)
        if existing is not None and _made_of(existing) == made_of:
            return existing
        base = _base_tree(package, version, root, architecture)
        with _patched(base, dict(zip(patches, contents, strict=True)), version, root) as tree:
            if patches:
                tree.compile(root, architecture)
            return _install(archive, architecture, tree, fresh, described, made_of)


def build_own(
    source: Path, architecture: Architecture, suite: str | None = None, name: str | None = None
) -> QemuBuild:
    """Build the QEMU in the folder `source`, which is not changed.

    Args:
        source: the folder, with ``configure``.
        architecture: the architecture of the guests.
        suite: as `wanted` for `builds.fetch`: the suite with compiler, libraries and firmware.
        name: the name of the build; None is 'own'.

    Raises:
        UsageError: the folder is not QEMU's source, or the name is not a valid one.
        UntestableError: the source cannot be built here.
    """
    name = _checked_name(name or "own")
    version = _version_of(source)
    with writing_to(home(architecture), REMEDY), new_build(architecture) as fresh:
        archive, _ = find_suite(suite or TOOLS_SUITE, architecture, fresh.parent)
        root = _tools(archive.suite)
        described = QemuBuild(f"{version}+{name}", archive.suite, Path())
        place = os.fsencode(source.resolve())
        kept = digest([place, root.name.encode(), architecture.name.encode()])
        folder = _cache() / f"own-{kept}"
        with changed_folder(folder):
            _logger.info("building QEMU %s in %s", version, source)
            tree = _Tree(folder, source.resolve())
            tree.compile(root, architecture)
            return _install(archive, architecture, tree, fresh, described, kept)


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name}: expected letters, digits, '.', '_' and '-', first a letter or a digit"
        )
    return name


def _content(patch: Path) -> bytes:
    try:
        return patch.read_bytes()
    except OSError as error:
        raise UsageError(f"--patch {patch}: {os.strerror(error.errno or 0)}") from None


def _version_of(source: Path) -> str:
    missing = [name for name in ("configure", "VERSION") if not (source / name).is_file()]
    if missing:
        raise UsageError(
            f"--source {source}: this is not QEMU's source: {' and '.join(missing)} not found"
        )
    version = (source / "VERSION").read_text().strip()
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        raise UsageError(
            f"--source {source}: expected a version such as 11.1.50 in the file VERSION, found "
            f"{version!r}"
        )
    return version


def _cache() -> Path:
    return cache_folder() / "qemu"


def _tools(suite: str) -> Path:
    """Fetch the root file system with the compiler, or take it from the cache; return its folder.

    Raises:
        UntestableError: the archive cannot be reached.
    """
    recipe = "\n".join((suite, *_PACKAGES, *_LINKS)).encode()
    target = _cache() / f"tools-{suite}-{digest([recipe])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("fetching the compiler of %s (first use only)", suite)
                unpack_root(fresh, suite, _PACKAGES, _LINKS)
    return prune(target)


def _source(archive: Archive) -> SourcePackage:
    _logger.info("fetching the source of QEMU from %s", archive.suite)
    return read_source_package(archive.fetch_source("qemu"))


def _base_tree(
    package: SourcePackage, version: str, root: Path, architecture: Architecture
) -> _Tree:
    """Compile the distribution's source without the user's patches, or take it from the cache."""
    made_of = (package.digest, root.name, architecture.name, _UNPACK, _CONFIGURE, *_OPTIONS)
    key = digest(["\n".join(made_of).encode()])
    target = _cache() / f"tree-{architecture.name}-{key}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _logger.info("unpacking QEMU %s", version)
                shutil.copytree(package.original.parent, fresh / "package")
                run_inside(
                    root,
                    fresh,
                    f"cd /mnt\n{_UNPACK}",
                    "unpacking QEMU",
                    _SHORT_S,
                    ORIGINAL=package.original.name,
                    PACKAGING=package.packaging.name,
                )
                shutil.rmtree(fresh / "package")
                _logger.info("building QEMU %s (first use only; 10 to 30 minutes)", version)
                _Tree(fresh).compile(root, architecture)
    return _Tree(prune(target))


@contextmanager
def _patched(
    base: _Tree, patches: Mapping[Path, bytes], version: str, root: Path
) -> Iterator[_Tree]:
    """Yield the tree with `patches`: a copy of `base`, which exists only meanwhile."""
    if not patches:
        yield base
        return
    with (
        writing_to(_cache(), _CACHE_REMEDY),
        tempfile.TemporaryDirectory(prefix="patched-", dir=_cache()) as temporary,
    ):
        copy = Path(temporary) / "tree"
        shutil.copytree(base.folder, copy, symlinks=True)
        for patch, content in patches.items():
            _logger.info("applying %s", patch.name)
            (copy / "applied").write_bytes(content)
            try:
                run_inside(root, copy, _APPLY, f"applying {patch.name}", _SHORT_S)
            except UntestableError as error:
                raise UsageError(
                    f"--patch {patch}: the patch does not apply to QEMU {version}: {error}"
                ) from None
        yield _Tree(copy)


def _existing(described: QemuBuild, architecture: Architecture) -> QemuBuild | None:
    own = own_builds(architecture)
    return next((build for build in own if build.version == described.version), None)


def _made_of(build: QemuBuild) -> str:
    file = build.path.parent / _MADE_OF_FILE
    return file.read_text() if file.exists() else ""


def _install(
    archive: Archive,
    architecture: Architecture,
    tree: _Tree,
    fresh: Path,
    described: QemuBuild,
    made_of: str,
) -> QemuBuild:
    """Make a build of the programs in `tree`, with the libraries and firmware of the suite."""
    known = [*installed(architecture), *own_builds(architecture)]
    donor = next((build for build in known if build.suite == archive.suite), None)
    if donor is None:
        _logger.info("fetching libraries and firmware from %s", archive.suite)
        unpack_qemu(archive, architecture, fresh)
    else:
        shutil.copytree(
            donor.path.parent / "root", fresh / "root", symlinks=True, copy_function=os.link
        )
    for program in tree.programs(architecture):
        place = fresh / "root/usr/bin" / program.name
        place.unlink(missing_ok=True)  # it may be a link to the file of another build
        shutil.copy(program, place)
    (fresh / _MADE_OF_FILE).write_text(made_of)
    return finish(fresh, described, architecture)
