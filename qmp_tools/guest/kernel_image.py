"""Turn any kernel file into what QEMU's ``-kernel`` boots.

A distribution's kernel is a bzImage (x86-64), or an Image that is plain, compressed as a whole, or
inside an EFI program that decompresses it ('zboot'). A kernel's build also leaves an ELF, vmlinux.

QEMU enters an x86 ELF by PVH. That saves the seconds that the kernel's own decompressor takes under
TCG. A bzImage whose ELF has no PVH note, or is compressed in a way that Python does not know, boots
as it is. QEMU passes an initramfs and a device tree only to an Image on Arm (hw/arm/boot.c).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dmaproof.errors import UntestableError
from dmaproof.units import div_ceil

from .compression import NoDecompressorError, decompress, is_compressed


@dataclass(frozen=True)
class KernelImage:
    """The `content` of a file that QEMU boots, which is an 'ELF', a 'bzImage' or an 'Image'.

    `version` is the kernel's release (``uname -r``), if it was found. `page_bytes` is the size of
    the kernel's pages, if the image or the architecture determines it.
    """

    form: str
    content: bytes
    version: str | None
    page_bytes: int | None


_X86: Final = ("x86_64", "i386")
_MAGIC_AT: Final = 0x38
_IMAGES: Final = {b"ARM\x64": "aarch64", b"RSC\x05": "riscv64"}
"""The magic number of an Image (kernel documentation, arch/arm64/booting.rst and
arch/riscv/boot-image-header.rst)."""
_ELF_MACHINES: Final = {
    3: "i386",
    20: "ppc",
    21: "ppc64",
    22: "s390x",
    40: "arm",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
    258: "loongarch64",
}
"""e_machine of an ELF header (elf.h, EM_386 and others)."""
_PE_MACHINES: Final = {
    0x014C: "i386",
    0x01C2: "arm",
    0x5064: "riscv64",
    0x6264: "loongarch64",
    0x8664: "x86_64",
    0xAA64: "aarch64",
}
"""Machine of a PE header (PE format specification, machine types)."""
_S390_MAGIC: Final = b"S390EP"
_S390_MAGIC_AT: Final = 0x10008  # arch/s390/boot/head.S
_PAGES_OF_ARM: Final = {1: 4 << 10, 2: 16 << 10, 3: 64 << 10}
"""Bits 1 and 2 of the flags of an arm64 Image."""
_PAGE_BYTES: Final = 4 << 10
"""The only page size of Linux on x86-64, riscv64 and s390x."""
_PT_LOAD, _PT_NOTE = 1, 4
_PVH_NOTE: Final = (b"Xen\0", 18)  # XEN_ELFNOTE_PHYS32_ENTRY
_LARGEST_BYTES: Final = 1 << 30
"""The segments of a kernel are next to each other; those of another program need not be."""
_LAYERS: Final = 3
"""A compressed file may hold a zboot image, which holds a compressed Image."""


def read_kernel_image(data: bytes, what: str, architecture: str) -> KernelImage:
    """Return what QEMU boots, from the `data` of a kernel file.

    Args:
        data: the file's bytes, in any form that this module's documentation names.
        what: the file's name in messages.
        architecture: the guest's architecture, as ``uname -m`` names it.

    Raises:
        UntestableError: the file is not a kernel, is one of another architecture, is damaged, or is
            compressed in a format that this Python cannot decompress.
    """
    try:
        return _read(_unpacked(data, what), what, architecture)
    except (struct.error, IndexError):
        raise UntestableError(
            f"{what} is damaged: a header or a segment is not complete in its {len(data)} bytes"
        ) from None


def _read(image: bytes, what: str, architecture: str) -> KernelImage:
    found, form = _identify(image, what)
    if found != architecture:
        raise UntestableError(
            f"{what} is a kernel for {found}, and the guest is {architecture}; give another "
            "kernel, or choose the guest's architecture with --arch"
        )
    if form == "bzImage":
        return _of_bz_image(image, what)
    if form == "ELF":
        return _of_elf(image, what, architecture)
    return KernelImage(form, image, _banner(image), _page_bytes(image, architecture))


def _unpacked(data: bytes, what: str) -> bytes:
    """Return the kernel in any number of wrappings."""
    for _ in range(_LAYERS):
        if data[:2] == b"MZ" and data[4:8] == b"zimg":
            # drivers/firmware/efi/libstub/zboot-header.S: offset and size of the payload
            offset, size = struct.unpack_from("<II", data, 8)
            payload = _payload(data, offset, size, what, "EFI zboot header names")
            data = decompress(payload, f"the kernel in {what}")
        elif is_compressed(data):
            data = decompress(data, what)
        else:
            break
    return data


def _payload(data: bytes, offset: int, size: int, what: str, names: str) -> bytes:
    """Return the part of a file that its header names; `names` says so in a message."""
    if offset + size > len(data):
        raise UntestableError(
            f"{what} is damaged: its {names} {size} bytes at offset {offset}, and the file has "
            f"{len(data)} bytes"
        )
    return data[offset : offset + size]


def _identify(image: bytes, what: str) -> tuple[str, str]:
    """Return the architecture and the form of an unpacked kernel."""
    if image[0x202:0x206] == b"HdrS":
        # Boot protocol 2.12: bit 0 of xloadflags says that the kernel has a 64-bit entry point.
        version, flags = struct.unpack("<H", image[0x206:0x208])[0], image[0x236:0x237]
        return _X86[not (version >= 0x20C and flags and flags[0] & 1)], "bzImage"
    if (found := _IMAGES.get(image[_MAGIC_AT : _MAGIC_AT + 4])) is not None:
        return found, "Image"
    if image[_S390_MAGIC_AT : _S390_MAGIC_AT + len(_S390_MAGIC)] == _S390_MAGIC:
        return "s390x", "bzImage of s390"
    if image[:4] == b"\x7fELF" and len(image) >= 64:
        order = ">H" if image[5] == 2 else "<H"
        number = struct.unpack_from(order, image, 18)[0]
        return _ELF_MACHINES.get(number, f"the ELF machine {number}"), "ELF"
    if image[:2] == b"MZ" and len(image) >= 64:
        at = struct.unpack_from("<I", image, 0x3C)[0]
        number = int.from_bytes(image[at + 4 : at + 6], "little")
        machine = _PE_MACHINES.get(number, f"the PE machine {number:#x}")
        raise UntestableError(
            f"{what} is an EFI program for {machine}, but not a kernel; if it is a unified kernel "
            "image, take the kernel out of it: objcopy -O binary --only-section=.linux FILE KERNEL"
        )
    raise UntestableError(
        f"{what} is not a kernel: expected a bzImage, an Image, an EFI zboot image or an ELF, "
        f"but it begins with {image[:8].hex() or 'nothing'}"
    )


def _of_bz_image(image: bytes, what: str) -> KernelImage:
    """Return the ELF in a bzImage, or the bzImage itself if QEMU cannot boot the ELF.

    See kernel documentation, arch/x86/boot.rst: payload_offset and payload_length (since protocol
    2.08), kernel_version.
    """
    text_at = struct.unpack_from("<H", image, 0x20E)[0] + 0x200
    version = image[text_at : image.find(b"\0", text_at)].split()[:1] if text_at != 0x200 else []
    release = version[0].decode(errors="replace") if version else None
    start = ((image[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = _payload(image, start + offset, length, what, "header names a payload of")
    try:
        elf = decompress(payload, f"the kernel in {what}")
    except NoDecompressorError:
        elf = b""
    if not _has_pvh_entry(elf):
        return KernelImage("bzImage", image, release, _PAGE_BYTES)
    return KernelImage("ELF", elf, release or _banner(elf), _PAGE_BYTES)


def _of_elf(elf: bytes, what: str, architecture: str) -> KernelImage:
    """Return an x86 ELF as it is, and those of other architectures as an Image."""
    if architecture not in ("aarch64", "riscv64"):
        if architecture == "x86_64" and not _has_pvh_entry(elf):
            raise UntestableError(
                f"{what} is an ELF without a PVH note, which QEMU needs to boot an ELF: use the "
                "bzImage (vmlinuz) of this kernel, or build the kernel with CONFIG_PVH=y"
            )
        return KernelImage("ELF", elf, _banner(elf), _PAGE_BYTES)
    image = _flatten(elf)
    if _IMAGES.get(image[_MAGIC_AT : _MAGIC_AT + 4]) != architecture:
        raise UntestableError(
            f"{what} is an ELF that does not begin with the header of an Image, so it is not "
            "Linux; use the file Image or vmlinuz of the kernel"
        )
    return KernelImage("Image", image, _banner(image), _page_bytes(image, architecture))


@dataclass(frozen=True)
class _Segment:
    kind: int
    address: int
    content: bytes


def _segments(elf: bytes) -> Iterator[_Segment]:
    """Yield the program headers of a little-endian 64-bit ELF."""
    if elf[:6] != b"\x7fELF\2\1" or len(elf) < 64:
        return
    start, size, count = (
        struct.unpack_from("<Q", elf, 32)[0],
        *struct.unpack_from("<HH", elf, 54),
    )
    for at in range(start, min(start + size * count, len(elf) - 55), size or 56):
        kind, _, offset, address, _, in_file = struct.unpack_from("<IIQQQQ", elf, at)
        if offset + in_file > len(elf):
            raise IndexError("a segment is not complete")
        yield _Segment(kind, address, elf[offset : offset + in_file])


def _flatten(elf: bytes) -> bytes:
    """Return the memory that the loaded segments fill, as the kernel's build makes an Image."""
    loaded = [segment for segment in _segments(elf) if segment.kind == _PT_LOAD and segment.content]
    if not loaded:
        return b""
    start = min(segment.address for segment in loaded)
    end = max(segment.address + len(segment.content) for segment in loaded)
    if end - start > _LARGEST_BYTES:
        return b""
    image = bytearray(end - start)
    for segment in loaded:
        at = segment.address - start
        image[at : at + len(segment.content)] = segment.content
    return bytes(image)


def _has_pvh_entry(elf: bytes) -> bool:
    """Return whether the ELF has the note with its PVH entry point (Xen's pvh.markdown)."""
    for segment in _segments(elf):
        notes = segment.content if segment.kind == _PT_NOTE else b""
        at = 0
        while at + 12 <= len(notes):
            name_size, size, kind = struct.unpack_from("<III", notes, at)
            name = notes[at + 12 : at + 12 + name_size]
            if (name, kind) == _PVH_NOTE:
                return True
            at += 12 + 4 * (div_ceil(name_size, 4) + div_ceil(size, 4))
    return False


def _banner(image: bytes) -> str | None:
    """Return the release in the text that the kernel prints first (linux_banner)."""
    match = re.search(rb"Linux version (\S+) \(", image)
    return match[1].decode(errors="replace") if match else None


def _page_bytes(image: bytes, architecture: str) -> int | None:
    if architecture != "aarch64":
        return _PAGE_BYTES
    flags = struct.unpack_from("<Q", image, 0x18)[0]
    return _PAGES_OF_ARM.get(flags >> 1 & 3)
