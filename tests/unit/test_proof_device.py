"""The fake VFIO device as a proof's device: its journal as evidence, and the command's options."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dmaproof.errors import UsageError
from dmaproof.evidence import Evidence, Slot
from dmaproof.trace import Link
from dmaproof.vfio.abi import MigrationState
from qmp_tools.cli.main import main
from qmp_tools.cli.prove import add_control
from qmp_tools.devices.registry import Control
from qmp_tools.memory.ram import RamFile, compare
from qmp_tools.migration.judgement import Blame
from qmp_tools.passthrough.fake_device import (
    ENTRY,
    REPORTED_RANGE,
    Journal,
    ReportedRanges,
    content,
)
from qmp_tools.passthrough.injected_faults import parse_fault
from qmp_tools.passthrough.kinds import fake_device_of, is_fake_vfio
from qmp_tools.passthrough.proof_device import (
    FakeProofDevice,
    evidence_of,
    gpas_of,
    is_behind_viommu,
)
from qmp_tools.proof.attribution import LostPage, attribute
from qmp_tools.proof.options import ProofOptions
from qmp_tools.proof.sensitivity import Sensitivity, measure_sensitivity
from qmp_tools.testbed.ring_driver import PAGE, ram_fd

PAGES = 32
ALL_SENT_NS = 1000


class Case:
    """The device's writes to the source's RAM, and the ranges in each of its reports."""

    def __init__(self, source: RamFile, destination: RamFile) -> None:
        self.source, self.destination = source, destination
        self._writes: list[tuple[int, ...]] = []
        self._reported: list[tuple[int, int, int]] = []

    def write(
        self,
        page: int,
        *,
        reports: int,
        time_ns: int = 2000,
        logged: int = 1,
        state: MigrationState = MigrationState.RUNNING,
        iova: int | None = None,
    ) -> None:
        sequence = len(self._writes) + 1
        iova = page * PAGE if iova is None else iova
        os.pwrite(self.source.fd, content(sequence, iova, PAGE).tobytes(), page * PAGE)
        self._writes.append((sequence, iova, PAGE, reports, state, logged, time_ns))

    def report(self, page: int, report: int) -> None:
        self._reported.append((report, page * PAGE, PAGE))

    def send(self, page: int) -> None:
        os.pwrite(self.destination.fd, os.pread(self.source.fd, PAGE, page * PAGE), page * PAGE)

    @property
    def journal(self) -> Journal:
        return np.array(self._writes, dtype=ENTRY)

    @property
    def reported_ranges(self) -> ReportedRanges:
        return np.array(self._reported, dtype=REPORTED_RANGE)

    def evidence(self, *, asked: bool = True, viommu: bool = False) -> Evidence:
        reported = self.reported_ranges if asked else None
        return evidence_of(self.journal, reported, viommu=viommu)

    def lost(self, *, asked: bool = True, viommu: bool = False) -> list[LostPage]:
        slots = [Slot(0, PAGES * PAGE, 0, self.source.device, self.source.inode)]
        differing = compare(self.source, self.destination)
        evidence = self.evidence(asked=asked, viommu=viommu)
        return attribute(differing, self.source, self.destination, slots, [evidence])

    def sensitivity(self, *, asked: bool = True) -> Sensitivity:
        evidence = self.evidence(asked=asked)
        evidence.slots.append(Slot(0, PAGES * PAGE, 0, 1, 1))
        return measure_sensitivity([evidence], ALL_SENT_NS)


@pytest.fixture
def case() -> Iterator[Case]:
    with ram_fd(PAGES * PAGE) as source, ram_fd(PAGES * PAGE) as destination:
        files = [
            RamFile(fd, PAGES * PAGE, os.fstat(fd).st_dev, os.fstat(fd).st_ino)
            for fd in (source, destination)
        ]
        yield Case(*files)


def test_a_page_that_was_never_reported_is_lost_by_the_device(case: Case) -> None:
    case.write(3, reports=7)
    case.report(4, 8)
    (page,) = case.lost()
    assert (page.blame, page.link, page.gpa) == (Blame.DEVICE, Link.TRACKER, 3 * PAGE)
    assert (page.request, page.due_in_harvest) == (1, 8)
    assert case.sensitivity().unreported == 1


def test_a_page_that_was_reported_only_before_its_last_write_is_lost_by_the_device(
    case: Case,
) -> None:
    case.write(3, reports=0)
    case.report(3, 1)
    case.send(3)
    assert not case.lost()
    case.write(3, reports=1)
    (page,) = case.lost()
    assert (page.blame, page.link, page.due_in_harvest) == (Blame.DEVICE, Link.TRACKER, 2)


def test_a_page_that_was_reported_in_time_is_lost_by_qemu(case: Case) -> None:
    case.write(3, reports=0)
    case.write(3, reports=4)
    case.report(3, 5)
    (page,) = case.lost()
    assert (page.blame, page.link, page.request) == (Blame.QEMU, Link.QEMU, 2)
    assert case.sensitivity().unreported == 0


def test_a_page_that_a_vcpu_wrote_later_is_lost_by_the_accelerator(case: Case) -> None:
    case.write(3, reports=0)
    case.report(3, 1)
    os.pwrite(case.source.fd, b"vcpu", 3 * PAGE + 8)
    (page,) = case.lost()
    assert page.blame is Blame.ACCELERATOR


def test_a_device_that_qemu_does_not_ask_has_missed_no_page(case: Case) -> None:
    case.write(3, reports=0, logged=0)
    case.write(5, reports=0, logged=0)
    case.send(5)
    (page,) = case.lost(asked=False)
    assert page.blame is Blame.QEMU
    sensitivity = case.sensitivity(asked=False)
    assert (sensitivity.unreported, sensitivity.reported_unwritten) == (0, 0)


@pytest.mark.parametrize("asked", [True, False])
def test_what_a_stopped_device_writes_is_lost_by_the_device(case: Case, asked: bool) -> None:
    case.write(3, reports=0, logged=asked)
    case.report(3, 1)
    case.send(3)
    case.write(3, reports=1, logged=asked, state=MigrationState.STOP_COPY)
    (page,) = case.lost(asked=asked)
    assert (page.blame, page.link, page.request) == (Blame.DEVICE, Link.TRACKER, 2)


def test_behind_a_viommu_pages_are_found_by_the_mapping_of_the_guest(case: Case) -> None:
    first_iova = 64 << 30
    iova = first_iova + (255 - 3) * PAGE  # the guest maps each MiB in reverse
    case.write(3, reports=0, logged=0, iova=iova)
    assert gpas_of(case.journal["iova"]).tolist() == [3 * PAGE]
    (page,) = case.lost(asked=False, viommu=True)
    assert (page.gpa, page.iova, page.blame) == (3 * PAGE, iova, Blame.QEMU)
    case.send(3)
    assert not case.lost(asked=False, viommu=True)


def test_writes_before_logging_are_not_counted_as_missed(case: Case) -> None:
    case.write(1, reports=0, logged=0)
    case.write(2, reports=0)
    case.write(3, reports=0, logged=0)  # while logging was on, outside the logged ranges
    sensitivity = case.sensitivity()
    assert (sensitivity.writes, sensitivity.unreported) == (2, 2)


def test_only_pages_written_once_after_the_first_pass_are_guaranteed_detectable(case: Case) -> None:
    for page, time_ns in ((1, 500), (1, 2000), (2, 2000), (3, 2000), (3, 2001)):
        case.write(page, reports=0, time_ns=time_ns)
        case.report(page, 1)
    sensitivity = case.sensitivity()
    assert (sensitivity.written, sensitivity.rewritten, sensitivity.guaranteed_detectable) == (
        3,
        3,
        1,
    )


def test_the_evidence_of_a_device_that_wrote_nothing_is_empty(case: Case) -> None:
    evidence = case.evidence()
    assert (evidence.requests, len(evidence.records), evidence.started_ns) == (0, 0, None)
    assert case.sensitivity().rewritten == 0


# The command --------------------------------------------------------------------------------------


def test_the_fake_device_is_recognised_by_its_name_with_or_without_a_tracking() -> None:
    assert is_fake_vfio(ProofOptions(device="vfio-fake"))
    assert is_fake_vfio(ProofOptions(device="vfio-fake:container"))
    assert not is_fake_vfio(ProofOptions(device="vfio:0000:3b:00.2,0000:3b:00.3"))
    assert not is_fake_vfio(ProofOptions(device=["blk", "net"]))
    assert not is_fake_vfio(ProofOptions())
    with pytest.raises(UsageError, match="only dmaproof's own devices can"):
        is_fake_vfio(ProofOptions(device=["vfio-fake", "blk"]))


@pytest.mark.parametrize(
    ("options", "tracking", "why"),
    [
        ({}, "none", "expected one of iommufd, .*container-type1"),
        ({"guest": "bare"}, "iommufd", "--guest does not apply"),
        ({"memory": "1G"}, "iommufd", "--memory does not apply"),
        ({"requests_after": 5}, "iommufd", "--requests-after does not apply"),
        ({"fault": "drop-pages=0.1"}, "iommufd", "one of clear-before-read, drop, late, shift"),
        ({"fault": "drop=0"}, "iommufd", "from 1 on"),
        ({"fault": "drop=x"}, "iommufd", "from 1 on"),
        ({"fault": "drop"}, "container-type1", "QEMU does not ask the device for dirty pages"),
    ],
)
def test_an_option_that_does_not_apply_is_wrong_usage(
    options: dict[str, Any], tracking: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        fake_device_of(ProofOptions.of({"device": f"vfio-fake:{tracking}", **options}))


def test_a_control_without_effect_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "--device=vfio-fake:iommufd-untracked", "--control"]) == 2
    assert "QEMU does not ask the device for dirty pages" in capsys.readouterr().err


def test_the_tracking_and_the_fault_are_read_from_the_options() -> None:
    options = ProofOptions(
        device="vfio-fake:container-once-stopped", seed=3, fault="drop=20", timeout=60
    )
    assert fake_device_of(options) == FakeProofDevice("container-once-stopped", "drop=20")
    assert fake_device_of(ProofOptions(device="vfio-fake")) == FakeProofDevice("iommufd")
    behind = fake_device_of(ProofOptions(device="vfio-fake:container-type1-viommu"))
    assert is_behind_viommu(behind)
    assert not is_behind_viommu(FakeProofDevice("container-type1"))
    assert parse_fault("drop=20") == {"drop": 20}
    assert parse_fault("clear-before-read") == {"clear_before_read": 200}


@pytest.mark.parametrize(
    ("links", "caught"), [([], False), (["tracker"], True), (["tracker", "qemu"], False)]
)
def test_a_control_that_is_not_caught_revokes_the_pass(links: list[str], caught: bool) -> None:
    report: dict[str, Any] = {"exit_code": 0, "verdict": "all pages are equal"}
    repeated = {"lost_pages": [{"link": link} for link in links]}
    line = add_control(report, repeated, Control("drop=50", Link.TRACKER))
    assert report["control"]["caught"] is caught
    assert (report["exit_code"] == 0) is caught
    assert ("NOT CAUGHT" in line) is not caught
