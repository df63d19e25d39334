"""The disk of a device that is not ours: an image file, every page of it stamped.

Its content does not change from read to read, so the LBA alone tells pages apart. That is enough:
the write-once pages are empty until they are read into, and where a hot page is read into again it is
from another LBA, but for one time in `IMAGE_BYTES` / 4096.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dmaproof.stamp import SECTORS_PER_PAGE, stamped_page
from dmaproof.units import PAGE_BYTES

from ..qemu.machine import option_value

IMAGE_BYTES: Final = 64 << 20
_REQUEST: Final = 1
"""The request number in every stamp: there is no request yet."""


def write_image(path: Path) -> None:
    """Write the image; it is read and written by both sides of a migration, one after the other."""
    with path.open("wb") as image:
        for page in range(IMAGE_BYTES // PAGE_BYTES):
            image.write(stamped_page(page * SECTORS_PER_PAGE, _REQUEST))


def file_node(path: Path) -> str:
    """The value of QEMU's ``-blockdev`` that makes `path` the node 'disk'.

    Without locks, since the source has the image open while the destination opens it.
    """
    return f"driver=file,node-name=disk,filename={option_value(path)},locking=off"
