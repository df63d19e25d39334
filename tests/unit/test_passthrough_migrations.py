"""The migrations of L2: what QEMU is given, and how the states and the pages are judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from dmaproof.vfio.abi import MigrationState
from qmp_tools.host.process import ProcessDiedError
from qmp_tools.passthrough import l2, plugged_memory, virtio_mem
from qmp_tools.passthrough.fake_device import (
    ENTERED_STATE,
    ENTRY,
    EnteredStates,
    FakeDevice,
    Journal,
    content,
    dropped_pages,
)
from qmp_tools.passthrough.l2 import RAM_BYTES, Plan, machine_arguments
from qmp_tools.passthrough.l2_result import DeviceResult, Result, complete_pages
from qmp_tools.passthrough.outcome import (
    DefectAbsentError,
    NothingTestedError,
    NotSupportedError,
    ProofFailedError,
    repeated,
)
from qmp_tools.passthrough.tracking import INTEL_IOMMU, TRACKINGS, joint
from qmp_tools.passthrough.two_devices import require_order

PAGE = 4096
S = MigrationState
QEMU = l2.TestedQemu(
    "11.1.3",
    frozenset({"sysfsdev", "enable-migration", "rombar", "iommufd"})
    | {"x-device-dirty-page-tracking", "x-pre-copy-dirty-page-tracking"},
)


# What QEMU is given ------------------------------------------------------------------------------


class Device:
    def __init__(self, name: str) -> None:
        self.sysfs = Path("/sys/bus/mdev/devices") / name


def arguments(plan: Plan, *front: str, **options: str) -> list[str]:
    devices = {n: cast(FakeDevice, Device(f"d{n}")) for n in range(len(plan.trackings))}
    return machine_arguments(plan, devices, QEMU, *front, **options)


def test_devices_on_iommufd_share_one_object() -> None:
    words = arguments(Plan((TRACKINGS["iommufd"], TRACKINGS["iommufd"])))
    assert words.count("iommufd,id=iommufd0") == 1
    devices = [word for word in words if word.startswith("vfio-pci,")]
    assert [",id=device0,addr=5" in devices[0], ",id=device1,addr=6" in devices[1]] == [True] * 2


def test_a_viommu_comes_before_the_device() -> None:
    words = arguments(Plan((TRACKINGS["container-type1-viommu"],)))
    assert words.index(INTEL_IOMMU) < len(words) - 2
    words = arguments(Plan((TRACKINGS["container"],)), "-device", "virtio-iommu-pci")
    assert words.index("virtio-iommu-pci") < len(words) - 2
    assert (
        ",enable-migration=auto,"
        in arguments(Plan((TRACKINGS["container"],)), migration="auto")[-1]
    )


def test_a_machine_whose_device_is_unplugged_has_slots_for_that() -> None:
    assert "q35,memory-backend=ram" in arguments(Plan((TRACKINGS["container"],)))
    plan = Plan((TRACKINGS["container"],) * 2, removed=0)
    assert "pc,memory-backend=ram" in arguments(plan)
    assert plan.migrated == (1,)


def test_the_windows_of_two_devices_do_not_overlap() -> None:
    plan = Plan((TRACKINGS["container"],) * 2)
    first, second = plan.engine(0), plan.engine(1)
    assert first.iova + first.length == second.iova
    assert plan.engine(0).length < Plan((TRACKINGS["container"],)).engine(0).length


def test_devices_write_memory_of_virtio_mem_beside_unplugged_blocks() -> None:
    plan = Plan((TRACKINGS["iommufd"],), in_plugged_memory=True)
    words = arguments(plan)
    assert f"size={RAM_BYTES >> 20}M,maxmem={RAM_BYTES + plugged_memory.BYTES}" in words
    assert any(word.startswith("virtio-mem-pci,") for word in words)
    assert not any(
        word.startswith("virtio-mem-pci,") for word in arguments(Plan((TRACKINGS["iommufd"],)))
    )
    engine = plan.engine(0)
    assert engine.iova > plugged_memory.FIRST
    assert engine.iova + engine.length < plugged_memory.FIRST + plugged_memory.BYTES
    assert (engine.iova, engine.length) == (
        plugged_memory.PLUGGED_FIRST,
        plugged_memory.PLUGGED_BYTES,
    )


def test_multifd_must_transfer_the_state_and_an_older_qemu_cannot() -> None:
    plan = Plan((TRACKINGS["container"],), multifd=True)
    with pytest.raises(NotSupportedError, match="x-migration-multifd-transfer"):
        arguments(plan)
    newer = l2.TestedQemu("11.1.3", QEMU.vfio_pci | {"x-migration-multifd-transfer"})
    devices = {0: cast(FakeDevice, Device("d0"))}
    assert "x-migration-multifd-transfer=on" in machine_arguments(plan, devices, newer)[-1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("iommufd", "iommufd"), ("iommufd", "iommufd")),
        (("iommufd", "iommufd-untracked"), ("iommufd-untracked", "iommufd-untracked")),
        (("container", "container-type1"), ("container-type1", "container-type1")),
        (("iommufd", "container-type1"), ("iommufd", "container-type1")),
        (("container", "container-once-stopped"), ("container-once-stopped",) * 2),
    ],
)
def test_devices_of_one_address_space_are_tracked_in_one_way(
    names: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert joint([TRACKINGS[name] for name in names]) == [TRACKINGS[name] for name in expected]


# How the result is judged -------------------------------------------------------------------------


def states(*entered: tuple[int, MigrationState]) -> EnteredStates:
    return np.array([(order, 0, state, 0) for order, state in entered], dtype=ENTERED_STATE)


def journal(*writes: tuple[int, MigrationState]) -> Journal:
    rows = [(n + 1, page * PAGE, PAGE, 0, state, 1, 0) for n, (page, state) in enumerate(writes)]
    return np.array(rows, dtype=ENTRY)


def device(
    source: EnteredStates,
    destination: EnteredStates,
    written: Journal | None = None,
    reports: int = 1,
) -> DeviceResult:
    if written is None:
        written = journal((1, S.RUNNING), (2, S.PRE_COPY))
    return DeviceResult(written, 1, {"reports": reports}, source, destination)


STOPS_FIRST = (
    (states((1, S.RUNNING_P2P), (2, S.RUNNING), (10, S.PRE_COPY), (11, S.PRE_COPY_P2P))),
    states((20, S.RESUMING), (22, S.STOP), (23, S.RUNNING_P2P), (25, S.RUNNING)),
)


def with_stop(order: int, source: EnteredStates) -> EnteredStates:
    return np.concatenate([source, states((order, S.STOP_COPY), (order + 9, S.STOP))])


def other(p2p: int, stop: int, resumed_p2p: int, runs: int) -> DeviceResult:
    source = with_stop(stop, states((3, S.RUNNING), (p2p, S.PRE_COPY_P2P)))
    resumed = states((21, S.RESUMING), (resumed_p2p, S.RUNNING_P2P), (runs, S.RUNNING))
    return device(source, resumed)


def test_all_devices_must_enter_a_p2p_state_before_one_stops_or_runs() -> None:
    first = device(with_stop(13, STOPS_FIRST[0]), STOPS_FIRST[1])
    require_order({0: first, 1: other(12, 14, 24, 26)})
    with pytest.raises(ProofFailedError, match="on the source, a device leaves its P2P state"):
        require_order({0: first, 1: other(14, 15, 24, 26)})
    with pytest.raises(ProofFailedError, match="on the destination, a device leaves its P2P"):
        require_order({0: first, 1: other(12, 14, 26, 27)})


def test_a_device_that_skips_p2p_or_does_not_stop_is_noticed() -> None:
    first = device(with_stop(13, STOPS_FIRST[0]), STOPS_FIRST[1])
    without = device(with_stop(14, states((3, S.RUNNING), (4, S.PRE_COPY))), STOPS_FIRST[1])
    with pytest.raises(ProofFailedError, match="on the source, a device has entered no P2P state"):
        require_order({0: first, 1: without})
    started_only = with_stop(14, states((3, S.RUNNING_P2P), (4, S.RUNNING)))
    with pytest.raises(ProofFailedError, match="on the source, a device has entered no P2P state"):
        require_order({0: first, 1: device(started_only, STOPS_FIRST[1])})
    with pytest.raises(ProofFailedError, match="on the source, a device has not left"):
        require_order({0: device(*STOPS_FIRST)})
    with pytest.raises(ProofFailedError, match="has not entered RESUMING"):
        require_order({0: device(with_stop(13, STOPS_FIRST[0]), states((20, S.RUNNING)))})


def test_a_write_after_the_stop_is_noticed() -> None:
    late = journal((1, S.RUNNING), (2, S.PRE_COPY_P2P), (7, S.STOP_COPY), (8, S.STOP))
    stopped = device(with_stop(13, STOPS_FIRST[0]), STOPS_FIRST[1], late)
    assert stopped.written_after_stop().tolist() == [7, 8]
    with pytest.raises(ProofFailedError, match="device 0 wrote 2 pages after it was stopped"):
        require_order({0: stopped})


def result(*differing: int, reports: int = 1, written: Journal | None = None) -> Result:
    devices = {0: device(states(), states(), written, reports)}
    return Result(devices, np.array(differing, dtype=np.int64), 5, 1.0, warned=False)


def test_equal_ram_is_required_and_that_qemu_asks_only_devices_with_a_log() -> None:
    log, type1 = TRACKINGS["iommufd"], TRACKINGS["container-type1"]
    result().require_equal([log])
    with pytest.raises(ProofFailedError, match="1 pages differ"):
        result(2).require_equal([log])
    with pytest.raises(ProofFailedError, match="QEMU has never asked device 0"):
        result(reports=0).require_equal([log])
    with pytest.raises(ProofFailedError, match="QEMU asked device 0, despite"):
        result().require_equal([type1])
    with pytest.raises(NothingTestedError):
        result(written=journal((1, S.RUNNING))).require_equal([log])


def dies(*, killed: bool) -> Callable[..., Result]:
    def migrate(*_: object) -> Result:
        raise ProcessDiedError("source QEMU has died", killed)

    return migrate


def test_lost_pages_of_virtio_mem_are_a_defect_that_a_corrected_qemu_does_not_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = virtio_mem.proofs(1, 1.0)[virtio_mem.DEFECTS["iommufd"]]

    def migrates(outcome: Result) -> None:
        monkeypatch.setattr(virtio_mem, "migrate", lambda *_: outcome)

    migrates(result(2))
    assert lost()[1]["differing"] == 1
    migrates(result())
    with pytest.raises(DefectAbsentError, match="0 pages differ"):
        lost()
    migrates(result(2, 3))
    with pytest.raises(ProofFailedError, match="1 pages differ that the device has not written"):
        lost()


def test_a_control_needs_a_qemu_that_loses_no_other_page_of_virtio_mem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control = virtio_mem.proofs(1, 1.0)[virtio_mem.CONTROL]
    monkeypatch.setattr(virtio_mem, "migrate", lambda *_: result(2, 3))
    with pytest.raises(NotSupportedError, match="without a fault, this QEMU loses"):
        control()
    monkeypatch.setattr(virtio_mem, "migrate", dies(killed=True))
    with pytest.raises(NotSupportedError, match="without a fault, this QEMU crashes"):
        control()


def test_a_qemu_that_a_signal_kills_has_the_defect_and_one_that_gives_up_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = virtio_mem.proofs(1, 1.0)[virtio_mem.DEFECTS["container"]]

    monkeypatch.setattr(virtio_mem, "migrate", dies(killed=True))
    assert ends() == ("source QEMU has died", {"crashed": True, "tries": 1})
    monkeypatch.setattr(virtio_mem, "migrate", dies(killed=False))
    with pytest.raises(ProofFailedError, match="has died"):
        ends()


def test_a_fault_must_be_noticed_on_its_own_pages_only() -> None:
    found, figures = result(2).require_noticed(np.array([1, 2]))
    assert found == "1 of 2 withheld pages differ"
    assert (figures["differing"], figures["kept_back"]) == (1, 2)
    with pytest.raises(ProofFailedError, match="not noticed"):
        result().require_noticed(np.array([1, 2]))
    with pytest.raises(ProofFailedError, match="1 pages differ that the fault did not affect"):
        result(2, 3).require_noticed(np.array([1, 2]))


def test_the_dropped_pages_are_those_that_were_written() -> None:
    written = journal(*((page, S.RUNNING) for page in range(1000)))
    dropped = device(states(), states(), written).dropped(50, 7).tolist()
    expected = np.flatnonzero(dropped_pages(np.arange(1000, dtype=np.uint64), 50, 7))
    assert dropped == expected.tolist()


def test_the_pages_of_a_removed_device_must_be_complete() -> None:
    writes = journal((1, S.RUNNING), (2, S.RUNNING), (1, S.RUNNING))
    ram = bytearray(4 * PAGE)
    for page, sequence in ((1, 3), (2, 2)):
        ram[page * PAGE : (page + 1) * PAGE] = content(sequence, page * PAGE, PAGE).tobytes()
    assert complete_pages(writes, bytes(ram)) == 2
    ram[PAGE + 5] ^= 1
    with pytest.raises(ProofFailedError, match=r"1 of 2 pages .* the first at 0x1000"):
        complete_pages(writes, bytes(ram))


def test_a_repeated_control_uses_other_seeds_and_counts() -> None:
    seeds: list[int] = []

    def control(seed: int) -> tuple[str, dict[str, int]]:
        seeds.append(seed)
        return f"seed {seed}", {"differing": seed}

    found, figures = repeated(control, 5, 3)()
    assert seeds == [5, 6, 7]
    assert found == "caught 3 of 3; the first: seed 5"
    assert figures == {"differing": 5, "rounds": 3, "tries": 3}
    assert repeated(control, 5, 1)()[0] == "seed 5"
