"""The disk of a third party's device: an image file whose pages are all stamped.

The content is the same at every read, so only the LBA distinguishes pages. That is enough: the
write-once pages are empty until the device writes them, and when a hot page is read into again, the
data comes from another LBA, except one time in `IMAGE_BYTES` / 4096.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dmaproof.stamp import SECTORS_PER_PAGE, stamped_page
from dmaproof.units import PAGE_BYTES

from ..qemu.machine import option_value

IMAGE_BYTES: Final = 64 << 20
_REQUEST: Final = 1
"""The request number in every stamp, as no request has been made yet."""


def write_image(path: Path, image_bytes: int = IMAGE_BYTES) -> None:
    """Write the image, which both sides of a migration read and write, one after the other."""
    with path.open("wb") as image:
        for page in range(image_bytes // PAGE_BYTES):
            image.write(stamped_page(page * SECTORS_PER_PAGE, _REQUEST))


def file_node(path: Path) -> str:
    """Return the value of QEMU's ``-blockdev`` that makes `path` the node 'disk'.

    Locking is off, because the source has the image open while the destination opens it.
    """
    return f"driver=file,node-name=disk,filename={option_value(path)},locking=off"
