"""Make an initramfs: the archive that the kernel unpacks as the guest's root."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def newc_archive(files: Mapping[str, bytes]) -> bytes:
    """Make a cpio archive in the 'newc' format (kernel documentation, initramfs buffer format).

    The archive has the folders of `files`, and all files are executable.
    """
    archive_bytes = bytearray()

    def add(name: str, mode: int, content: bytes = b"") -> None:
        encoded = name.encode() + b"\0"
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        archive_bytes.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        archive_bytes.extend(bytes(-len(archive_bytes) % 4))
        archive_bytes.extend(content)
        archive_bytes.extend(bytes(-len(archive_bytes) % 4))

    folders = sorted({str(parent) for name in files for parent in Path(name).parents} - {"."})
    for folder in ("dev", "proc", *folders):
        add(folder, 0o040755)
    for name, content in files.items():
        add(name, 0o100755, content)
    add("TRAILER!!!", 0)
    return bytes(archive_bytes)


def with_modules(init: bytes, modules: Mapping[str, bytes]) -> bytes:
    """Make the initramfs of an init that loads `modules`, which are in their load order.

    The file ``modules/order`` has the path of each module in a line.
    """
    files = {f"modules/{name}.ko": content for name, content in modules.items()}
    order = "".join(f"/{name}\n" for name in files)
    return newc_archive({"init": init, "modules/order": order.encode(), **files})
