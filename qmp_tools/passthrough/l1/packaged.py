"""The distribution's kernel source, with or without a user's patches, built for L1.

Debian's recent stock kernels have no iommufd and only a stub of the iova_bitmap, so they cannot be
tested. These kernels are allnoconfig plus ``guests/passthrough/kernel.config``.

The source is unpacked and built once without patches, which takes some minutes. Each kernel starts
from hard links to that source and from a copy of that build, so make compiles only what the patches
and dmaproof's own module change. Kernels are cached under a digest of these.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dmaproof.errors import UsageError

from ...guest.build import cache, sources
from ...guest.kernel_build import BUILD_TIMEOUT_S, options_of
from ...host.archive import Archive, unpack
from ...host.cached_folder import digest, fresh_folder, prune
from ...host.unpacked_root import SOURCE, run_inside
from .kernel import CONFIG, KERNELS, MODULE, module_sources
from .tree import BUILD_SELFTESTS, BuiltKernel, build_kernel, build_outside, collect

_logger = logging.getLogger(__name__)

_NOT_BUILT: Final = (
    "*/Documentation/*/*",
    "*/boot/dts/*/*",
    *(f"*/{folder}/*.[ch]" for folder in ("drivers/gpu", "drivers/media", "drivers/staging")),
    *("*/sound/*.[ch]", "*/drivers/net/*/*.c"),  # the selftests include headers of drivers/net
)
"""A third of the source's files. None is built for L1, and no patch of dirty tracking is there."""
_UNPACK: Final = f"""\
tar -xf {SOURCE}/usr/src/linux-source-*.tar.xz --strip-components=1 -C source \\
    {" ".join(f"--exclude='{pattern}'" for pattern in _NOT_BUILT)}
"""
_PATCH: Final = """\
for file in patches/*; do
    if ! patch -d source -p1 -N -f --no-backup-if-mismatch -r - \\
        <"$file" >output 2>&1
    then
        echo "patch -p1 does not apply $(cat "names/${file#patches/}"):" >&2
        tail -n 10 output >&2
        exit 1
    fi
done
"""


def packaged_kernel(root: Path, version: str, patches: Sequence[Path] = ()) -> BuiltKernel:
    """Build the kernel `version`, one of `KERNELS`, with `patches`, or take it from the cache.

    Raises:
        UsageError: a patch cannot be read.
        UntestableError: a patch does not apply, or the kernel cannot be built.
    """
    contents = [_read(patch) for patch in patches]
    origin = f"linux-source-{version}"
    if patches:
        origin += f" with {', '.join(patch.name for patch in patches)}"
    plain = plain_build(root, version)
    module = [part for file in module_sources() for part in (file.name.encode(), file.read_bytes())]
    key = digest([plain.name.encode(), *contents, *module, BUILD_SELFTESTS.encode()])
    kind = f"{version}.patched" if patches else version
    target = cache() / "l1" / f"kernel-{kind}-{key}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _build(root, plain, patches, contents, fresh, origin)
    prune(target)
    return BuiltKernel(target, target / f"{MODULE}.ko", origin if patches else None)


def _read(patch: Path) -> bytes:
    try:
        return patch.read_bytes()
    except OSError as error:
        raise UsageError(
            f"--kernel-patch {patch}: {error.strerror}; give files that 'git format-patch' writes"
        ) from error


def plain_build(root: Path, version: str) -> Path:
    """Return a folder with the source without patches, and with its build.

    Raises:
        UntestableError: the source cannot be fetched or built.
    """
    options = "\n".join(options_of(sources() / "passthrough" / CONFIG)).encode()
    made_of = [options, (root / "packages").read_bytes(), " ".join(_NOT_BUILT).encode()]
    target = cache() / "l1" / f"plain-{version}-{digest(made_of)}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                _build_plain(root, version, fresh)
    return prune(target)


def _build_plain(root: Path, version: str, fresh: Path) -> None:
    package = f"linux-source-{version}"
    _logger.info("fetching %s from %s (first use only)", package, KERNELS[version])
    archive = Archive(KERNELS[version], fresh / "archive")
    unpack(archive.fetch(package), fresh / "package")
    _logger.info("unpacking %s", package)
    (fresh / "source").mkdir()
    _run(root, fresh, _UNPACK, f"unpacking {package}", fresh / "package")
    for name in ("archive", "package"):
        shutil.rmtree(fresh / name)
    build_kernel(root, fresh / "source", fresh, package)


def _build(
    root: Path,
    plain: Path,
    patches: Sequence[Path],
    contents: Sequence[bytes],
    fresh: Path,
    origin: str,
) -> None:
    """Build in `fresh` the source of `plain` with patches; `origin` names it in messages."""
    work = fresh / "work"
    shutil.copytree(plain / "source", work / "source", symlinks=True, copy_function=os.link)
    for folder in ("patches", "names"):
        (work / folder).mkdir()
    for number, (patch, content) in enumerate(zip(patches, contents, strict=True)):
        (work / f"patches/{number:04}").write_bytes(content)
        (work / f"names/{number:04}").write_bytes(os.fsencode(patch))
    if patches:
        _run(root, work, _PATCH, "applying the patches", plain)
    shutil.copytree(plain / "build", work / "build", symlinks=True)
    build_outside(root, work / "source", work, origin)
    collect(work, fresh)
    shutil.rmtree(work)


def _run(root: Path, folder: Path, script: str, what: str, source: Path) -> None:
    run_inside(root, folder, f"cd /mnt\n{script}", what, BUILD_TIMEOUT_S, source=source)
