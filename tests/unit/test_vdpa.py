"""vDPA devices: their names, QEMU's arguments, and the options that they refuse."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dmaproof.errors import UntestableError, UsageError
from qmp_tools.cli.main import main
from qmp_tools.devices.device import ProofDevice
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.devices.registry import IN_L1, DeviceRequest, kind_of
from qmp_tools.devices.vdpa import OwnCard, SimulatedCard
from qmp_tools.passthrough.nested import nested_options
from qmp_tools.proof.options import ProofOptions

FILE = Path("/dev/vhost-vdpa-3")
NAMES = ("vdpa-net", "vdpa-net:svq", "vduse-net", "vduse-net:svq")


def make(name: str, fault: str | None = None) -> ProofDevice:
    """Return the device that ``--device NAME`` selects, with seed 7."""
    options = DeviceOptions(fault=fault, seed=7)
    request = DeviceRequest((name,), None, options, 2, "split", False, False)
    return kind_of([name], None).make(request)


def refusal(**options: object) -> str:
    """Return the message with which the options of a proof in L1 are refused."""
    with pytest.raises(UsageError) as caught:
        nested_options(ProofOptions.of(options))
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_guest_drives_each_device(name: str) -> None:
    assert nested_options(ProofOptions.of({"device": name})).guest == "bare"
    device = make(name)
    assert "bare" in device.guests
    assert device.facts.device == name


def test_qemu_always_shadows_the_queues_if_the_name_says_so() -> None:
    passed = ["-netdev", f"vhost-vdpa,id=net,vhostdev={FILE}"]
    assert SimulatedCard().qemu_arguments(FILE)[:2] == passed
    assert SimulatedCard(True).qemu_arguments(FILE)[:2] == [passed[0], f"{passed[1]},x-svq=on"]


@pytest.mark.parametrize("name", ["vduse-net:on", "vdpa-net:shadow"])
def test_another_ending_of_a_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name}: expected one of vd"):
        make(name)


def test_only_the_device_with_a_journal_has_a_fault() -> None:
    assert make("vduse-net", "drop-pages=0.5") == OwnCard(False, "drop-pages=0.5", 7)
    message = refusal(device="vdpa-net", fault="drop-pages=0.5")
    assert message == "--fault does not apply to --device vdpa-net"


def test_a_fault_of_another_link_is_refused() -> None:
    with pytest.raises(UsageError, match="the only link of --device vduse-net is the length"):
        make("vduse-net", "off-by-one-end")


def test_a_control_without_a_fault_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "--device", "vdpa-net", "--control"]) == 2
    assert "no fault can be injected into --device vdpa-net" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"numa": 2}, {"arch": "aarch64"}, {"queues": 4}])
def test_options_that_the_device_cannot_have_are_refused(options: dict[str, object]) -> None:
    (name,) = options
    assert refusal(device="vduse-net", **options).startswith(f"--{name} does not apply")


def test_without_the_program_vdpa_the_error_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    async def start() -> None:
        async with SimulatedCard().start(tmp_path, 1.0):
            pass

    with pytest.raises(UntestableError, match="install the package iproute2"):
        asyncio.run(start())


def test_vdpa_devices_are_made_only_in_l1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IN_L1, raising=False)
    assert not kind_of(["vdpa-net"], None).runs_here()
    monkeypatch.setenv(IN_L1, "1")
    assert kind_of(["vdpa-net"], None).runs_here()
