"""Fetch the kernel package of the machine's distribution, also for another architecture."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..arch import host_architecture
from ..arch.architecture import Architecture
from ..host import archive
from ..host.cached_folder import digest, fresh_folder
from .build import cache
from .drivers import ALL_MODULES
from .installed_kernels import installed_images
from .kernel import Kernel, unpack_image, unpacked_image
from .modules import Modules, find_modules

_logger = logging.getLogger(__name__)

_PARTS: Final = ("linux-image-", "linux-binary-", "linux-modules-", "linux-base-")
"""Debian 12 and 13 have a kernel in one package. Newer Debian releases have four, and Ubuntu has
its modules in one or two of their own."""
_UBUNTU: Final = ("linux-image-virtual", "linux-image-generic")
"""The first has the virtio drivers and is a third of the size of the second."""
_CONFIG: Final = "config"
_MODULES: Final = "modules"
_ORIGIN: Final = "origin"


@dataclass(frozen=True)
class _Source:
    """A package of a suite; of the machine's own release if `suite` is None."""

    package: str
    suite: str | None
    architecture: Architecture

    @property
    def folder(self) -> Path:
        """The cached kernel, which may not exist yet."""
        release = archive.own_release()
        own = f"{release.ids[0]} {release.codename}"
        made_of = " ".join((self.package, self.suite or own, *ALL_MODULES))
        return cache() / f"kernel-package-{self.architecture.debian}-{digest([made_of.encode()])}"

    def __str__(self) -> str:
        return f"{self.package}{f' of {self.suite}' if self.suite else ''}"


def package_kernels(
    architecture: Architecture, page_bytes: int | None, failures: list[str] | None
) -> Iterator[Kernel]:
    """Yield the kernels of the distribution's packages: cached ones first, then fetched ones.

    Each is fetched when its turn comes.

    Args:
        architecture: the guest's architecture.
        page_bytes: the size of the kernel's pages; None is the architecture's usual one.
        failures: receives why a kernel could not be fetched; with None, nothing is fetched.

    Raises:
        UntestableError: the cache is not writable.
    """
    sources = list(_sources(architecture, page_bytes))
    cached = [source for source in sources if source.folder.is_dir()]
    yield from map(_cached, cached)
    if failures is None:
        return
    if not sources:
        failures.append(
            f"no package with a kernel for {architecture.name} has pages of {page_bytes} bytes"
        )
    found = bool(cached)
    for source in sources:
        # A newer release is searched only for a package that the machine's own does not have.
        if source in cached or (found and source.suite is not None):
            continue
        try:
            with fresh_folder(source.folder) as fresh:
                if fresh is not None:
                    _fill(fresh, source)
        except _NoPackageError as error:
            failures.append(f"package {source}: {error}")
            continue
        found = True
        yield _cached(source)


def fetchable_package(architecture: Architecture) -> str | None:
    """Return the package that `package_kernels` would fetch; None if apt has none.

    For another architecture than the machine's, apt has to fetch its lists before it knows.
    """
    for source in _sources(architecture, None):
        try:
            if architecture is host_architecture() and source.suite is None:
                archive.dependencies(source.package)
            else:
                archive.own_origin()
        except UntestableError:
            continue
        return str(source)
    return None


def _sources(architecture: Architecture, page_bytes: int | None) -> list[_Source]:
    usual = next(iter(architecture.kernels))
    if archive.own_release().is_ubuntu:
        names = _UBUNTU if page_bytes in (None, usual) else ()
        return [_Source(name, None, architecture) for name in names]
    package = architecture.kernels.get(page_bytes or usual)
    if package is None:
        return []
    suites = [None] if package.oldest_release is None else [None, package.oldest_release]
    return [_Source(package.name, suite, architecture) for suite in suites]


def _cached(source: _Source) -> Kernel:
    folder = source.folder
    unpacked = unpacked_image(folder)
    config = folder / _CONFIG
    modules = Modules(unpacked.version, folder / _MODULES, config if config.is_file() else None)
    origin = (folder / _ORIGIN).read_text()
    return Kernel(unpacked.image, modules, unpacked.page_bytes, origin)


class _NoPackageError(UntestableError):
    """A package that cannot be used, in contrast to a cache that cannot be written."""


def _fill(fresh: Path, source: _Source) -> None:
    try:
        _fill_from_package(fresh, source)
    except UntestableError as error:
        raise _NoPackageError(str(error)) from error


def _fill_from_package(fresh: Path, source: _Source) -> None:
    downloads = fresh / "downloads"
    downloads.mkdir()
    system = fresh / "system"
    names = []
    for name, package in _fetch(source, downloads):
        archive.unpack(package, system)
        names.append(name)
    image = next(iter(installed_images(system)), None)
    if image is None:
        raise UntestableError(
            f"{', '.join(names)} of the distribution's archive: no kernel (vmlinuz) is in these "
            "packages"
        )
    unpack_image(image.read_bytes(), image, source.architecture.name, fresh)
    modules = find_modules(unpacked_image(fresh).version, image, system)
    modules.pick(ALL_MODULES, fresh / _MODULES)
    if modules.config is not None and modules.config.is_relative_to(system):
        shutil.copyfile(modules.config, fresh / _CONFIG)
    own = [name for name in names if name.startswith("linux-image-")]
    (fresh / _ORIGIN).write_text(
        f"package {own[-1]}{f' of {source.suite}' if source.suite else ''}"
    )
    for folder in (downloads, system):
        shutil.rmtree(folder)


def _fetch(source: _Source, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the names and files of a package and of the packages with its kernel's parts."""
    depends: Callable[[str], list[str]]
    fetch: Callable[[str], Path]
    if source.suite is None and source.architecture is host_architecture():
        depends, fetch = archive.dependencies, lambda name: archive.fetch_own(name, folder)
    else:
        private = _private_archive(source, folder)
        depends, fetch = private.dependencies, private.fetch
    names = [source.package]
    for name in names:  # grows
        parts = [part for part in depends(name) if part.startswith(_PARTS)]
        names += [part for part in parts if part not in names]
    _logger.info("fetching the guest's kernel (package %s), once", source)
    for name in names:
        yield name, fetch(name)


def _private_archive(source: _Source, folder: Path) -> archive.Archive:
    origin = archive.own_origin() if source.suite is None else archive.DEBIAN
    suite = source.suite or archive.own_codename(origin)
    debian = source.architecture.debian
    try:
        return archive.Archive(suite, folder, debian, origin=origin)
    except UntestableError as error:
        # A mirror may have the updates of an architecture only in part.
        _logger.info("%s; trying without the updates of the release", error)
        return archive.Archive(suite, folder, debian, origin=origin, pockets=False)
