"""The kernel modules of the Linux guest, and the order in which it loads them."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError
from qmp_tools.guest import linux
from qmp_tools.guest.linux import load_order, pick_modules


def module(depends: str) -> bytes:
    """Return a module that has only the strings of its .modinfo section."""
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=it\0"


@pytest.fixture(params=["lib/modules", "usr/lib/modules"], ids=["Debian 12", "Debian 13"])
def package(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An unpacked kernel package."""
    version = tmp_path / request.param / "6.1"
    drivers = version / "kernel/drivers"
    drivers.mkdir(parents=True)
    (drivers / "sd_mod.ko").write_bytes(module("scsi_mod,t10-pi"))
    (drivers / "scsi_mod.ko.xz").write_bytes(lzma.compress(module("scsi-common")))
    (drivers / "t10-pi.ko").write_bytes(module("crc64"))
    (drivers / "scsi_common.ko").write_bytes(module(""))
    (drivers / "unwanted.ko").write_bytes(module("sd_mod"))
    (version / "modules.builtin").write_text("kernel/lib/crc64.ko\nkernel/drivers/built-in.ko\n")
    return tmp_path


def test_modules_come_with_their_dependencies(package: Path) -> None:
    picked = package / "picked"
    pick_modules(package, ["sd_mod", "built_in"], picked)
    names = sorted(file.name for file in picked.glob("*.ko"))
    assert names == ["scsi_common.ko", "scsi_mod.ko", "sd_mod.ko", "t10_pi.ko"]
    assert (picked / "scsi_mod.ko").read_bytes() == module("scsi-common")

    order = load_order(["built_in", "sd_mod"], picked)
    assert order.index("scsi_common") < order.index("scsi_mod") < order.index("sd_mod")
    assert order.index("t10_pi") < order.index("sd_mod")
    assert len(order) == 4  # what is built in is not loaded
    assert load_order(["t10_pi"], picked) == ["t10_pi"]


def test_a_missing_module_is_not_taken_for_a_built_in_one(package: Path) -> None:
    picked = package / "picked"
    pick_modules(package, ["sd_mod", "vmxnet3"], picked)
    with pytest.raises(UntestableError, match="the kernel has no module vmxnet3"):
        load_order(["sd_mod", "vmxnet3"], picked)
    assert "sd_mod" in load_order(["sd_mod"], picked)  # other drivers are as usable as before


def test_a_missing_dependency_is_named(package: Path) -> None:
    for file in package.rglob("t10-pi.ko"):
        file.unlink()
    pick_modules(package, ["sd_mod"], package / "picked")
    with pytest.raises(UntestableError, match="the kernel has no module t10_pi"):
        load_order(["sd_mod"], package / "picked")


def test_every_driver_says_where_its_device_is() -> None:
    for driver in linux.DRIVERS:
        assert driver.place.partition("=")[0] in ("disk", "loop")
        assert driver.modules
