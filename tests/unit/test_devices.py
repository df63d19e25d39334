"""Third-party devices: how they are chosen, their disk, and their processes."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from dmaproof.errors import UnsupportedError, UsageError
from dmaproof.stamp import Stamp, read_stamp
from dmaproof.units import PAGE_BYTES
from dmaproof.vhost_user.features import F_RING_PACKED, F_VERSION_1
from qmp_tools.cli import main as cli
from qmp_tools.devices import command
from qmp_tools.devices.command import KINDS, CommandDevice
from qmp_tools.devices.device import AttachedDevice, ProofDevice
from qmp_tools.devices.disk_image import IMAGE_BYTES, write_image
from qmp_tools.devices.emulated import EmulatedDevice
from qmp_tools.devices.inside_qemu import InsideQemu
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.devices.registry import DeviceRequest, device_kinds, kind_of
from qmp_tools.devices.several import AttachedDevices, SeveralDevices
from qmp_tools.guest.channel import GuestChannel
from qmp_tools.proof.options import OPTIONS


def choose_device(
    names: Sequence[str],
    device_command: str | None = None,
    options: DeviceOptions | None = None,
    queues: int = 2,
    ring: str = "split",
    *,
    killed: bool = False,
    behind_iommu: bool = False,
    destination_killed: bool = False,
) -> ProofDevice:
    return kind_of(names, device_command).make(
        DeviceRequest(
            names,
            device_command,
            options or DeviceOptions(),
            queues,
            ring,
            killed,
            behind_iommu,
            destination_killed,
        )
    )


def test_a_device_is_chosen_by_name() -> None:
    options = DeviceOptions()
    assert choose_device(["blk"], None, options, 2) == EmulatedDevice(options, 2)
    assert choose_device(["qemu:nvme"], None, options, 2) == InsideQemu("nvme", 2)
    third_party = choose_device(["fs"], "/opt/fs \\\n  --at '{socket}'", options, 1)
    assert third_party == CommandDevice("fs", ["/opt/fs", "--at", "{socket}"], 1)
    assert third_party.facts.device == "fs by fs"


def test_several_devices_are_combined_into_one() -> None:
    options = DeviceOptions(seed=5, fault="drop-pages=0.1")
    both = choose_device(["blk:file=/disk", "net"], None, options, 2, "packed")
    assert isinstance(both, SeveralDevices)
    assert both.facts.device == "blk:file=/disk, net"
    assert both.guests == ["linux"]
    assert both.driver.modules == ("virtio_pci", "virtio_blk", "virtio_net", "af_packet")
    assert both.driver.place == "disk=/dev/vda packets=eth0"
    assert [device.facts.fault for device in both.devices] == ["drop-pages=0.1"] * 2


@pytest.mark.parametrize(
    ("names", "ring", "killed", "message"),
    [
        (["net"], "split", False, "workload needs a disk"),
        (["blk", "net"], "split", True, "net cannot be killed"),
        (["blk", "qemu:nvme"], "split", False, "only dmaproof's own devices can"),
        ([], "split", False, "expected the name of a device"),
        (["blk:colour=red"], "split", False, "no option 'colour'"),
    ],
)
def test_devices_and_options_that_exclude_each_other_are_refused(
    names: list[str], ring: str, killed: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_device(names, None, DeviceOptions(), 2, ring, killed=killed)


def test_behind_an_iommu_each_device_has_a_port(tmp_path: Path) -> None:
    both = choose_device(["blk", "net"], None, DeviceOptions(), 2, behind_iommu=True)
    assert isinstance(both, SeveralDevices)
    words = [
        word
        for device in both.devices
        if isinstance(device, EmulatedDevice)
        for word in device.qemu_arguments(tmp_path / "socket")
    ]
    assert [word for word in words if word.startswith("pcie-root-port")] == [
        "pcie-root-port,id=port-1,chassis=1",
        "pcie-root-port,id=port-2,chassis=2",
    ]
    for number in (1, 2):
        behind = f",bus=port-{number},iommu_platform=on,ats=on"
        assert sum(behind in word for word in words) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "tape",
            None,
            r"expected one of blk, .*qemu:nvme.*vfio:SOURCE,DESTINATION.*vfio-fake.*-command, .*fs",
        ),
        ("fs", None, "needs --device-command"),
        (
            "qemu:virtio-balloon-pci",
            None,
            "none of dmaproof's guests drives this device; .* virtio-blk-pci",
        ),
        (
            "qemu:nvme",
            "backend {socket}",
            "expected one of blk, fs, net, net-udp, scsi with --device",
        ),
        ("blk", "backend --socket x", "{socket} is missing"),
        ("blk", "backend {socket} {tag}", "'tag'; the placeholders are {socket}"),
        ("blk", "backend '{socket}", "No closing quotation"),
        ("blk", "backend {socket} {", "write other braces twice"),
    ],
)
def test_an_unknown_device_is_refused(name: str, text: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_device([name], text, DeviceOptions(), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            (words, f"{words[0].partition('=')[0]} does not apply to --device qemu:nvme")
            for words in (
                ["--tracker=iommu"],
                ["--harvest=1"],
                ["--fault=drop-pages"],
                ["--ring=packed"],
                ["--iommu=intel"],
                ["--kill-device"],
                ["--destination-lacks=flush"],
                ["--initrd=initrd.img"],
            )
        ),
        (["--control"], "--control: no fault can be injected into --device qemu:nvme"),
        (["--guest", "bare"], "use --guest linux"),
    ],
)
def test_an_option_that_the_device_does_not_have_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prove", "--device", "qemu:nvme", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_kind_of_device_accepts_only_options_of_a_proof() -> None:
    for kind in device_kinds().values():
        assert kind.accepts <= set(OPTIONS)
        assert "device" in kind.accepts


def test_every_page_of_the_image_is_stamped(tmp_path: Path) -> None:
    write_image(tmp_path / "image")
    content = (tmp_path / "image").read_bytes()
    assert len(content) == IMAGE_BYTES
    for page in (0, 1, IMAGE_BYTES // PAGE_BYTES - 1):
        stamp = read_stamp(content[page * PAGE_BYTES :][:PAGE_BYTES])
        assert stamp == Stamp(lba=8 * page, request=1)


def test_a_socket_listens_once_it_accepts_connections(tmp_path: Path) -> None:
    path, own_pid = tmp_path / "a socket", os.getpid()
    assert not command.listens(path, own_pid)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not command.listens(path, own_pid)
        listener.listen()
        assert command.listens(path, own_pid)
    assert path.is_socket()
    assert not command.listens(path, own_pid)
    path.unlink()
    path.touch()
    assert not command.listens(path, own_pid)


BACK_END = "/opt/back-end '{socket}'"


def third_party(kind: str, ring: str = "split", *, behind_iommu: bool = False) -> CommandDevice:
    device = choose_device([kind], BACK_END, DeviceOptions(), 2, ring, behind_iommu=behind_iommu)
    assert isinstance(device, CommandDevice)
    return device


@pytest.mark.parametrize("kind", KINDS)
def test_the_options_of_a_third_partys_device_reach_qemu(kind: str) -> None:
    def options(device: CommandDevice) -> set[str]:
        (value,) = [
            value
            for value in device.qemu_arguments(Path("/run/socket"))
            if value.startswith(("vhost-user-", "virtio-net-")) and "id=" not in value
        ]
        return set(value.split(","))

    plain = options(third_party(kind))
    assert options(third_party(kind, "packed")) - plain == {"packed=on"}
    behind_iommu = options(third_party(kind, behind_iommu=True)) - plain
    assert behind_iommu == {"bus=port-1", "iommu_platform=on", "ats=on"}


@pytest.mark.parametrize(
    ("device", "accepted", "missing"),
    [
        (third_party("blk", "packed"), F_VERSION_1, "VIRTIO_F_RING_PACKED"),
        (third_party("blk", behind_iommu=True), F_RING_PACKED, "VIRTIO_F_ACCESS_PLATFORM"),
        (third_party("blk", "packed"), F_RING_PACKED, None),
        (third_party("blk"), 0, None),
    ],
)
def test_a_feature_that_the_driver_does_not_use_is_missing(
    tmp_path: Path, device: CommandDevice, accepted: int, missing: str | None
) -> None:
    async def check() -> None:
        guest = mock.create_autospec(GuestChannel)
        guest.number.side_effect = lambda *key: (
            accepted if key == ("virtio-0002", "features") else 0
        )
        async with device.start(tmp_path, 1) as attached:
            attached.check_guest(guest)

    if missing is None:
        asyncio.run(check())
    else:
        with pytest.raises(UnsupportedError, match=f"without {missing}: the back end or QEMU"):
            asyncio.run(check())


def test_the_guest_knows_the_port_of_the_echo_server() -> None:
    device = third_party("net-udp")
    assert device.driver.place == f"loop=eth0 echo={device.udp_port}"
    assert third_party("net").driver.place == "loop=eth0"


@pytest.mark.parametrize("command", [None, BACK_END])
@pytest.mark.parametrize("side", ["killed", "destination_killed"])
def test_qemu_connects_again_to_a_device_that_is_killed_on_either_side(
    command: str | None, side: str
) -> None:
    def chardev(**killed: bool) -> str:
        device = choose_device(["blk"], command, DeviceOptions(), 2, "split", **killed)
        assert isinstance(device, CommandDevice | EmulatedDevice)
        return device.qemu_arguments(Path("/run/socket"))[1]

    extra = ",reconnect-ms=100" if command else ",server=on,wait=off"
    assert chardev(**{side: True}).removeprefix(chardev()) == extra


@pytest.mark.parametrize("command", [None, BACK_END])
def test_a_device_is_killed_only_on_the_sides_that_were_asked_for(command: str | None) -> None:
    for source, destination in itertools.product((False, True), repeat=2):
        facts = choose_device(["blk"], command, killed=source, destination_killed=destination).facts
        assert (facts.killed, facts.destination_killed) == (source, destination)


@pytest.mark.parametrize(
    ("side", "flag"),
    [("killed", "--kill-device"), ("destination_killed", "--kill-destination-device")],
)
def test_a_killed_back_end_to_which_qemu_does_not_connect_again_is_refused(
    side: str, flag: str
) -> None:
    refusal = f"{flag}: QEMU does not connect again to the back end of --device fs"
    with pytest.raises(UsageError, match=refusal):
        choose_device(["fs"], BACK_END, DeviceOptions(), 2, "split", **{side: True})


def test_each_of_several_devices_is_killed_and_started_again() -> None:
    class Mortal(AttachedDevice):
        is_killed_on_destination = True

        def __init__(self) -> None:
            self.steps: list[str] = []

        async def attach(self, side: str) -> Sequence[str]:
            return ()

        async def kill(self, side: str) -> None:
            self.steps.append(f"kill {side}")

        async def start_again(self, side: str) -> None:
            self.steps.append(f"start {side}")

    async def kill_all() -> None:
        assert both.is_killed_on_destination
        await both.kill("destination")
        await both.start_again("destination")

    devices = [Mortal(), Mortal()]
    both = AttachedDevices(devices)
    asyncio.run(kill_all())
    assert [device.steps for device in devices] == [["kill destination", "start destination"]] * 2


@pytest.mark.parametrize("back_end", [None, BACK_END])
def test_a_device_that_no_qemu_migrates_is_refused_by_name(back_end: str | None) -> None:
    with pytest.raises(UnsupportedError, match="QEMU does not migrate vhost-user-vsock"):
        choose_device(["vsock"], back_end)
