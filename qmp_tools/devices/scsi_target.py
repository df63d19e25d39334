"""A SCSI target of the kernel (LIO) for vhost-scsi: one disk, whose data is in a file.

The target is set up in configfs, which belongs to the whole kernel, and needs root. A process that
is killed leaves it behind. So only the nested machine has it, which ends with the proof.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

WWN: Final = "naa.5001405d3a9700f1"
"""The name of the target, in the range of Linux (IEEE's OUI 001405)."""
_INITIATOR: Final = "naa.5001405d3a9700f2"
_BACKSTORE: Final = "fileio_0"
_TARGET: Final = Path("/sys/kernel/config/target")
_MODULE: Final = "the modules target_core_file and vhost_scsi"


@contextlib.contextmanager
def scsi_target(image: Path, root: Path = _TARGET) -> Iterator[str]:
    """Set up a target with the disk `image` while the context lasts; yield its name.

    Args:
        image: the file.
        root: configfs's folder of targets.

    Raises:
        UntestableError: the kernel does not set up the target.
    """
    backstore = root / "core" / _BACKSTORE / "dmaproof"
    fabric = root / "vhost" / WWN
    portal = fabric / "tpgt_0"  # the guest sees it as target 0
    unit = portal / "lun" / "lun_0"
    try:
        backstore.mkdir(parents=True)
        size = image.stat().st_size
        (backstore / "control").write_text(f"fd_dev_name={image},fd_dev_size={size}")
        (backstore / "enable").write_text("1")
        portal.mkdir(parents=True)
        (portal / "nexus").write_text(_INITIATOR)
        unit.mkdir(parents=True, exist_ok=True)
        (unit / "disk").symlink_to(backstore)
    except OSError as error:
        _remove(portal, unit, fabric, backstore)
        raise UntestableError(
            f"vhost-scsi needs a SCSI target of the kernel, which cannot be set up in {root} "
            f"({error.filename}: {error.strerror}): load {_MODULE}, and mount configfs"
        ) from error
    try:
        yield WWN
    finally:
        _remove(portal, unit, fabric, backstore)


def _remove(portal: Path, unit: Path, fabric: Path, backstore: Path) -> None:
    steps: Sequence[Callable[[], object]] = (
        lambda: (unit / "disk").unlink(),
        unit.rmdir,
        lambda: (portal / "nexus").write_text("NULL"),
        portal.rmdir,
        fabric.rmdir,
        backstore.rmdir,
        backstore.parent.rmdir,
    )
    for step in steps:
        with contextlib.suppress(OSError):  # it was not set up
            step()
