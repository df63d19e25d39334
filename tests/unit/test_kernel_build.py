"""Kernels that dmaproof builds itself: what decides their cache, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.arch.aarch64 import AARCH64
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.guest.build import sources
from qmp_tools.guest.kernel_build import build_key, build_tree, built_kernel
from qmp_tools.host import archive

BUILD = AARCH64.kernel_builds[65536]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "kernel.config"
    file.write_text("# A comment.\nCONFIG_NET=y\nCONFIG_UNIX=y\n")
    return file


def test_everything_that_decides_a_kernel_is_in_its_key(config: Path) -> None:
    key = build_key(BUILD, config, "gcc 12", "debian bookworm")
    others = {
        build_key(BUILD, config, "gcc 14", "debian bookworm"),
        build_key(BUILD, config, "gcc 12", "debian trixie"),
        build_key(replace(BUILD, kbuild="riscv"), config, "gcc 12", "debian bookworm"),
        build_key(replace(BUILD, goals="Image.gz"), config, "gcc 12", "debian bookworm"),
    }
    config.write_text("CONFIG_NET=y\n")
    others.add(build_key(BUILD, config, "gcc 12", "debian bookworm"))
    assert len(others - {key}) == 5
    config.write_text("# Another comment.\n\nCONFIG_NET=y\nCONFIG_UNIX=y\n")
    assert build_key(BUILD, config, "gcc 12", "debian bookworm") == key


def test_pages_of_a_size_that_nothing_is_built_for_have_no_kernel() -> None:
    assert built_kernel(AARCH64, 4096) is None
    assert built_kernel(X86_64, 65536) is None


def test_missing_programs_are_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UntestableError, match="needs gcc, make, flex, bison, bc, tar, xz") as told:
        built_kernel(AARCH64, 65536)
    assert "kernel for aarch64" in str(told.value)
    assert not (tmp_path / "cache").exists()


def package_with(monkeypatch: pytest.MonkeyPatch, *files: str) -> Path:
    def unpack(package: Path, folder: Path) -> None:
        for name in files:
            file = folder / "usr/src" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)

    monkeypatch.setattr(archive, "unpack", unpack)
    return Path("linux-source-6.1_6.1.9-1_all.deb")


@pytest.mark.parametrize(
    "file", ["linux-source-6.1.tar.xz", "linux-source-6.8.0/linux-source-6.8.0.tar.bz2"]
)
def test_the_source_is_configured_before_it_is_built(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    tree = tmp_path / "tree"
    scripts: list[str] = []

    def run(script: str, what: str) -> str:
        assert (tree / "source.tar").read_text() == file
        assert (tree / "dmaproof.config").read_text() == config.read_text()
        scripts.append(script)
        return ""

    build_tree(tree, package_with(monkeypatch, file), config, "Image", run)
    assert "allnoconfig" in scripts[0]
    assert scripts[1].startswith("make ")
    assert scripts[1].endswith(" Image")
    assert not (tree / "package").exists()


def test_options_that_the_kernel_does_not_accept_are_named(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_with(monkeypatch, "linux-source-6.1.tar.xz")
    with pytest.raises(UntestableError, match=r"rejects these lines of .*:\nCONFIG_UNIX=y"):
        build_tree(tmp_path / "tree", package, config, "Image", lambda *_: "CONFIG_UNIX=y\n")


def test_a_package_without_source_is_refused(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_with(monkeypatch, "README")
    with pytest.raises(UntestableError, match=r"linux-source-6\.1_.* has no kernel source"):
        build_tree(tmp_path / "tree", package, config, "Image", lambda *_: "")


def test_the_configuration_of_each_kernel_that_is_built_is_installed() -> None:
    for build in AARCH64.kernel_builds.values():
        lines = (sources() / "linux" / build.config).read_text().splitlines()
        assert all(line.startswith(("CONFIG_", "#")) or not line for line in lines)
        assert "CONFIG_ARM64_64K_PAGES=y" in lines
