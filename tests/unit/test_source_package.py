"""Debian source packages: the description, and the files that it lists."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.host.source_package import read_source_package

ORIGINAL, PACKAGING = "qemu_10.0.13+ds.orig.tar.xz", "qemu_10.0.13+ds-0+deb13u1.debian.tar.xz"


def write(folder: Path, names: list[str], form: str = "3.0 (quilt)") -> Path:
    """Write files of these names and a .dsc that lists them."""
    sums = ""
    for name in names:
        (folder / name).write_text(f"content of {name}")
        sums += f" {hashlib.sha256((folder / name).read_bytes()).hexdigest()} 11 {name}\n"
    dsc = folder / "qemu.dsc"
    dsc.write_text(
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n"
        f"Format: {form}\nSource: qemu\nVersion: 1:10.0.13+ds-0+deb13u1\n"
        f"Package-List:\n qemu-system deb otherosfs optional\n"
        f"Checksums-Sha1:\n {'0' * 40} 11 {ORIGINAL}\nChecksums-Sha256:\n{sums}"
        f"Files:\n {'0' * 32} 11 {ORIGINAL}\n"
    )
    return dsc


def test_a_package_is_read(tmp_path: Path) -> None:
    package = read_source_package(write(tmp_path, [ORIGINAL, PACKAGING]))
    assert (package.name, package.version) == ("qemu", "1:10.0.13+ds-0+deb13u1")
    assert package.original == tmp_path / ORIGINAL
    assert package.packaging == tmp_path / PACKAGING


def test_the_digest_changes_with_a_file(tmp_path: Path) -> None:
    first = read_source_package(write(tmp_path, [ORIGINAL, PACKAGING]))
    assert read_source_package(write(tmp_path, [ORIGINAL, PACKAGING])).digest == first.digest
    renamed = read_source_package(write(tmp_path, [ORIGINAL, f"new-{PACKAGING}"]))
    assert renamed.digest != first.digest


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    dsc = write(tmp_path, [ORIGINAL, PACKAGING])
    (tmp_path / ORIGINAL).write_text("another content")
    with pytest.raises(UntestableError, match=rf"{ORIGINAL.replace('+', '.')} is damaged"):
        read_source_package(dsc)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    dsc = write(tmp_path, [ORIGINAL, PACKAGING])
    (tmp_path / PACKAGING).unlink()
    with pytest.raises(UntestableError, match=r"debian\.tar\.xz is missing, but qemu\.dsc"):
        read_source_package(dsc)


@pytest.mark.parametrize("names", [[], [ORIGINAL], [PACKAGING]])
def test_a_package_without_one_of_its_tarballs_is_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UntestableError, match=r"must list one \.orig\.tar and one \.debian\.tar"):
        read_source_package(write(tmp_path, names))


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UntestableError, match=r"has the format '1\.0'; only '3\.0 \(quilt\)'"):
        read_source_package(write(tmp_path, [ORIGINAL, PACKAGING], form="1.0"))
