"""Decompression of kernels and modules, as Debian's releases compress them."""

from __future__ import annotations

import gzip
import lzma
import sys
from collections.abc import Callable

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.guest.compression import decompress
from qmp_tools.guest.linux import kernel_elf

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}
CONTENT = b"\x7fELF" + bytes(range(256)) * 300
every_format = pytest.mark.parametrize("name", COMPRESS)


@every_format
def test_bytes_after_the_end_are_ignored(name: str) -> None:
    assert decompress(COMPRESS[name](CONTENT) + b"1234", "it") == CONTENT


@every_format
def test_data_that_ends_early_is_reported(name: str) -> None:
    with pytest.raises(UntestableError, match=rf"module vfio is damaged: its {name} data ends"):
        decompress(COMPRESS[name](CONTENT)[:-6], "module vfio")


@every_format
def test_damaged_data_is_reported(name: str) -> None:
    data = COMPRESS[name](CONTENT)
    with pytest.raises(UntestableError, match=rf"module vfio is damaged: {name}: \w"):
        decompress(data[:6] + b"\xff" * len(data), "module vfio")


def test_an_unknown_format_is_reported() -> None:
    message = (
        "the kernel has an unknown compression format: expected one of gzip, xz, zstd, "
        "but it begins with 0222"
    )
    with pytest.raises(UntestableError, match=message):
        decompress(b"\x02\x22kernel", "the kernel")


@pytest.mark.parametrize(("name", "module"), [("xz", "lzma"), ("zstd", zstd.__name__)])
def test_a_python_without_the_module_is_reported(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UntestableError, match=rf"compressed with {name}.*no module {module}"):
        decompress(COMPRESS[name](CONTENT), "the kernel")


def bz_image(payload: bytes) -> bytes:
    """A kernel image of one set-up sector, with `payload` 32 bytes into its protected-mode code."""
    header = bytearray(1024)
    header[0x1F1] = 1
    header[0x202:0x206] = b"HdrS"
    header[0x248:0x250] = (32).to_bytes(4, "little") + len(payload).to_bytes(4, "little")
    return bytes(header) + bytes(32) + payload + b"the decompressor's data"


@every_format
def test_the_elf_in_a_kernel_image_is_found(name: str) -> None:
    size = (
        b"" if name == "gzip" else len(CONTENT).to_bytes(4, "little")
    )  # Makefile.lib's size_append
    assert kernel_elf(bz_image(COMPRESS[name](CONTENT) + size)) == CONTENT
