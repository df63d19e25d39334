"""Kernels of source trees and of patches, up to what make does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.guest.build import cache
from qmp_tools.passthrough.l1 import packaged, tree
from qmp_tools.passthrough.l1.kernel import KERNEL_MODULES, MODULE, module_sources


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "my linux"
    (folder / "kernel").mkdir(parents=True)
    for name in ("Kconfig", "Makefile"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "packages").write_text("gcc-14\n")
    return folder


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Simulate what builds; the scripts are collected. The kernel is a copy of the Makefile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    collected: list[str] = []

    def run_inside(
        root: Path,
        mounted: Path,
        script: str,
        what: str,
        timeout_s: float,
        *,
        source: Path | None = None,
        **variables: str,
    ) -> str:
        collected.append(script)
        if "vmlinux modules" in script and source is not None:
            shutil.copy(source / "Makefile", mounted / "build" / "vmlinux")
            for name in KERNEL_MODULES:
                (mounted / "build" / name).parent.mkdir(parents=True, exist_ok=True)
                (mounted / "build" / name).write_text(name)
        if "M=/mnt/module" in script:
            (mounted / "module" / f"{MODULE}.ko").write_text("module")
        return ""

    monkeypatch.setattr(tree, "run_inside", run_inside)
    monkeypatch.setattr(packaged, "run_inside", run_inside)
    return collected


def test_a_folder_that_is_not_a_kernel_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Makefile").touch()
    with pytest.raises(UsageError, match=r"not the source tree .* Kconfig, kernel not found in it"):
        tree.check_source(tmp_path)


@pytest.mark.parametrize("left", [".config", "include/config", "arch/x86/include/generated"])
def test_a_tree_that_was_built_in_tree_is_refused_with_the_remedy(source: Path, left: str) -> None:
    tree.check_source(source)
    (source / left).mkdir(parents=True)
    with pytest.raises(
        UsageError, match=rf"built in-tree \({left} exists\).*make -C '.*/my linux'"
    ):
        tree.check_source(source)


@pytest.mark.usefixtures("scripts")
def test_what_boots_is_a_copy_that_the_next_build_does_not_change(source: Path, root: Path) -> None:
    first = tree.tree_kernel(root, source)
    (source / "Makefile").write_text("changed")
    second = tree.tree_kernel(root, source)
    assert (first.folder / "vmlinux").read_text() == "Makefile"
    assert (second.folder / "vmlinux").read_text() == "changed"
    assert second.module.read_text() == "module"
    assert (second.folder / "modules/order").read_text() == "mdev.ko\n"
    assert second.origin == f"the tree {source}"


@pytest.mark.usefixtures("scripts")
def test_each_tree_has_its_own_build_which_ends_with_the_tree(source: Path, root: Path) -> None:
    other = source.with_name("other")
    shutil.copytree(source, other)
    for folder in (source, other):
        tree.tree_kernel(root, folder)
    builds = {folder.name: folder for folder in cache().glob("l1/tree-*")}
    assert len(builds) == 2
    shutil.rmtree(other)
    tree.tree_kernel(root, source)
    # This process has locked the other build, so it is removed only when the process has ended.
    assert len(list(cache().glob("l1/tree-*"))) == 2
    gone = cache() / "l1/tree-aaaa-bbbb"
    gone.mkdir()
    (gone / "source").write_bytes(os.fsencode(other))
    tree.tree_kernel(root, source)
    assert not gone.exists()


@pytest.mark.usefixtures("scripts")
def test_the_modules_files_keep_their_time_unless_they_change(source: Path, root: Path) -> None:
    tree.tree_kernel(root, source)
    (module,) = cache().glob("l1/tree-*/module")
    files = [module / file.name for file in module_sources()]
    for file in files:
        os.utime(file, (1, 1))
    files[0].write_text("an older version")
    tree.tree_kernel(root, source)
    times = [file.stat().st_mtime for file in files]
    assert times[0] > 1
    assert set(times[1:]) == {1}


@pytest.mark.usefixtures("scripts")
def test_options_that_the_tree_rejects_are_named(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "run_inside", lambda *_, **__: "CONFIG_IOMMUFD=y\n")
    with pytest.raises(UntestableError, match=r"my linux rejects these lines(.|\n)*IOMMUFD=y"):
        tree.tree_kernel(root, source)


def plain_build(source: Path) -> Callable[[Path, str], Path]:
    def build(root: Path, version: str) -> Path:
        plain = source.with_name("plain")
        if not plain.exists():
            shutil.copytree(source, plain / "source")
            (plain / "build").mkdir()
        return plain

    return build


def test_patched_kernels_are_cached_by_their_patches(
    source: Path, root: Path, scripts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "plain_build", plain_build(source))
    files = [source.with_name(name) for name in ("0001-a.patch", "0002-b.patch")]
    for file in files:
        file.write_text(file.name)
    first = packaged.packaged_kernel(root, "7.3", files)
    assert "patch -d source -p1" in scripts[0]
    assert first.origin == "linux-source-7.3 with 0001-a.patch, 0002-b.patch"
    built = len(scripts)
    assert packaged.packaged_kernel(root, "7.3", files).folder == first.folder
    assert len(scripts) == built
    assert packaged.packaged_kernel(root, "7.3", files[:1]).folder != first.folder
    assert packaged.packaged_kernel(root, "7.3", files[::-1]).folder != first.folder
    assert not (first.folder / "work").exists()
    unpatched = packaged.packaged_kernel(root, "7.3")
    assert unpatched.folder.name.startswith("kernel-7.3-")
    assert unpatched.origin is None


def test_a_patch_that_cannot_be_read_is_wrong_usage(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--kernel-patch .*/none\.patch: No such file"):
        packaged.packaged_kernel(root, "7.3", [tmp_path / "none.patch"])


@pytest.mark.parametrize(
    "name",
    [
        *("drivers/net/loopback.c", "drivers/net/tun.c"),
        "tools/testing/selftests/vfio/lib/libvfio.c",
        "drivers/net/ethernet/intel/igb/e1000_regs.h",  # igb.c of the same selftests includes it
    ],
)
def test_the_files_that_l1s_configuration_builds_are_unpacked(name: str) -> None:
    file = f"linux-source-7.3/{name}"
    assert not [pattern for pattern in packaged._NOT_BUILT if fnmatchcase(file, pattern)]
    assert any(fnmatchcase("x/drivers/net/ethernet/a.c", each) for each in packaged._NOT_BUILT)
