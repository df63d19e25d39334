"""Decompression of kernels and modules, as Debian's releases compress them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from collections.abc import Callable

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.guest.compression import NoDecompressorError, decompress, is_compressed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
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
        "the kernel has an unknown compression format: expected one of gzip, xz, zstd, lzma, "
        "bzip2, but it begins with 4d5a"
    )
    with pytest.raises(UntestableError, match=message):
        decompress(b"MZ", "the kernel")


@pytest.mark.parametrize(
    ("name", "magic"), [("lz4", b"\x02\x21\x4c\x18"), ("lzo", b"\x89LZO\0\r\n\x1a\n")]
)
def test_a_format_without_a_module_of_python_is_named(name: str, magic: bytes) -> None:
    assert is_compressed(magic + b"data")
    message = rf"the kernel is compressed with {name}, .* with the program {name}$"
    with pytest.raises(NoDecompressorError, match=message):
        decompress(magic + b"data", "the kernel")


@every_format
def test_compressed_data_is_recognized(name: str) -> None:
    assert is_compressed(COMPRESS[name](CONTENT))
    assert not is_compressed(CONTENT)


@pytest.mark.parametrize(("name", "module"), [("xz", "lzma"), ("zstd", zstd.__name__)])
def test_a_python_without_the_module_is_reported(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NoDecompressorError, match=rf"compressed with {name}.*no module {module}"):
        decompress(COMPRESS[name](CONTENT), "the kernel")
