"""The kernel's vhost devices: names, options, errors, and how QEMU gets the recorder."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from dmaproof.errors import UntestableError, UsageError
from dmaproof.units import PAGE_BYTES
from qmp_tools.devices import kernel_vhost, scsi_target
from qmp_tools.devices.kernel_vhost import (
    KernelDevice,
    KernelDeviceKind,
    VhostNet,
    VhostNetKind,
    VhostScsi,
    VhostScsiKind,
    VhostVsock,
    VhostVsockKind,
)
from qmp_tools.devices.process import DeviceOptions
from qmp_tools.devices.registry import IN_L1, DeviceRequest, kind_of
from qmp_tools.devices.vhost_recorder import KernelLog, KernelLogs
from qmp_tools.migration.judgement import Blame
from qmp_tools.passthrough.nested import runs_in_l1
from qmp_tools.proof.attribution import LostPage, with_kernel_logs
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.resolve import refuse_unsupported_options
from qmp_tools.qemu.builds import preloading

pytestmark = pytest.mark.unit


def make(name: str, fault: str | None = None) -> KernelDevice:
    options = DeviceOptions("", fault=fault, seed=3)
    device = kind_of([name], None).make(
        DeviceRequest([name], None, options, 1, "split", False, False)
    )
    assert isinstance(device, KernelDevice)
    return device


def test_the_plain_device_leaves_qemu_and_the_kernel_alone(tmp_path: Path) -> None:
    plain = make("vhost-net")
    assert plain == VhostNet(seed=3)
    assert plain.recorder(tmp_path, "source") is None
    assert make("vhost-scsi") == VhostScsi(seed=3)


def test_a_fault_needs_the_recorder() -> None:
    assert make("vhost-net:recorder") == VhostNet(has_recorder=True, seed=3)
    faulty = make("vhost-net", "drop-pages=0.25")
    assert (faulty.has_recorder, faulty.share, faulty.facts.fault) == (
        True,
        0.25,
        "drop-pages=0.25",
    )


def test_other_options_and_faults_are_refused() -> None:
    with pytest.raises(UsageError, match=r"expected vhost-net or vhost-net:recorder$"):
        make("vhost-net:queues")
    with pytest.raises(UsageError, match=r"--fault drop-bits=0.1: .* expected drop-pages=SHARE"):
        make("vhost-net", "drop-bits=0.1")


def test_vhost_scsi_is_not_used_behind_an_iommu() -> None:
    behind = ProofOptions(device=("vhost-scsi",), iommu="intel")
    with pytest.raises(UsageError, match="--iommu does not apply to --device vhost-scsi"):
        refuse_unsupported_options(behind, kind_of(["vhost-scsi"], None))
    for kind in (VhostNetKind(), VhostVsockKind()):
        refuse_unsupported_options(ProofOptions(device=(kind.name,), iommu="intel"), kind)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
def test_a_device_that_this_kernel_lacks_runs_in_l1(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_vhost, "_open_error", lambda node: number)
    assert not VhostNetKind().runs_here()


def test_a_device_that_this_kernel_has_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_vhost, "_open_error", lambda node: errno.EACCES)
    assert VhostNetKind().runs_here()
    assert not runs_in_l1(ProofOptions(device=("vhost-net",)))
    assert runs_in_l1(ProofOptions(device=("vhost-net",), l1_kernel="stock"))


@pytest.mark.parametrize("kind", [VhostScsiKind, VhostVsockKind])
def test_scsi_targets_and_cids_are_made_only_in_l1(
    kind: type[KernelDeviceKind], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_vhost, "_open_error", lambda node: 0)
    monkeypatch.delenv(IN_L1, raising=False)
    assert not kind().runs_here()
    monkeypatch.setenv(IN_L1, "1")
    assert kind().runs_here()


def test_a_device_file_that_may_not_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_vhost, "_open_error", lambda node: errno.EACCES)
    with pytest.raises(UntestableError, match=r"/dev/vhost-net cannot be opened .*group kvm"):
        make("vhost-net").require_node()


def test_a_device_behind_an_iommu_has_a_port_with_ats() -> None:
    assert VhostNet().device_arguments("card") == ["-device", "card"]
    port, device = VhostNet(behind_iommu=True).device_arguments("card")[1::2]
    assert port.startswith("pcie-root-port,id=port-1")
    assert device == "card,bus=port-1,iommu_platform=on,ats=on"


def test_both_sides_use_the_same_scsi_target(tmp_path: Path) -> None:
    attached = kernel_vhost._AttachedScsi(VhostScsi(), tmp_path, scsi_target.WWN)
    for side in ("source", "destination"):
        (_, device) = asyncio.run(attached.attach(side)) or ("", "")
        assert f"wwpn={scsi_target.WWN},migratable=on" in device
        assert attached.program(side, Path("/opt/qemu")) == Path("/opt/qemu")
        assert attached.kernel_logs(side) is None


def test_each_qemu_has_a_cid_of_its_own(tmp_path: Path) -> None:
    attached = kernel_vhost._AttachedVsock(VhostVsock(), tmp_path)
    sides = ("source", "destination", "destination")  # after a cancelled migration
    found = [list(asyncio.run(attached.attach(side))) for side in sides]
    assert found == [["-device", f"vhost-vsock-pci,guest-cid={cid}"] for cid in (3, 4, 5)]


def test_a_scsi_target_has_the_image_as_unit_0_of_target_0(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(8192))
    root = tmp_path / "target"
    with scsi_target.scsi_target(image, root) as name:
        backstore = root / "core/fileio_0/dmaproof"
        assert (backstore / "control").read_text() == f"fd_dev_name={image},fd_dev_size=8192"
        unit = root / "vhost" / name / "tpgt_0/lun/lun_0"
        assert (unit / "disk").resolve() == backstore
    assert not unit.exists()


def test_a_kernel_without_scsi_targets_is_explained(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    root = tmp_path / "target"
    root.touch()  # no folder
    with (
        pytest.raises(UntestableError, match="target_core_file and vhost_scsi, and mount configfs"),
        scsi_target.scsi_target(tmp_path / "disk", root),
    ):
        pass


def test_a_lost_page_says_what_the_recorder_saw() -> None:
    logs = KernelLogs(np.array([1, 2]), np.array([2]))
    lost = [LostPage(page * PAGE_BYTES, page * PAGE_BYTES, 9, Blame.UNKNOWN) for page in range(3)]
    found = with_kernel_logs([*lost, LostPage(0, None, 9, Blame.UNKNOWN)], logs)
    assert [(page.kernel_log, page.blame) for page in found] == [
        (KernelLog.NEVER, Blame.UNKNOWN),
        (KernelLog.HANDED_ON, Blame.UNKNOWN),
        (KernelLog.WITHHELD, Blame.DEVICE),
        (KernelLog.NEVER, Blame.UNKNOWN),
    ]


def test_a_fetched_qemu_preloads_the_recorder_by_its_own_loader(tmp_path: Path) -> None:
    build = tmp_path / "it's 7.2"
    build.mkdir()
    (build / "suite").write_text("bookworm\n")
    script = tmp_path / "script"
    preloading(build / "qemu-system-x86_64", Path("/a b/w.so"), script, {"FILE": "/c d"})
    text = script.read_text()
    assert "--preload '/a b/w.so'" in text
    assert "LD_PRELOAD" not in text  # the shell and its tools have the host's libc
    assert "export FILE='/c d'\n" in text
    assert os.access(script, os.X_OK)


def test_another_qemu_preloads_the_recorder_before_other_libraries(tmp_path: Path) -> None:
    script = preloading(Path("/opt/my qemu"), Path("/w.so"), tmp_path / "script", {})
    text = script.read_text()
    assert 'export LD_PRELOAD=/w.so"${LD_PRELOAD:+:$LD_PRELOAD}"' in text
    assert "exec '/opt/my qemu' \"$@\"" in text
