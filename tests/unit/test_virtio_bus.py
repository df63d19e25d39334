"""virtio devices on another bus than PCI."""

from __future__ import annotations

import pytest

from dmaproof.devices import emulated_devices
from qmp_tools.arch.s390x import S390X
from qmp_tools.arch.x86_64 import X86_64
from qmp_tools.qemu.virtio_bus import on_bus

CARD = emulated_devices()["echo"].qemu_arguments("card", 2, ["packed=on"])


def test_on_pci_nothing_changes() -> None:
    assert on_bus(X86_64.virtio_bus, CARD) == CARD


def test_a_card_moves_to_the_channel_subsystem_without_the_properties_of_pci() -> None:
    assert on_bus(S390X.virtio_bus, CARD) == [
        *("-netdev", "vhost-user,id=net-card,chardev=card"),
        *("-device", "virtio-net-ccw,netdev=net-card,packed=on"),
    ]


@pytest.mark.parametrize(
    ("device", "moved"),
    [
        ("vhost-user-fs-pci,chardev=a,tag=disk", "vhost-user-fs-ccw,chardev=a,tag=disk"),
        ("scsi-hd,drive=disk,bus=adapter.0", "scsi-hd,drive=disk,bus=adapter.0"),
        ("nvme,drive=disk", "nvme,drive=disk"),
        ("usb-pci,x=virtio-net-pci", "usb-pci,x=virtio-net-pci"),
    ],
)
def test_only_virtio_devices_move(device: str, moved: str) -> None:
    assert on_bus("ccw", ["-device", device]) == ["-device", moved]


def test_other_arguments_stay() -> None:
    arguments = ["-chardev", "socket,id=a,path=/virtio-net-pci"]
    assert on_bus("ccw", arguments) == arguments
