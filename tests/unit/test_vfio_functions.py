"""The check of a host's VFIO functions; the host is a tree of files."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dmaproof.errors import TrackerError, UntestableError, UsageError
from dmaproof.vfio.abi import MigrationFlag
from dmaproof.vfio.device import VfioDevice
from dmaproof.vfio.requests import VfioError
from qmp_tools.host.finding import Finding, State
from qmp_tools.passthrough import host_functions, vfio_functions
from qmp_tools.passthrough.host_functions import MissingError, parse_functions, require_testable
from qmp_tools.passthrough.vfio_functions import (
    FunctionFacts,
    Host,
    examine,
    examine_pair,
    find_function,
    gather_facts,
    lockable_bytes,
)
from qmp_tools.qemu.machine import DESTINATION, GIB, SOURCE

SOURCE_ADDRESS, DESTINATION_ADDRESS = "0000:3b:00.2", "0000:3b:00.3"
ALL = MigrationFlag.STOP_COPY | MigrationFlag.P2P | MigrationFlag.PRE_COPY


class Tree:
    """A host with an IOMMU, iommufd and the legacy container, and functions as they are added."""

    def __init__(self, root: Path) -> None:
        self.host = Host(root / "sys", root / "dev")
        self.file("vfio/vfio")
        self.file("iommu")

    def file(self, name: str) -> Path:
        path = self.host.dev / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def add(
        self,
        address: str,
        *,
        driver: str | None = "mlx5_vfio_pci",
        group: str | None = None,
        number: int | None = None,
        device: str = "0x101e",
    ) -> Path:
        """Add a function bound to `driver`, as VFIO's device `number` if that is a VFIO driver."""
        folder = self.host.sys / "bus" / "pci" / "devices" / address
        folder.mkdir(parents=True)
        (folder / "vendor").write_text("0x15b3\n")
        (folder / "device").write_text(f"{device}\n")
        if driver:
            target = self.host.sys / "drivers" / driver
            target.mkdir(parents=True, exist_ok=True)
            (folder / "driver").symlink_to(target)
        if group:
            members = self.host.sys / "kernel" / "iommu_groups" / group / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(folder)
            (folder / "iommu_group").symlink_to(members.parent)
            self.file(f"vfio/{group}")
        if number is not None:
            (folder / "vfio-dev" / f"vfio{number}").mkdir(parents=True)
            self.file(f"vfio/devices/vfio{number}")
        return folder


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def pair(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Two functions that meet every condition, on a simulated kernel."""
    tree.add(SOURCE_ADDRESS, group="20", number=0)
    tree.add(DESTINATION_ADDRESS, group="21", number=1)
    simulate(monkeypatch)
    return tree


def simulate(
    monkeypatch: pytest.MonkeyPatch,
    flags: MigrationFlag = ALL,
    *,
    logs: bool = True,
    iommu_tracks: bool = False,
    state: int | VfioError = 4096,
    error: Exception | None = None,
) -> None:
    """Make functions report these properties, or fail to open with `error`."""

    @contextmanager
    def opened(sysfs: Path, iommufd: bool) -> Iterator[tuple[VfioDevice, bool]]:
        if error:
            raise error
        yield VfioDevice(-1), iommu_tracks

    def stop_copy_bytes(device: VfioDevice) -> int:
        if isinstance(state, VfioError):
            raise state
        return state

    monkeypatch.setattr(vfio_functions, "open_function", opened)
    monkeypatch.setattr(VfioDevice, "migration", lambda self: flags)
    monkeypatch.setattr(VfioDevice, "can_log", lambda self: logs)
    monkeypatch.setattr(VfioDevice, "stop_copy_bytes", stop_copy_bytes)
    monkeypatch.setattr(host_functions, "lockable_bytes", lambda: None)


def facts_of(tree: Tree, address: str = SOURCE_ADDRESS, *, iommufd: bool = True) -> FunctionFacts:
    return gather_facts(find_function(address, tree.host), tree.host, iommufd=iommufd)


def findings_of(tree: Tree) -> dict[str, Finding]:
    """Return the findings about the source's function by name."""
    return {finding.name: finding for finding in examine(facts_of(tree), GIB, None)}


def missing(facts: FunctionFacts, lockable: int | None = None) -> dict[str, str]:
    """Return what is missing by name, with its remedy."""
    findings = examine(facts, GIB, lockable)
    absent = [finding for finding in findings if finding.state is State.MISSING]
    assert all(finding.remedy for finding in absent)
    return {finding.name: f"{finding.what}; {finding.remedy}" for finding in absent}


@pytest.mark.parametrize("suffix", ["", ",container"])
def test_a_pair_that_meets_every_condition_is_testable(pair: Tree, suffix: str) -> None:
    text = f"vfio:3b:00.2,{DESTINATION_ADDRESS}{suffix}"
    functions = parse_functions(text, pair.host)
    lines = require_testable(functions, GIB, pair.host)
    assert f"{SOURCE_ADDRESS}: driver: bound to mlx5_vfio_pci" in lines
    assert f"{DESTINATION_ADDRESS}: IOMMU group: group 21, viable" in lines
    assert any("STOP_COPY" in line and "PRE_COPY" in line for line in lines)
    assert functions.facts.device == f"vfio:{SOURCE_ADDRESS},{DESTINATION_ADDRESS}{suffix}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vfio:", "neither a PCI address"),
        ("vfio:eth0", "neither a PCI address"),
        ("vfio:3b:00.2,3b:00.3,3b:00.4", "two PCI addresses"),
        ("vfio:container", "two PCI addresses"),
        ("vfio:0000:3b:00.7", "not found: .*3b:00.7 does not exist.*lspci"),
        ("vfio:/sys/bus/mdev/devices/none", "does not exist"),
    ],
)
def test_a_name_without_two_existing_functions_is_wrong_usage(
    pair: Tree, text: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        parse_functions(text, pair.host)


def test_a_folder_of_sysfs_names_a_function_without_a_pci_address(pair: Tree) -> None:
    folder = pair.add("c0ffee", driver="dmaproof_vfio", group="22", number=2)
    assert find_function(str(folder), pair.host).address == "c0ffee"
    assert not missing(facts_of(pair, str(folder)))


def test_one_function_alone_has_no_destination(pair: Tree) -> None:
    functions = parse_functions(f"vfio:{SOURCE_ADDRESS}", pair.host)
    with pytest.raises(
        MissingError, match="both: pair: source and destination are one function"
    ) as caught:
        require_testable(functions, GIB, pair.host)
    assert "pair" in [finding.name for finding in caught.value.missing]


def test_functions_of_two_kinds_are_not_a_pair(pair: Tree) -> None:
    pair.add("0000:5e:00.1", group="30", number=5, device="0x1017")
    other = facts_of(pair, "0000:5e:00.1")
    (finding,) = examine_pair(facts_of(pair), other)
    assert finding.state is State.MISSING
    assert "0x101e" in finding.what
    (finding,) = examine_pair(other, replace(other, function=facts_of(pair).function, driver="x"))
    assert "driver" in finding.what


def test_two_functions_of_one_iommu_group_are_not_a_pair(pair: Tree) -> None:
    pair.add("0000:3b:00.4", group="20", number=2)
    (finding,) = examine_pair(facts_of(pair), facts_of(pair, "0000:3b:00.4"))
    assert finding.state is State.MISSING
    assert "group 20" in finding.what


@pytest.mark.parametrize(
    ("driver", "why"), [("mlx5_core", "mlx5_core, which is not a VFIO driver"), (None, "no driver")]
)
def test_a_function_that_is_not_bound_to_vfio_is_not_touched(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, driver: str | None, why: str
) -> None:
    tree.add(SOURCE_ADDRESS, driver=driver, group="20")
    simulate(monkeypatch, error=AssertionError("the function was opened"))
    before = sorted(tree.host.sys.rglob("*"))
    found = missing(facts_of(tree))
    assert why in found["driver"]
    assert "driverctl set-override 0000:3b:00.2" in found["driver"]
    assert sorted(tree.host.sys.rglob("*")) == before


def test_a_function_without_an_iommu_has_no_group(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add(SOURCE_ADDRESS, number=0)
    simulate(monkeypatch, error=AssertionError("the function was opened"))
    assert "intel_iommu=on" in missing(facts_of(tree))["IOMMU group"]


def test_a_group_with_members_of_other_drivers_is_not_viable(pair: Tree) -> None:
    pair.add("0000:3b:00.0", driver="mlx5_core", group="20")
    pair.add("0000:3a:00.0", driver="pcieport", group="20")
    pair.add("0000:3b:00.1", driver=None, group="20")
    pair.add("0000:3b:00.4", driver="vfio-pci", group="20")
    found = missing(facts_of(pair))["IOMMU group"]
    assert (
        "group 20 is not viable: these are bound to other drivers: 0000:3b:00.0 (mlx5_core);"
        in found
    )


@pytest.mark.parametrize(
    ("iommufd", "gone"), [(True, "iommu"), (True, "vfio/devices/vfio0"), (False, "vfio/20")]
)
def test_missing_device_files_are_reported(pair: Tree, iommufd: bool, gone: str) -> None:
    (pair.host.dev / gone).unlink()
    found = missing(facts_of(pair, iommufd=iommufd))["files"]
    assert f"not found: {pair.host.dev / gone}" in found
    assert not missing(facts_of(pair, iommufd=not iommufd)).get("files")


def test_a_kernel_without_device_files_can_use_the_container(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add(SOURCE_ADDRESS, driver="vfio-pci", group="20")
    simulate(monkeypatch)
    assert "container" in missing(facts_of(tree))["files"]
    assert not missing(facts_of(tree, iommufd=False))


def test_files_without_access_are_reported_with_their_remedy(
    pair: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pair.host.dev / "vfio" / "devices" / "vfio0"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != file and access(path, mode))
    assert f"access to {file}; sudo chown $USER {file}" in missing(facts_of(pair))["files"]


def test_a_function_that_is_in_use_is_reported(pair: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, error=TrackerError("BIND_IOMMUFD: EBUSY"))
    assert "EBUSY; end the process that has it open" in missing(facts_of(pair))["open"]


def test_a_driver_that_cannot_migrate_is_reported_with_its_remedy(
    pair: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, MigrationFlag(0))
    assert "devlink port function set" in missing(facts_of(pair))["migration"]
    plain = replace(facts_of(pair), driver="vfio-pci")
    assert (
        "driver vfio-pci cannot migrate it; bind it to the vendor's" in missing(plain)["migration"]
    )


def test_the_size_of_the_state_is_reported_if_the_kernel_has_it(
    pair: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, state=VfioError("MIG_DATA_SIZE", errno.ENOTTY, None))
    unknown = findings_of(pair)["state"]
    assert unknown.state is State.LIMITED
    assert "100 GiB" in unknown.what
    simulate(monkeypatch, state=1 << 20)
    known = findings_of(pair)["state"]
    assert (known.state, known.what) == (
        State.OK,
        "about 1048576 bytes, by the device's estimate",
    )


@pytest.mark.parametrize(
    ("logs", "iommu_tracks", "state"),
    [(True, False, State.OK), (False, True, State.OK), (False, False, State.LIMITED)],
)
def test_the_trackers_of_a_function_are_reported(
    pair: Tree, monkeypatch: pytest.MonkeyPatch, logs: bool, iommu_tracks: bool, state: State
) -> None:
    simulate(monkeypatch, MigrationFlag.STOP_COPY, logs=logs, iommu_tracks=iommu_tracks)
    found = findings_of(pair)
    assert found["tracking"].state is state
    assert found["migration"].state is State.LIMITED, "without PRE_COPY"


@pytest.mark.parametrize(
    ("lockable", "enough"), [(None, True), (8 << 20, False), (GIB, False), (2 * GIB, True)]
)
def test_all_of_the_guests_ram_is_locked(pair: Tree, lockable: int | None, enough: bool) -> None:
    found = missing(facts_of(pair), lockable)
    assert ("locked memory" not in found) is enough
    assert enough or "ulimit -l" in found["locked memory"]


@pytest.mark.parametrize(("suffix", "enough"), [("", False), (",container", True)])
def test_with_iommufd_the_locked_memory_of_both_qemus_counts(
    pair: Tree, monkeypatch: pytest.MonkeyPatch, suffix: str, enough: bool
) -> None:
    monkeypatch.setattr(host_functions, "lockable_bytes", lambda: 3 * GIB // 2)
    functions = parse_functions(f"vfio:{SOURCE_ADDRESS},{DESTINATION_ADDRESS}{suffix}", pair.host)
    if enough:
        assert require_testable(functions, GIB, pair.host)
        return
    with pytest.raises(UntestableError, match="RLIMIT_MEMLOCK"):
        require_testable(functions, GIB, pair.host)


def test_everything_missing_is_reported_at_once(
    pair: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, MigrationFlag(0))
    monkeypatch.setattr(host_functions, "lockable_bytes", lambda: 65536)
    functions = parse_functions(f"vfio:{SOURCE_ADDRESS},{DESTINATION_ADDRESS}", pair.host)
    with pytest.raises(UntestableError) as caught:
        require_testable(functions, GIB, pair.host)
    text = str(caught.value)
    assert text.count("remedy:") == 4
    assert f"{DESTINATION_ADDRESS}: migration: " in text
    assert "driver:" not in text, "the message has only what is missing"


async def arguments_of(tree: Tree, suffix: str, side: str) -> str:
    functions = parse_functions(f"vfio:{SOURCE_ADDRESS},{DESTINATION_ADDRESS}{suffix}", tree.host)
    async with functions.start(tree.host.dev, 60) as attached:
        assert not await attached.evidence(side)
        return " ".join(await attached.attach(side))


def test_each_side_has_a_function_of_its_own(pair: Tree) -> None:
    source = asyncio.run(arguments_of(pair, "", SOURCE))
    destination = asyncio.run(arguments_of(pair, ",container", DESTINATION))
    assert f"sysfsdev={pair.host.sys}/bus/pci/devices/{SOURCE_ADDRESS}," in source
    assert "enable-migration=on" in source
    assert "-object iommufd,id=iommufd0" in source
    assert f"/{DESTINATION_ADDRESS}," in destination
    assert "iommufd" not in destination


def test_a_process_with_the_capability_has_no_limit_of_locked_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapEff:\t0000000000004000\n")
    assert lockable_bytes(status) is None
    status.write_text("Name:\tx\nCapEff:\t00000000a80435fb\n")
    assert lockable_bytes(status) == 65536
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert lockable_bytes(status) is None
