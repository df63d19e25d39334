"""The cache and the parts of L1, without building it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmaproof.errors import UntestableError, WaitTimeoutError
from qmp_tools.guest.modules import find_modules
from qmp_tools.host.cached_folder import prune
from qmp_tools.passthrough.l1 import machine, stock
from qmp_tools.passthrough.l1.kernel import KERNELS

DAY_S = 24 * 3600


def folder(path: Path, *, unused_days: float) -> Path:
    path.mkdir()
    (path / "vmlinux").touch()
    then = time.time() - unused_days * DAY_S
    os.utime(path, (then, then))
    return path


def test_only_old_builds_of_the_same_version_are_removed(tmp_path: Path) -> None:
    current = folder(tmp_path / "kernel-7.3-aaaa", unused_days=9)
    old = folder(tmp_path / "kernel-7.3-bbbb", unused_days=2)
    recent = folder(tmp_path / "kernel-7.3-cccc", unused_days=0.5)
    other = folder(tmp_path / "kernel-6.12-dddd", unused_days=9)
    assert prune(current) == current
    assert current.exists()
    assert not old.exists()
    assert recent.exists()
    assert other.exists()
    assert time.time() - current.stat().st_mtime < 100


def test_a_build_that_another_process_uses_is_not_removed(tmp_path: Path) -> None:
    used = folder(tmp_path / "root-aaaa", unused_days=9)
    number = os.open(used, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_SH)
    fresh = folder(tmp_path / "root-bbbb", unused_days=0)
    prune(fresh)
    assert used.exists()
    os.close(number)
    prune(fresh)
    assert not used.exists()


def module(tree: Path, name: str, depends: str) -> None:
    file = tree / "lib/modules/6.1/kernel" / f"{name}.ko"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0retpoline=Y\0")


def test_modules_are_loaded_after_what_they_depend_on(tmp_path: Path) -> None:
    module(tmp_path, "virtio", "")
    module(tmp_path, "virtio_ring", "virtio")
    module(tmp_path, "vfio-pci-core", "vfio,virtio_ring")
    module(tmp_path, "vfio", "virtio")
    module(tmp_path, "unwanted", "")
    (tmp_path / "lib/modules/6.1/modules.builtin").write_text("kernel/fs/built-in.ko\n")
    modules = find_modules("6.1", tmp_path / "boot/vmlinuz-6.1", tmp_path)
    stock.collect_modules(modules, ["vfio_pci_core", "vfio", "built_in"], tmp_path / "modules")
    order = (tmp_path / "modules/order").read_text().split()
    assert order == ["virtio.ko", "vfio.ko", "virtio_ring.ko", "vfio_pci_core.ko"]
    assert sorted(file.name for file in (tmp_path / "modules").glob("*.ko")) == sorted(order)


def test_the_headers_become_one_tree_without_links_to_other_folders(tmp_path: Path) -> None:
    headers = tmp_path / "usr/src/linux-headers-6.1-amd64"
    common = tmp_path / "usr/src/linux-headers-6.1-common"
    kbuild = tmp_path / "usr/lib/linux-kbuild-6.1"
    for made in (headers, common, kbuild / "scripts", kbuild / "tools"):
        made.mkdir(parents=True)
    (kbuild / "scripts/mkcompile").touch()
    for link in (headers / "scripts", headers / "tools", common / "scripts"):
        link.symlink_to(f"../../lib/linux-kbuild-6.1/{link.name}")
    (headers / ".kernelvariables").write_text("CC = $(CROSS_COMPILE)gcc-12\n")
    stock.build_tree(tmp_path / "usr", headers.name, tmp_path / "build")
    for place in ("scripts", "common/scripts"):
        assert (
            (tmp_path / "build" / place / "mkcompile").resolve().is_relative_to(tmp_path / "build")
        )
    assert "gcc-" not in (tmp_path / "build/.kernelvariables").read_text()


def test_the_stock_kernel_replaces_one_that_cannot_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(root: Path, version: str) -> Path:
        raise UntestableError("no space left")

    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "l1_root", lambda: tmp_path)
    monkeypatch.setattr(machine, "packaged_kernel", fails)
    monkeypatch.setattr(machine, "stock_kernel", lambda: tmp_path / "stock")
    monkeypatch.setattr(machine, "l1_module", lambda root, kernel: kernel / "module.ko")
    found = machine.l1(next(iter(KERNELS)))
    assert found.kernel == tmp_path / "stock"
    assert "no space left" in caplog.messages[0]
    assert "supports fewer of the proofs" in caplog.messages[0]


def test_an_l1_that_prints_nothing_times_out_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.asynccontextmanager
    async def silent_qemu(*arguments: object, timeout_s: float) -> AsyncIterator[SimpleNamespace]:
        report = asyncio.StreamReader()
        report.feed_data(b"ok\tfirst\nok\tsecond\n")
        process = SimpleNamespace(died=asyncio.get_running_loop().create_future())
        yield SimpleNamespace(report=report, process=process, console=tmp_path)

    monkeypatch.setattr(machine, "running_qemu", silent_qemu)
    lines: list[str] = []
    silent = machine.L1(tmp_path, tmp_path, tmp_path)
    with pytest.raises(
        WaitTimeoutError,
        match=r"nothing for 0\.1 s; its last lines:\n    ok\tfirst\n    ok\tsecond",
    ):
        asyncio.run(machine.run_machine(1, silent, tmp_path, tmp_path, lines.append, 0.1))
    assert lines == ["ok\tfirst", "ok\tsecond"]
