"""The parts of the Linux guest besides its kernel: the drivers and the initramfs."""

from __future__ import annotations

import pytest

from qmp_tools.guest import drivers
from qmp_tools.guest.drivers import Driver
from qmp_tools.guest.initramfs import with_modules


@pytest.mark.parametrize("driver", [*drivers.DRIVERS, drivers.BALLOON])
def test_every_module_of_a_driver_has_an_option_of_the_kernel(driver: Driver) -> None:
    assert driver.modules
    assert set(driver.modules) <= drivers.CONFIG_OPTIONS.keys()


@pytest.mark.parametrize("driver", drivers.DRIVERS)
def test_every_driver_says_where_its_device_is(driver: Driver) -> None:
    assert driver.place.partition("=")[0] in ("disk", "loop")


def test_the_initramfs_lists_its_modules_in_their_load_order() -> None:
    initramfs = with_modules(b"init's code", {"virtio": b"first", "virtio_blk": b"second"})
    assert b"/modules/virtio.ko\n/modules/virtio_blk.ko\n" in initramfs
    names = [b"init\0", b"modules\0", b"modules/virtio.ko\0", b"modules/virtio_blk.ko\0"]
    assert all(name in initramfs for name in names)
    assert all(content in initramfs for content in (b"init's code", b"first", b"second"))
    assert initramfs.startswith(b"070701")
    assert len(initramfs) % 4 == 0
