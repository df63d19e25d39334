"""A kernel that a guest can boot: its image in QEMU's form, and its modules."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

from ..host.cached_folder import digest, fresh_folder, prune
from .build import cache
from .kernel_image import read_kernel_image
from .modules import Modules, find_modules

_logger = logging.getLogger(__name__)

_IMAGE: Final = "image"
_FACTS: Final = "kernel.json"
_FORM: Final = b"1"
"""Changes when a kernel file is unpacked in another way, so that cached images are not used."""


@dataclass(frozen=True)
class Kernel:
    """A kernel; QEMU's ``-kernel`` boots its `image`.

    `page_bytes` is the size of its pages, if it is known. `origin` says in messages and reports
    where the kernel comes from.
    """

    image: Path
    modules: Modules
    page_bytes: int | None
    origin: str

    @property
    def version(self) -> str:
        """The kernel's release (``uname -r``)."""
        return self.modules.version

    def __str__(self) -> str:
        return f"{self.version} ({self.origin})"


@dataclass(frozen=True)
class UnpackedImage:
    """What `unpack_image` has written: the file that QEMU boots, and facts about the kernel."""

    image: Path
    version: str
    page_bytes: int | None


def kernel_of_file(
    file: Path, architecture: str, *, modules: Path | None = None, origin: str
) -> Kernel:
    """Return the kernel in a file of any form that `read_kernel_image` knows.

    Args:
        file: the kernel's file.
        architecture: the guest's architecture, as ``uname -m`` names it.
        modules: the folder with its modules, or a folder above ``lib/modules``; by default, a
            folder for this kernel's version is searched above the file.
        origin: where the kernel comes from.

    Raises:
        OSError: the file cannot be read.
        UntestableError: the file is not a kernel for this architecture, or the cache is not
            writable.
    """
    data = file.read_bytes()
    target = cache() / f"kernel-{architecture}-{digest([_FORM, data])}"
    if not target.is_dir():
        with fresh_folder(target) as fresh:
            if fresh is not None:
                unpack_image(data, file, architecture, fresh)
    unpacked = unpacked_image(_kept(target))
    found = find_modules(unpacked.version, file, modules)
    return Kernel(unpacked.image, found, unpacked.page_bytes, origin)


_kept = functools.cache(prune)


def unpack_image(data: bytes, file: Path, architecture: str, folder: Path) -> None:
    """Write what QEMU boots, from the `data` of a kernel's `file`, into `folder`.

    Raises:
        UntestableError: the file is not a kernel for this architecture.
    """
    image = read_kernel_image(data, str(file), architecture)
    if image.form == "bzImage":
        _logger.info(
            "%s decompresses itself when it boots, which takes seconds more under TCG", file.name
        )
    (folder / _IMAGE).write_bytes(image.content)
    version = image.version or file.name.partition("-")[2] or file.name
    facts = {"version": version, "page_bytes": image.page_bytes}
    (folder / _FACTS).write_text(json.dumps(facts))


def unpacked_image(folder: Path) -> UnpackedImage:
    """Return what `unpack_image` has written into `folder`.

    Raises:
        UntestableError: the folder is damaged.
    """
    try:
        facts = json.loads((folder / _FACTS).read_text())
        return UnpackedImage(folder / _IMAGE, facts["version"], facts["page_bytes"])
    except (OSError, ValueError, KeyError) as error:
        raise UntestableError(
            f"the cached kernel in {folder} is damaged ({error}); remove this folder"
        ) from error
