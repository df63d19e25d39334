"""Kernel files in every form that distributions and builds have, and what QEMU gets of them."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.guest.kernel_image import read_kernel_image
from support.kernel_files import (
    ANOTHER_NOTE,
    ARM,
    COMPRESS,
    LZ4,
    PVH,
    RELEASE,
    RISCV,
    bz_image,
    elf,
    image,
    vmlinux,
    zboot,
)

IMAGES = {"aarch64": ARM, "riscv64": RISCV}
every_image = pytest.mark.parametrize("architecture", IMAGES)


@pytest.mark.parametrize("name", COMPRESS)
def test_qemu_enters_the_elf_in_a_bz_image(name: str) -> None:
    # Makefile.lib appends the size to what is not gzip.
    payload = COMPRESS[name](vmlinux()) + b"1234" * (name != "gzip")
    found = read_kernel_image(bz_image(payload), "vmlinuz", "x86_64")
    assert (found.form, found.content) == ("ELF", vmlinux())
    assert (found.version, found.page_bytes) == (RELEASE, 4096)


@pytest.mark.parametrize(
    "payload", [LZ4, gzip.compress(vmlinux(ANOTHER_NOTE))], ids=["lz4", "without PVH"]
)
def test_a_bz_image_whose_elf_qemu_cannot_enter_boots_itself(payload: bytes) -> None:
    found = read_kernel_image(bz_image(payload), "vmlinuz", "x86_64")
    assert (found.form, found.content) == ("bzImage", bz_image(payload))
    assert found.version == RELEASE


def test_a_kernel_that_is_not_complete_is_damaged() -> None:
    kernel, boots = bz_image(gzip.compress(vmlinux())), vmlinux()
    for whole, message in (
        (kernel, "its header names a payload of"),
        (boots, "a header or a segment is not complete"),
    ):
        with pytest.raises(UntestableError, match=f"^F is damaged: {message}"):
            read_kernel_image(whole[: len(whole) // 2], "F", "x86_64")


def test_a_damaged_bz_image_is_not_booted() -> None:
    payload = gzip.compress(vmlinux())[:-9]
    with pytest.raises(UntestableError, match=r"the kernel in vmlinuz is damaged: its gzip data"):
        read_kernel_image(bz_image(payload), "vmlinuz", "x86_64")


@pytest.mark.parametrize("wrap", [bytes, *COMPRESS.values()])
def test_an_elf_with_a_pvh_note_boots(wrap: Callable[[bytes], bytes]) -> None:
    found = read_kernel_image(wrap(vmlinux()), "vmlinux", "x86_64")
    assert (found.form, found.content, found.version) == ("ELF", vmlinux(), RELEASE)


def test_an_elf_without_a_pvh_note_is_refused() -> None:
    with pytest.raises(UntestableError, match=r"^vmlinux is an ELF without a PVH note.*CONFIG_PVH"):
        read_kernel_image(vmlinux(ANOTHER_NOTE), "vmlinux", "x86_64")


@every_image
@pytest.mark.parametrize("wrap", [bytes, *COMPRESS.values()])
def test_an_image_boots_uncompressed(architecture: str, wrap: Callable[[bytes], bytes]) -> None:
    content = IMAGES[architecture]
    found = read_kernel_image(wrap(content), "Image", architecture)
    assert (found.form, found.content, found.version) == ("Image", content, RELEASE)


@every_image
@pytest.mark.parametrize("name", COMPRESS)
def test_an_image_is_unpacked_from_its_efi_program(architecture: str, name: str) -> None:
    wrapped = zboot(COMPRESS[name](IMAGES[architecture]), name)
    found = read_kernel_image(wrapped, "vmlinuz", architecture)
    assert (found.form, found.content) == ("Image", IMAGES[architecture])
    again = read_kernel_image(gzip.compress(wrapped), "vmlinuz.gz", architecture)
    assert again == found


@every_image
def test_an_elf_becomes_an_image(architecture: str) -> None:
    content = IMAGES[architecture]
    start = 0xFFFF800080000000
    data = b"initialized data"
    gap = start + len(content) + 24
    built = elf(architecture, (1, gap, data), (1, start, content), (1, gap + 99, b""), (4, 0, PVH))
    found = read_kernel_image(built, "vmlinux", architecture)
    assert (found.form, found.content) == ("Image", content + bytes(24) + data)


@every_image
@pytest.mark.parametrize(
    "segments", [(), ((1, 0, b"no header"),), ((1, 0, b"x"), (1, 1 << 40, b"y"))]
)
def test_an_elf_that_is_not_linux_is_refused(
    architecture: str, segments: tuple[tuple[int, int, bytes], ...]
) -> None:
    with pytest.raises(UntestableError, match=r"^ls is an ELF that does not begin with the header"):
        read_kernel_image(elf(architecture, *segments), "ls", architecture)


@pytest.mark.parametrize(("size", "code"), [(None, 0), (4096, 1), (16384, 2), (65536, 3)])
def test_an_arm_image_says_how_large_its_pages_are(size: int | None, code: int) -> None:
    found = read_kernel_image(image(b"ARM\x64", 0b1000 | code << 1), "Image", "aarch64")
    assert found.page_bytes == size


def test_a_kernel_of_s390_boots_as_it_is() -> None:
    content = bytes(0x10008) + b"S390EP" + bytes(64)
    found = read_kernel_image(content, "vmlinuz", "s390x")
    assert (found.content, found.version) == (content, None)


LOONGARCH = bytearray(0x80)
LOONGARCH[0:2] = b"MZ"
LOONGARCH[0x3C] = 0x40
LOONGARCH[0x40:0x46] = b"PE\0\0\x64\x62"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ARM, "^F is a kernel for aarch64, and the guest is x86_64; .* with --arch$"),
        (zboot(gzip.compress(RISCV), "gzip"), "^F is a kernel for riscv64, and the guest is x86"),
        (bz_image(LZ4, loaded_bits=32), "^F is a kernel for i386, and the guest is x86_64"),
        (elf("s390x"), "^F is a kernel for s390x, and the guest is x86_64"),
        (
            b"\x7fELF\2\1" + bytes(12) + b"\x99\0" + bytes(50),
            "^F is a kernel for the ELF machine 153",
        ),
        (bytes(LOONGARCH), "^F is an EFI program for loongarch64, .*--only-section=.linux F"),
        (b"#!/bin/sh\n", "^F is not a kernel: expected .*, but it begins with 23212f62696e2f73$"),
        (b"", "^F is not a kernel: .* begins with nothing$"),
        (zboot(LZ4, "lz4"), "^the kernel in F is compressed with lz4, .* the program lz4$"),
        (LZ4, "^F is compressed with lz4"),
        (zboot(b"data", "gzip"), "^the kernel in F has an unknown compression format"),
        (zboot(bytes(99), "gzip")[:0x220], "^F is damaged: its EFI zboot header names 99 bytes"),
        (gzip.compress(ARM)[:-9], "^F is damaged: its gzip data ends early"),
    ],
    ids=[
        *(
            "Arm",
            "zboot of RISC-V",
            "32-bit",
            "s390",
            "unknown ELF",
            "LoongArch",
            "script",
            "empty",
        ),
        *("zboot of lz4", "lz4", "zboot of data", "short zboot", "short gzip"),
    ],
)
def test_what_is_not_a_kernel_for_the_guest_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UntestableError, match=message):
        read_kernel_image(data, "F", "x86_64")


@pytest.mark.parametrize(
    "content",
    [vmlinux(), bz_image(gzip.compress(vmlinux())), ARM, bytes(LOONGARCH)],
    ids=["ELF", "bzImage", "Arm", "LoongArch"],
)
def test_no_truncated_file_is_a_defect(content: bytes) -> None:
    architecture = "aarch64" if content == ARM else "x86_64"
    for length in range(0, len(content), 7):
        try:
            read_kernel_image(content[:length], "F", architecture)
        except UntestableError:
            continue
