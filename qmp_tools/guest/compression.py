"""Decompress kernel images and kernel modules.

The first bytes of the data tell the format. Python decompresses all formats but lz4 and lzo, so the
machine needs no other program.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from dmaproof.errors import UntestableError

_ZSTD: Final = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_GZIP_WBITS: Final = 31
"""zlib's argument for the largest window (15) and a gzip header (16)."""


class NoDecompressorError(UntestableError):
    """Data in a format that this Python cannot decompress."""


@dataclass(frozen=True)
class _Format:
    """A compression format; `module` is imported late, because a Python may be built without it."""

    name: str
    magic: bytes
    module: str
    decompressor: Callable[[ModuleType], Any]
    error: Callable[[ModuleType], type[Exception]]


_FORMATS: Final = (
    _Format(
        *("gzip", b"\x1f\x8b", "zlib"),
        lambda zlib: zlib.decompressobj(_GZIP_WBITS),
        lambda zlib: zlib.error,
    ),
    _Format(
        *("xz", b"\xfd7zXZ\0", "lzma"),
        lambda lzma: lzma.LZMADecompressor(),
        lambda lzma: lzma.LZMAError,
    ),
    _Format(
        *("zstd", b"\x28\xb5\x2f\xfd", _ZSTD),
        lambda zstd: zstd.ZstdDecompressor(),
        lambda zstd: zstd.ZstdError,
    ),
    _Format(  # the default parameters of xz (lc=3, lp=0, pb=2), and a size with zeros at its end
        *("lzma", b"\x5d\0\0", "lzma"),
        lambda lzma: lzma.LZMADecompressor(),
        lambda lzma: lzma.LZMAError,
    ),
    _Format(*("bzip2", b"BZh", "bz2"), lambda bz2: bz2.BZ2Decompressor(), lambda bz2: OSError),
)
_WITHOUT_MODULE: Final = {
    "lz4": b"\x02\x21\x4c\x18",  # the 'legacy' format, which the kernel's build makes
    "lzo": b"\x89LZO\0\r\n\x1a\n",
}
"""The first bytes of the formats of kernels that Python has no module for."""


def missing_modules() -> dict[str, str]:
    """Return the formats that this Python cannot decompress, with the module that each needs."""
    return {form.name: form.module for form in _FORMATS if not _is_importable(form.module)}


def _is_importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def is_compressed(data: bytes) -> bool:
    """Return whether `data` begins as one of the formats does."""
    magics = [form.magic for form in _FORMATS]
    return data.startswith((*magics, *_WITHOUT_MODULE.values()))


def decompress(data: bytes, what: str) -> bytes:
    """Decompress `data`, called `what` in messages; ignore bytes after the compressed data.

    Raises:
        NoDecompressorError: this Python has no module for the format.
        UntestableError: the format is unknown, or the data is damaged.
    """
    for name, magic in _WITHOUT_MODULE.items():
        if data.startswith(magic):
            raise NoDecompressorError(
                f"{what} is compressed with {name}, for which Python has no module; use one with "
                f"another compression, or decompress it with the program {name}"
            )
    form = next((form for form in _FORMATS if data.startswith(form.magic)), None)
    if form is None:
        known = ", ".join(form.name for form in _FORMATS)
        raise UntestableError(
            f"{what} has an unknown compression format: expected one of {known}, but it begins "
            f"with {data[:6].hex() or 'nothing'}"
        )
    try:
        module = importlib.import_module(form.module)
    except ImportError:
        raise NoDecompressorError(
            f"{what} is compressed with {form.name}, and this Python has no module {form.module}; "
            "'dmaproof doctor' says how to get it"
        ) from None
    decompressor = form.decompressor(module)
    try:
        content: bytes = decompressor.decompress(data)
    except form.error(module) as error:
        raise UntestableError(f"{what} is damaged: {form.name}: {error}") from error
    if not decompressor.eof:
        raise UntestableError(f"{what} is damaged: its {form.name} data ends early")
    return content
