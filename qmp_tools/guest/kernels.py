"""Choose the kernel of the Linux guest: a given one, the host's own, or the distribution's package.

The host's own kernel needs neither a network nor apt, so any Linux host with a readable kernel will
do. Ubuntu lets only root read its kernels.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError, UsageError

from ..arch import host_architecture
from ..arch.architecture import Architecture
from .drivers import VIRTIO_BLK
from .installed_kernels import installed_images
from .kernel import Kernel, kernel_of_file
from .kernel_build import built_kernel
from .kernel_package import fetchable_package, package_kernels

_logger = logging.getLogger(__name__)

_ROOT: Final = Path("/")


@dataclass(frozen=True)
class KernelFiles:
    """The user's choice: a kernel's file, and a folder with its modules or above lib/modules."""

    image: Path
    modules: Path | None = None


def find_kernel(
    architecture: Architecture,
    wanted: Sequence[str],
    given: KernelFiles | None = None,
    page_bytes: int | None = None,
    *,
    root: Path = _ROOT,
) -> Kernel:
    """Return the kernel of the Linux guest, which has the `wanted` modules.

    Args:
        architecture: the guest's architecture.
        wanted: the modules that the guest's device needs.
        given: the user's kernel. By default, the first usable of the host's own kernels, if the
            guest's architecture is the host's, and of the distribution's packages.
        page_bytes: the size of the kernel's pages; None is any size.
        root: the host's root folder.

    Raises:
        UsageError: a file or folder of `given` does not exist, or has no modules of this kernel.
        UntestableError: no kernel can be had, or the given one lacks a module, or has pages of
            another size.
    """
    search = _Search(architecture, wanted, page_bytes, root)
    if given is None:
        kernel = search.first(fetch=True)
    else:
        kernel = given_kernel(given, architecture.name)
        if (reason := search.why_unusable(kernel)) is not None:
            raise UntestableError(reason)
    if kernel is None:
        raise UntestableError(search.explanation())
    _logger.info("the guest's kernel is %s", kernel)
    return kernel


@dataclass(frozen=True)
class KernelSource:
    """Where a proof's kernel comes from; `is_fetched` if it is on this machine already."""

    text: str
    is_fetched: bool


def kernel_source(architecture: Architecture, *, root: Path = _ROOT) -> KernelSource:
    """Return which kernel `find_kernel` would choose for a virtio disk; fetch nothing.

    Raises:
        UntestableError: no kernel can be had; the message says why.
    """
    search = _Search(architecture, VIRTIO_BLK.modules, None, root)
    kernel = search.first(fetch=False)
    if kernel is not None:
        return KernelSource(str(kernel), is_fetched=True)
    package = fetchable_package(architecture)
    if package is None:
        raise UntestableError(search.explanation())
    return KernelSource(f"package {package}", is_fetched=False)


def given_kernel(given: KernelFiles, architecture: str) -> Kernel:
    """Return the kernel in the user's files.

    Raises:
        UsageError: a file or folder does not exist, or the folder has no modules of this kernel.
        UntestableError: the file is not a kernel for this architecture.
    """
    image, modules = given.image, given.modules
    try:
        if not image.is_file():
            raise UsageError(f"--kernel {image}: not found, or not a regular file")
        if modules is not None:
            _require_folder(modules)
        kernel = kernel_of_file(image, architecture, modules=modules, origin=f"--kernel {image}")
    except PermissionError:
        raise UsageError(
            f"--kernel {image}: this user may not read the file: {_remedy(image)}"
        ) from None
    except OSError as error:
        raise UntestableError(f"--kernel {image}: {error.strerror}; use another file") from error
    if kernel.modules.folder is None:
        if modules is not None:
            raise UsageError(
                f"--modules {modules}: no modules of kernel {kernel.version}: expected files "
                f"*.ko and modules.builtin there, or in lib/modules/{kernel.version} below it"
            )
        _logger.info(
            "no modules of kernel %s were found: only drivers that are built in can be used; give "
            "a folder with --modules",
            kernel.version,
        )
    return kernel


def _require_folder(modules: Path) -> None:
    try:
        if not modules.is_dir():
            raise UsageError(f"--modules {modules}: not found, or not a folder")
        next(modules.iterdir(), None)
    except PermissionError:
        raise UsageError(
            f"--modules {modules}: this user may not read the folder: run 'sudo chmod -R a+rX "
            f"{modules}', or run dmaproof as root"
        ) from None


def _remedy(image: Path) -> str:
    return f"run 'sudo chmod a+r {image}', or run dmaproof as root"


@dataclass
class _Search:
    """A search for a kernel that the guest can boot; `reasons` say why others were skipped."""

    architecture: Architecture
    wanted: Sequence[str]
    page_bytes: int | None
    root: Path
    reasons: list[str] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    def first(self, *, fetch: bool) -> Kernel | None:
        """Return the first usable kernel; `fetch` allows to fetch packages."""
        packages = package_kernels(
            self.architecture, self.page_bytes, self.reasons if fetch else None
        )
        built = self._built_kernels() if fetch else ()
        for kernel in itertools.chain(self._host_kernels(), packages, built):
            reason = self.why_unusable(kernel)
            if reason is None:
                return kernel
            self._skip(f"{kernel.origin}: {reason}")
        return None

    def why_unusable(self, kernel: Kernel) -> str | None:
        """Return why the guest cannot use `kernel`; None if it can."""
        if self.page_bytes is not None and kernel.page_bytes not in (None, self.page_bytes):
            return (
                f"the kernel {kernel.version} has pages of {kernel.page_bytes} bytes, not of "
                f"{self.page_bytes}"
            )
        try:
            kernel.modules.load_order(self.wanted)
        except UntestableError as error:
            return str(error)
        return None

    def _host_kernels(self) -> Iterator[Kernel]:
        if self.architecture is not host_architecture():
            return
        for image in installed_images(self.root, os.uname().release):
            try:
                kernel = kernel_of_file(image, self.architecture.name, origin=f"the host's {image}")
            except PermissionError:
                self.unreadable.append(image)
                self._skip(f"{image}: this user may not read it")
            except (OSError, UntestableError) as error:
                self._skip(str(error))
            else:
                if kernel.modules.folder is None:
                    self._skip(f"{image}: no modules of kernel {kernel.version} were found")
                else:
                    yield kernel

    def _built_kernels(self) -> Iterator[Kernel]:
        """Yield the kernel that dmaproof builds, if no distribution packages such pages."""
        if self.page_bytes is None:
            return
        try:
            kernel = built_kernel(self.architecture, self.page_bytes)
        except UntestableError as error:
            self._skip(str(error))
            return
        if kernel is not None:
            yield kernel

    def _skip(self, reason: str) -> None:
        self.reasons.append(reason)
        _logger.info("skipped a kernel: %s", reason)

    def explanation(self) -> str:
        """Return why there is no kernel, and what to do."""
        reasons = "".join(f"\n    {reason}" for reason in self.reasons)
        readable = f"{_remedy(self.unreadable[0])}; or " if self.unreadable else ""
        has_bare = "bare" in self.architecture.guests and self.page_bytes is None
        bare = "; or use --guest bare" if has_bare else ""
        return (
            f"no kernel for the Linux guest on {self.architecture.name}: neither a kernel of this "
            f"host nor a package of its distribution can be used; {readable}give a kernel with "
            "--kernel FILE --modules DIR; or, where the distribution has apt, check the network "
            f"and run 'apt-get update' as root{bare}{':' if reasons else ''}{reasons}"
        )
