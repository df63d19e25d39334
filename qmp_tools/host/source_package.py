"""Read Debian source packages of the format '3.0 (quilt)'.

Such a package is a description (.dsc), the source as its authors released it, and a tarball with
the folder ``debian``, which has the distribution's patches.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dmaproof.errors import UntestableError

_FORMAT: Final = "3.0 (quilt)"
_FIELD: Final = re.compile(r"^([A-Za-z0-9-]+): ?(.*)$")
_CHECKSUM: Final = re.compile(r"^ ([0-9a-f]{64}) (\d+) ([^/\s]+)$")


@dataclass(frozen=True)
class SourcePackage:
    """A source package whose files are complete.

    Attributes:
        name: the package's name.
        version: Debian's version, such as '1:10.0.13+ds-0+deb13u1'.
        original: the tarball with the source as it was released.
        packaging: the tarball with the folder ``debian``.
        digest: a digest of all files.
    """

    name: str
    version: str
    original: Path
    packaging: Path
    digest: str


def read_source_package(dsc: Path) -> SourcePackage:
    """Read a .dsc, and check the files that it lists, which must be beside it.

    Raises:
        UntestableError: the package has another format, or a file is missing or damaged.
    """
    fields, checksums = _read(dsc.read_text())
    if fields.get("Format") != _FORMAT:
        raise UntestableError(
            f"{dsc.name} has the format {fields.get('Format')!r}; only {_FORMAT!r} is supported"
        )
    for name, checksum in checksums.items():
        _check(dsc.with_name(name), checksum, dsc)
    originals = [name for name in checksums if re.search(r"\.orig\.tar\.\w+$", name)]
    packagings = [name for name in checksums if re.search(r"\.debian\.tar\.\w+$", name)]
    if len(originals) != 1 or len(packagings) != 1:
        raise UntestableError(
            f"{dsc.name} must list one .orig.tar and one .debian.tar, but lists: "
            f"{', '.join(checksums) or 'nothing'}"
        )
    whole = hashlib.sha256("".join(sorted(checksums.values())).encode()).hexdigest()
    return SourcePackage(
        name=fields.get("Source", dsc.stem),
        version=fields.get("Version", ""),
        original=dsc.with_name(originals[0]),
        packaging=dsc.with_name(packagings[0]),
        digest=whole,
    )


def _read(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the fields of one line each, and the SHA-256 checksum of each file."""
    fields: dict[str, str] = {}
    checksums: dict[str, str] = {}
    field = ""
    for line in text.splitlines():
        if match := _FIELD.match(line):
            field = match[1]
            fields.setdefault(field, match[2])
        elif field == "Checksums-Sha256" and (match := _CHECKSUM.match(line)):
            checksums[match[3]] = match[1]
    return fields, checksums


def _check(file: Path, checksum: str, dsc: Path) -> None:
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        raise UntestableError(f"{file.name} is missing, but {dsc.name} lists it") from None
    if found != checksum:
        raise UntestableError(
            f"{file.name} is damaged: {dsc.name} has the SHA-256 checksum {checksum}, the file has "
            f"{found}; fetch it again"
        )
