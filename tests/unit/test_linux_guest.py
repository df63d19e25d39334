"""Which modules the Linux guest is given, and in which order it loads them."""

from __future__ import annotations

import lzma
from pathlib import Path

from qmp_tools.guest import linux
from qmp_tools.guest.linux import Driver, load_order, pick_modules


def module(depends: str) -> bytes:
    """As far as it matters: the strings of a module's .modinfo section."""
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=it\0"


def test_modules_come_with_what_they_depend_on(tmp_path: Path) -> None:
    drivers = tmp_path / "lib/modules/6.1/kernel/drivers"
    drivers.mkdir(parents=True)
    (drivers / "sd_mod.ko").write_bytes(module("scsi_mod,t10-pi"))
    (drivers / "scsi_mod.ko.xz").write_bytes(lzma.compress(module("scsi-common")))
    (drivers / "t10-pi.ko").write_bytes(module("crc64"))
    (drivers / "scsi_common.ko").write_bytes(module(""))
    (drivers / "unwanted.ko").write_bytes(module("sd_mod"))

    picked = tmp_path / "picked"
    pick_modules(tmp_path, ["sd_mod", "built_in"], picked)
    names = sorted(file.name for file in picked.iterdir())
    assert names == ["scsi_common.ko", "scsi_mod.ko", "sd_mod.ko", "t10_pi.ko"]
    assert (picked / "scsi_mod.ko").read_bytes() == module("scsi-common")

    order = load_order(Driver(["built_in", "sd_mod"], "disk=/dev/sda"), picked)
    assert order.index("scsi_common") < order.index("scsi_mod") < order.index("sd_mod")
    assert order.index("t10_pi") < order.index("sd_mod")
    assert len(order) == 4  # what is built in, and what is not there, is not loaded
    assert load_order(Driver(["t10_pi"], ""), picked) == ["t10_pi"]


def test_every_driver_says_where_its_device_is() -> None:
    for driver in linux.DRIVERS:
        assert driver.place.partition("=")[0] in ("disk", "loop")
        assert driver.modules
