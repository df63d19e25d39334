"""Decompress kernel images and kernel modules.

The first bytes of the data tell the format. Python decompresses all formats, so the machine needs
no other program.
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


@dataclass(frozen=True)
class _Format:
    """A compression format; `module` is imported late, because a Python may be built without it."""

    name: str
    magic: bytes
    module: str
    decompressor: Callable[[ModuleType], Any]
    error: str


_FORMATS: Final = (
    _Format("gzip", b"\x1f\x8b", "zlib", lambda zlib: zlib.decompressobj(_GZIP_WBITS), "error"),
    _Format("xz", b"\xfd7zXZ\0", "lzma", lambda lzma: lzma.LZMADecompressor(), "LZMAError"),
    _Format("zstd", b"\x28\xb5\x2f\xfd", _ZSTD, lambda zstd: zstd.ZstdDecompressor(), "ZstdError"),
)


def missing_modules() -> dict[str, str]:
    """Return the formats that this Python cannot decompress, with the module that each needs."""
    return {form.name: form.module for form in _FORMATS if not _is_importable(form.module)}


def _is_importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def decompress(data: bytes, what: str) -> bytes:
    """Decompress `data`, called `what` in messages; ignore bytes after the compressed data.

    Raises:
        UntestableError: the format is unknown, this Python has no module for the format, or the
            data is damaged.
    """
    form = next((form for form in _FORMATS if data.startswith(form.magic)), None)
    if form is None:
        known = ", ".join(form.name for form in _FORMATS)
        raise UntestableError(
            f"{what} has an unknown compression format: expected one of {known}, but it begins "
            f"with {data[:6].hex()}"
        )
    try:
        module = importlib.import_module(form.module)
    except ImportError:
        raise UntestableError(
            f"{what} is compressed with {form.name}, and this Python has no module {form.module}; "
            "'dmaproof doctor' says how to get it"
        ) from None
    decompressor = form.decompressor(module)
    try:
        content: bytes = decompressor.decompress(data)
    except getattr(module, form.error) as error:
        raise UntestableError(f"{what} is damaged: {form.name}: {error}") from error
    if not decompressor.eof:
        raise UntestableError(f"{what} is damaged: its {form.name} data ends early")
    return content
