"""Kernel files and modules of every form that distributions and builds have."""

from __future__ import annotations

import gzip
import lzma
import struct
import sys
from collections.abc import Callable
from pathlib import Path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xzkern": lzma.compress,
    "zstd": zstd.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}
LZ4 = b"\x02\x21\x4c\x18 and data of lz4"
RELEASE = "6.12.9-arch1"
BANNER = f"Linux version {RELEASE} (builder@host) #1 SMP\n".encode()
PVH = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x1000000)
ANOTHER_NOTE = struct.pack("<III8sI", 5, 3, 18, b"Linux", 0x030201)
MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243, "s390x": 22}


def elf(architecture: str, *segments: tuple[int, int, bytes]) -> bytes:
    """Return an ELF of segments (type, address, content)."""
    machine = MACHINES[architecture]
    order = ">" if architecture == "s390x" else "<"
    ident = b"\x7fELF" + bytes([2, 2 if order == ">" else 1, 1]) + bytes(9)
    header = ident + struct.pack(
        f"{order}HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0
    )
    offset = 64 + 56 * len(segments)
    headers, contents = b"", b""
    for kind, address, content in segments:
        at = offset + len(contents)
        sizes = (len(content), len(content))
        headers += struct.pack(f"{order}IIQQQQQQ", kind, 5, at, address, address, *sizes, 4)
        contents += content
    return header + headers + contents


def vmlinux(notes: bytes = ANOTHER_NOTE + PVH) -> bytes:
    return elf("x86_64", (1, 0xFFFFFFFF81000000, BANNER), (4, 0, notes))


def bz_image(payload: bytes, *, loaded_bits: int = 64) -> bytes:
    """Return a bzImage of one set-up sector, with `payload` in its protected-mode code."""
    header = bytearray(1024)
    header[0:2] = b"MZ"  # as with CONFIG_EFI_STUB
    header[0x1F1] = 1
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, 0x20F)
    struct.pack_into("<H", header, 0x20E, 0x300 - 0x200)
    header[0x300 : 0x300 + len(RELEASE) + 6] = f"{RELEASE} (x@y)".encode()
    header[0x236] = loaded_bits == 64
    struct.pack_into("<II", header, 0x248, 32, len(payload))
    return bytes(header) + bytes(32) + payload + b"the decompressor's data"


def image(magic: bytes, flags: int = 0) -> bytes:
    """Return an Image with the header of arm64 or RISC-V."""
    header = bytearray(64)
    header[0:2] = b"MZ"
    struct.pack_into("<Q", header, 0x18, flags)
    header[0x38:0x3C] = magic
    return bytes(header) + bytes(0x200) + BANNER


ARM = image(b"ARM\x64", flags=0b1010)
RISCV = image(b"RSC\x05")


def zboot(payload: bytes, name: str) -> bytes:
    """Return an EFI zboot image (drivers/firmware/efi/libstub/zboot-header.S)."""
    header = bytearray(0x200)
    header[0:8] = b"MZ\0\0zimg"
    struct.pack_into("<II", header, 8, len(header) + 16, len(payload))
    header[0x18 : 0x18 + len(name)] = name.encode()
    struct.pack_into("<I", header, 0x38, 0x818223CD)
    return bytes(header) + bytes(16) + payload + b"the rest of the program"


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def module(depends: str) -> bytes:
    """Return a module that has only the strings of its .modinfo section."""
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=it\0"


def put(folder: Path, name: str, depends: str, form: str = "") -> Path:
    """Write a module, compressed in one of the `FORMS`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.ko{form}"
    file.write_bytes(FORMS[form](module(depends)))
    return file
